# SPDX-License-Identifier: Apache-2.0
"""``--spec-method redrafter`` for vLLM's command line, whose choices are a closed list."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_redrafter.options import METHOD, is_method

_WRAPPED_MARK = "_vllm_redrafter_wrapped"


def install() -> None:
    """Wrap ``EngineArgs.add_cli_args`` once."""
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.add_cli_args
    if getattr(original, _WRAPPED_MARK, False):
        return
    wrapped = _wrap(original)
    setattr(wrapped, _WRAPPED_MARK, True)
    EngineArgs.add_cli_args = staticmethod(wrapped)  # type: ignore[method-assign]


def _wrap(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(original)
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        # argparse has no public way to a declared option.
        for action in getattr(parser, "_actions", ()):
            if action.dest == "spec_method" and action.choices is not None:
                action.choices = [*action.choices, METHOD]
                action.type = functools.partial(_spelling, action.type or str)
        return parser

    return add_cli_args


def _spelling(convert: Callable[[str], Any], text: str) -> Any:
    """Our method in its usual spelling; any other as it was."""
    return METHOD if is_method(text) else convert(text)
