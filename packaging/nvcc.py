# SPDX-License-Identifier: Apache-2.0
"""How csrc/cuda is compiled: shared by setup.py and scripts/compile_cuda.py.

torch.utils.cpp_extension is not used: without a CUDA build of torch it neither finds a toolkit nor
links, and thanks to the stable ABI torch's headers are all that is needed. The resulting library
loads beside a torch with or without CUDA.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

# The oldest architecture with the tensor-core products and asynchronous copies that the kernels
# use, then one of every later generation. PTX of the last one serves what comes after.
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"
OLDEST = (8, 0)


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME, else of PATH, else of /usr/local/cuda; None if there is none."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes]
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((path for path in candidates if path.is_file()), None)


def architectures() -> str:
    """VLLM_REDRAFTER_CUDA_ARCHS, or the default."""
    return os.environ.get("VLLM_REDRAFTER_CUDA_ARCHS", "").strip() or DEFAULT_ARCHITECTURES


def gencode(text: str) -> list[str]:
    """nvcc's flags for a list such as ``8.0;9.0+PTX`` (the format of TORCH_CUDA_ARCH_LIST).

    Raises:
        ValueError: an entry that is none, or older than the kernels support.
    """
    flags = []
    for entry in re.split(r"[;\s,]+", text.strip()):
        found = re.fullmatch(r"(\d+)\.(\d+)(a?)(\+PTX)?", entry)
        if not found:
            raise ValueError(
                f"VLLM_REDRAFTER_CUDA_ARCHS has the entry {entry!r}; it must be a list such as "
                f"{DEFAULT_ARCHITECTURES!r}."
            )
        if (int(found[1]), int(found[2])) < OLDEST:
            raise ValueError(
                f"VLLM_REDRAFTER_CUDA_ARCHS has the entry {entry!r}; the kernels need compute "
                f"capability {OLDEST[0]}.{OLDEST[1]} or later."
            )
        number = f"{found[1]}{found[2]}{found[3]}"
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if found[4]:
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def compile_command(
    nvcc: Path,
    source: Path,
    output: Path,
    *,
    csrc: Path,
    torch_include: Path,
    target_version: str,
    archs: str,
    warnings_are_errors: bool,
    extra: tuple[str, ...] = (),
) -> list[str]:
    """The command that compiles one .cu file to an object, with a dependency file beside it."""
    command = [
        str(nvcc), "-c", str(source), "-o", str(output), "-MD", "-MF", f"{output}.d",
        "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-lineinfo",
        "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall",
        "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={target_version}", f"-I{csrc}",
        "-isystem", str(torch_include),
        "-isystem", str(torch_include / "torch/csrc/api/include"),
        *gencode(archs), *extra,
    ]  # fmt: skip
    if warnings_are_errors:
        command += ["-Werror", "all-warnings"]
    return command


def link_flags(nvcc: Path) -> list[str]:
    """What g++ needs to link the objects: the CUDA runtime, statically.

    Raises:
        ValueError: the toolkit has no static runtime.
    """
    # nvcc on the PATH may be a link or a script; it knows best where its toolkit is.
    dry = subprocess.run(
        [str(nvcc), "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
    )
    found = re.search(r"TOP=(\S+)", dry.stderr + dry.stdout)
    home = (Path(found[1]) if found else nvcc.resolve().parent.parent).resolve()
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        library = home / folder / "libcudart_static.a"
        if library.is_file():
            return [str(library), "-lrt", "-ldl", "-lpthread"]
    raise ValueError(f"The CUDA toolkit in {home} has no libcudart_static.a: install it in full.")
