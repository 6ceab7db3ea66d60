# SPDX-License-Identifier: Apache-2.0
"""The installed vLLM is as the table of hooks says, and the table leaves nothing out."""

import ast
import inspect
import textwrap
from pathlib import Path

import pytest
import vllm
from overriding import attributes_read, overrides

import vllm_redrafter
from vllm_redrafter.engine import compat
from vllm_redrafter.engine.compat import HOOKS, Hook, check_hook, check_hooks

PACKAGE = Path(vllm_redrafter.__file__).parent
ENGINE_FILES = sorted((PACKAGE / "engine").rglob("*.py"))


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.where)
def test_hook_resolves(hook):
    assert check_hook(hook) is None


def test_no_hook_is_listed_twice():
    names = [hook.where for hook in HOOKS]
    assert len(names) == len(set(names))


def test_the_installed_version_is_a_tested_one():
    assert compat.vllm_version() in compat.TESTED_VLLM


@pytest.mark.parametrize(
    "hook, problem",
    [
        (Hook("vllm.gone:Thing", "x"), "missing"),
        (Hook("vllm.v1.outputs:Gone", "x"), "missing"),
        (Hook(f"{compat.RUNNER}._gone", "x"), "missing"),
        (Hook(f"{compat.RUNNER}._sample", "x", parameters=("gone",)), "no parameter 'gone'"),
        (Hook("vllm.v1.outputs:SamplerOutput", "x", fields=("gone",)), "no field 'gone'"),
    ],
)
def test_a_moved_hook_is_reported(hook, problem, monkeypatch):
    assert problem in check_hook(hook)
    monkeypatch.setattr(compat, "HOOKS", (*HOOKS, hook))
    assert [found.where for found, bad in check_hooks() if bad] == [hook.where]


def test_a_removed_method_is_reported(monkeypatch):
    runner = compat.resolve(compat.RUNNER)
    monkeypatch.delattr(runner, "_input_fits_in_drafter")
    bad = [hook.where for hook, problem in check_hooks() if problem]
    assert bad == [f"{compat.RUNNER}._input_fits_in_drafter"]


def test_what_vllm_asks_of_a_rejection_sampler():
    """Ours inherits nothing, so whatever vLLM's worker reads of one it must have itself."""
    from vllm_redrafter.engine.v2.sampler import TreeSampler

    (hook,) = [hook for hook in HOOKS if hook.where.endswith(":RejectionSampler")]
    root = Path(vllm.__file__).parent
    folders = [root / name for name in ("v1/worker", "model_executor/warmup")]
    asked = {
        node.attr
        for folder in folders
        for path in folder.rglob("*.py")
        # Model Runner V1 is the one file that has another sampler of this name.
        if path.name != "gpu_model_runner.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and ast.unparse(node.value).rpartition(".")[2] == "rejection_sampler"
    }
    assert asked == set(hook.attributes)
    assert all(hasattr(TreeSampler, name) for name in asked)


# -- what our engine touches, read from its source ----------------------------------------------


def vllm_symbols(source: str) -> set[str]:
    """``module:name`` of everything that ``source`` imports from vLLM, or takes from a module."""
    symbols, modules = set(), {}
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "vllm":
                    assert alias.asname, f"line {node.lineno}: write 'from ... import' instead"
                    modules[alias.asname] = alias.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            for alias in node.names:
                if _is_module(f"{node.module}.{alias.name}"):
                    modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                else:
                    symbols.add(f"{node.module}:{alias.name}")
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in modules
        ):
            symbols.add(f"{modules[node.value.id]}:{node.attr}")
    return symbols


def _is_module(name: str) -> bool:
    import importlib.util

    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def in_table(symbol: str) -> bool:
    return any(hook.where == symbol or hook.where.startswith(f"{symbol}.") for hook in HOOKS)


def test_the_scan_sees_every_form_of_import():
    found = vllm_symbols(
        "from vllm.v1.outputs import SamplerOutput as S\n"
        "def f():\n"
        "    from vllm.v1.worker import cpu_worker as w\n"
        "    import vllm.v1.outputs as o\n"
        "    return w.CPUWorker, o.LogprobsTensors\n"
    )
    assert found == {
        "vllm.v1.outputs:SamplerOutput",
        "vllm.v1.outputs:LogprobsTensors",
        "vllm.v1.worker.cpu_worker:CPUWorker",
    }
    assert not in_table("vllm.v1.outputs:PoolerOutput")


@pytest.mark.parametrize("path", ENGINE_FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_vllm_symbol_is_in_the_table(path):
    source = path.read_text()
    if path.name == "compat.py":
        # Asks an unknown installation for its version, whatever else it lacks.
        source = source.replace("import vllm\n", "pass\n").replace("vllm.__version__", "''")
    missing = sorted(symbol for symbol in vllm_symbols(source) if not in_table(symbol))
    assert not missing, f"add to compat.HOOKS: {missing}"


def test_there_are_overrides_to_check():
    names = {name for _, _, name in overrides()}
    assert {"_prepare_inputs", "_sample", "init_device", "forward"} <= names


def test_every_override_is_in_the_table():
    """Under a class that defines it, so that a move inside vLLM's class tree is seen too."""
    for _, theirs, name in overrides():
        symbols = [
            f"{base.__module__}:{base.__qualname__}.{name}"
            for base in theirs.__mro__
            if name in vars(base)
        ]
        assert any(in_table(symbol) for symbol in symbols), f"add to compat.HOOKS: {symbols[0]}"


def test_every_override_takes_what_vllm_passes():
    """Named parameters of ours are the first ones of vLLM's, in its order."""
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    for ours, theirs, name in overrides():
        mine = inspect.signature(getattr(ours, name)).parameters.values()
        named = [p.name for p in mine if p.kind is positional]
        takes_more = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in mine)
        stock = list(inspect.signature(getattr(theirs, name)).parameters)
        assert named == stock[: len(named)], f"{ours.__name__}.{name}"
        assert takes_more or len(stock) == len(named), f"{ours.__name__}.{name}"


def attributes_of(cls: type) -> set[str]:
    """Methods, annotations and everything assigned to ``self`` in the class and its bases."""
    names = set(dir(cls))
    for base in cls.__mro__[:-1]:
        names |= set(getattr(base, "__annotations__", {}))
        tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if ast.unparse(node.value) == "self":
                    names.add(node.attr)
    return names


def test_every_attribute_that_our_runner_reads_exists():
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

    from vllm_redrafter.engine.v1.runner import TreeRunnerMixin

    source = textwrap.dedent(inspect.getsource(TreeRunnerMixin))
    own = attributes_of(TreeRunnerMixin)
    read = attributes_read(source, "self") - own
    assert {"input_batch", "requests", "positions", "sampler"} <= read
    assert read <= attributes_of(CPUModelRunner)

    batch = attributes_read(source, "self.input_batch")
    assert {"req_ids", "block_table"} <= batch <= attributes_of(InputBatch)
    state = attributes_read(source, "state")
    assert {"sampling_params", "output_token_ids"} <= state <= attributes_of(CachedRequestState)
