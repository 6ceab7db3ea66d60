# SPDX-License-Identifier: Apache-2.0
"""Names of the rules that turn a draft into a tree; importable without torch."""

from typing import Literal, get_args

TreeRule = Literal["best", "beams"]
TREE_RULES: tuple[str, ...] = get_args(TreeRule)
