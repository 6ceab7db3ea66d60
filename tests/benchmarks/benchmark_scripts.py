# SPDX-License-Identifier: Apache-2.0
"""The benchmarks are scripts, not a package: how a test gets one as a module."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def load_script(path: str, name: str) -> ModuleType:
    """``benchmarks/<path>`` as the module ``name``."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module
