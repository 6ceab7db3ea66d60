# SPDX-License-Identifier: Apache-2.0
"""The hook table against sources: the installed ones, and extracts of the CUDA wheels."""

import ast
import inspect
import json
import shutil
import textwrap
from pathlib import Path

import pytest
from overriding import attributes_read, overrides

from vllm_redrafter.engine import compat, vllm_source
from vllm_redrafter.engine.compat import HOOKS, TESTED_VLLM, Hook
from vllm_redrafter.engine.vllm_source import VllmSource, check_description

EXTRACTS = Path(__file__).parent / "extracts"
SAMPLER = "vllm.v1.worker.gpu.sample.sampler:Sampler"


def load(version):
    return json.loads((EXTRACTS / f"vllm-{version}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def installed():
    return vllm_source.installed()


# -- the versions that we claim ------------------------------------------------------------------


def test_there_is_an_extract_for_every_tested_version():
    assert {path.stem for path in EXTRACTS.iterdir()} == {f"vllm-{v}" for v in TESTED_VLLM}


@pytest.mark.parametrize("version", TESTED_VLLM)
def test_every_hook_fits_the_wheel(version):
    extract = load(version)
    assert extract["version"] == version and extract["wheel"].startswith(f"vllm-{version}-")
    hooks = extract["hooks"]
    missing = sorted({hook.where for hook in HOOKS} - set(hooks))
    assert not missing, f"run scripts/extract_vllm.py over the wheel of {version} for {missing}"
    assert [(h.where, check_description(h, hooks[h.where])) for h in HOOKS] == [
        (h.where, None) for h in HOOKS
    ]


def test_the_extract_of_the_installed_version_is_what_its_sources_say(installed):
    """The CPU build has the Python sources of the CUDA build, or this would not hold."""
    expected = json.loads(json.dumps(installed.extract(HOOKS)))
    assert installed.version() == compat.vllm_version()
    assert load(installed.version())["hooks"] == expected, "run scripts/extract_vllm.py anew"


# What a method that we call, or that calls us, takes in one version only. All have defaults, and
# none is passed to anything of ours.
DRIFT = {
    "vllm.model_executor.layers.vocab_parallel_embedding:ParallelLMHead": {"quant_method="},
    f"{compat.V2_RUNNER}.postprocess_sampled": {"draft_tokens="},
}


def test_signatures_differ_only_where_we_know():
    versions = [load(version)["hooks"] for version in TESTED_VLLM]
    drift = {}
    for hook in HOOKS:
        seen = [set(v[hook.where].get("parameters", "").split(", ")) for v in versions]
        if differing := set.union(*seen) - set.intersection(*seen):
            drift[hook.where] = differing
    assert drift == DRIFT


@pytest.mark.parametrize("version", TESTED_VLLM)
def test_every_override_takes_what_that_version_passes(version):
    """As tests/contract/test_hooks.py has it for the installed one."""
    hooks, seen = load(version)["hooks"], 0
    for ours, theirs, name in overrides():
        for base in theirs.__mro__:
            entry = hooks.get(f"{base.__module__}:{base.__qualname__}.{name}")
            if entry is None or name not in vars(base):
                continue
            stock = [p.strip("*=") for p in entry["parameters"].split(", ")]
            mine = inspect.signature(getattr(ours, name)).parameters.values()
            named = [p.name for p in mine if p.kind is p.POSITIONAL_OR_KEYWORD]
            assert named == stock[: len(named)], f"{ours.__name__}.{name}"
            takes_more = any(p.kind is p.VAR_POSITIONAL for p in mine)
            assert takes_more or len(stock) == len(named), f"{ours.__name__}.{name}"
            seen += 1
    assert seen > 20


# -- the table names every attribute that our V2 classes read ------------------------------------


def bases():
    from vllm_redrafter.engine.v2.cuda_attention import TreeFlashAttentionImpl
    from vllm_redrafter.engine.v2.model_state import TreeModelState
    from vllm_redrafter.engine.v2.speculator import ReDrafterSpeculator

    return {
        TreeFlashAttentionImpl: "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl",
        TreeModelState: "vllm.v1.worker.gpu.model_states.default:DefaultModelState",
        ReDrafterSpeculator: "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator",
    }


def own_names(source):
    """Methods, class variables and what is put on ``self``."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            names |= vllm_source.assigned(node)
    return names


def test_every_inherited_attribute_is_in_the_table():
    table = {hook.where: set(hook.attributes) for hook in HOOKS}
    for ours, theirs in bases().items():
        source = textwrap.dedent(inspect.getsource(ours))
        read = attributes_read(source, "self") - own_names(source)
        assert read and read <= table[theirs], f"{theirs}: add {sorted(read - table[theirs])}"


def test_every_field_of_a_batch_that_we_read_is_in_the_table():
    from vllm_redrafter.engine.v2 import (
        model_state,
        sample_rows,
        sampler,
        speculator,
        step_rows,
    )

    (hook,) = [h for h in HOOKS if h.where == "vllm.v1.worker.gpu.input_batch:InputBatch"]
    for module in (model_state, sample_rows, sampler, speculator, step_rows):
        read = attributes_read(inspect.getsource(module), "input_batch")
        assert read and read <= set(hook.fields), f"add {sorted(read - set(hook.fields))}"


# -- it sees what it should ----------------------------------------------------------------------


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.where)
def test_the_text_says_what_python_says(hook, installed):
    """Signatures and fields as ``inspect`` has them, for the same installation."""
    entry, found = installed.describe(hook), compat.resolve(hook.where)
    assert isinstance(entry, dict), entry
    if inspect.isfunction(found):
        names = [p.strip("*=") for p in entry["parameters"].split(", ") if p not in ("", "*")]
        assert names == list(inspect.signature(found).parameters)
    elif inspect.isclass(found) and hook.fields:
        declared = {
            name for base in found.__mro__[:-1] for name in vars(base).get("__annotations__", {})
        }
        assert set(entry["fields"].split()) == declared
    elif inspect.isclass(found) and hook.attributes:
        public = {name for name in vars(found) if not name.startswith("_")}
        assert public <= set(entry["attributes"].split())


@pytest.fixture
def copy(installed, tmp_path):
    """Some of the installed sources, to be changed."""
    for module in ("sampler", "states"):
        name = f"vllm/v1/worker/gpu/{'sample/' if module == 'sampler' else ''}{module}.py"
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(installed.root / name, tmp_path / name)
    (tmp_path / "vllm/__init__.py").touch()

    def change(old, new):
        path = tmp_path / "vllm/v1/worker/gpu/sample/sampler.py"
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")
        return VllmSource(tmp_path)

    return change


@pytest.mark.parametrize(
    "old, new, where, problem",
    [
        ("def sample(", "def draw(", f"{SAMPLER}.sample", "missing (no 'sample' in"),
        ("class Sampler", "class Other", SAMPLER, "missing (no 'Sampler' in"),
        ("expanded_local_pos", "local_pos", f"{SAMPLER}.sample", "has no parameter 'expanded_lo"),
        ("self.compute_nans", "self.nans", SAMPLER, "has no attribute 'compute_nans'"),
    ],
)
def test_a_change_in_a_copy_is_found(copy, old, new, where, problem):
    (hook,) = [hook for hook in HOOKS if hook.where == where]
    assert copy("class Sampler", "class Sampler").check(hook) is None
    assert copy(old, new).check(hook).startswith(problem)


def test_an_exchanged_parameter_is_found(installed):
    (hook,) = [hook for hook in HOOKS if hook.where == f"{SAMPLER}.sample"]
    entry = installed.describe(hook)
    first, second = hook.parameters[:2]
    swapped = entry["parameters"].replace(f"{first}, {second}", f"{second}, {first}")
    assert swapped != entry["parameters"]
    problem = check_description(hook, {**entry, "parameters": swapped})
    assert problem.startswith("takes its parameters in another order")


def test_every_way_to_define_a_name(tmp_path):
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text("from .a import Base as Renamed\nfrom . import a")
    (package / "a.py").write_text(
        "from typing import overload\n"
        "class Base:\n"
        "    def __init__(self, x, /, y=1, *rest, z, **more):\n"
        "        self.x = x\n"
        "    @property\n"
        "    def p(self): ...\n"
        "class Child(Base):\n"
        "    f: int\n"
        "    if True:\n"
        "        def m(self): ...\n"
        "@overload\n"
        "def g(a): ...\n"
        "def g(a, b): ...\n"
        "alias = g\n"
        "made = Child(1)\n"
        "later: Child\n"
        "try:\n"
        "    FLAG = True\n"
        "except ImportError:\n"
        "    FLAG = False\n"
    )
    source = VllmSource(tmp_path)

    def parameters(where):
        return source.describe(Hook(where, "x"))["parameters"]

    assert parameters("vllm:Renamed") == "x, y=, *rest, z, **more"
    assert parameters("vllm.a:alias") == parameters("vllm:a.g") == "a, b"
    for where in ("vllm.a:Child.m", "vllm.a:made.m", "vllm.a:later.m"):
        assert parameters(where) == "self"
    described = source.describe(Hook("vllm.a:Child", "x", fields=("f",), attributes=("x",)))
    assert described["fields"] == "f" and described["attributes"] == "__init__ f m p x"
    assert source.describe(Hook("vllm.a:Child.p", "x"))["kind"] == "property"
    assert source.describe(Hook("vllm.a:FLAG", "x")) == {"kind": "value"}
    for gone in ("vllm.b:x", "vllm.a:x", "vllm.a:Child.x"):
        assert source.check(Hook(gone, "x")).startswith("missing (no ")
