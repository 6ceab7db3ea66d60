# SPDX-License-Identifier: Apache-2.0
"""Half of the tests, where all take too long; as a pytest plugin (``-p every_second``) of all."""

from __future__ import annotations

from typing import Any


def leave_out_half(config: Any, items: list[Any], among: list[Any]) -> None:
    """Deselect half of ``among``.

    In the order of Thue and Morse: strict turns would leave out one value of a parameter for good.
    """
    left_out = {item for number, item in enumerate(among) if number.bit_count() % 2}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    leave_out_half(config, items, items)
