# SPDX-License-Identifier: Apache-2.0
"""Every test of ``own_process`` is one here; see ``process.py``."""

import ast

import pytest
from engine_cases.cases import CASES

from engine_v2.process import INNER, PARAMETER, outcomes

# The first test waits for the whole process.
pytestmark = pytest.mark.timeout(1800)


def functions():
    """(name, whether it is marked slow) of every test function over there, the cases one by one."""
    for path in sorted(INNER.glob("v2_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not (isinstance(node, ast.FunctionDef) and node.name.startswith("test_")):
                continue
            slow = any(ast.unparse(d).endswith("slow") for d in node.decorator_list)
            names = [node.name]
            if node.name == "test_case":
                names = [f"{node.name}[{case.name}]" for case in CASES]
            yield from ((f"{path.name}::{name}", slow) for name in names)


TESTS = [
    pytest.param(inner, marks=[pytest.mark.slow, pytest.mark.long] if slow else [], id=inner)
    for inner, slow in functions()
]


def test_there_are_tests():
    assert len(TESTS) > 40


@pytest.mark.parametrize(PARAMETER, TESTS)
def test_on_model_runner_v2(request, inner):
    outcomes(request.session).assert_passed(inner)
