# SPDX-License-Identifier: Apache-2.0
"""What every test needs before torch and vLLM are imported, and the switch for slow tests."""

from __future__ import annotations

import environment
import pytest

environment.set_defaults()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    from engine_v2.process import needs_v2

    # What waits for Model Runner V2's process comes last, each module in one piece.
    waiting = {item.path for item in items if needs_v2(item)}
    items.sort(key=lambda item: item.path in waiting)
    # Deselected, not skipped: a test that did not run must not look like one that did.
    chosen = config.getoption("-m")
    if config.getoption("--slow") or "slow" in chosen or "long" in chosen:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


def pytest_collection_finish(session: pytest.Session) -> None:
    from engine_v2.process import start

    start(session)


def pytest_sessionfinish(session: pytest.Session) -> None:
    from engine_v2.process import stop

    stop(session)
