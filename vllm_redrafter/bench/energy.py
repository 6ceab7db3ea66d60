# SPDX-License-Identifier: Apache-2.0
"""Energy of the processor packages, from Linux' RAPL counters, where they may be read.

``/sys/class/powercap/intel-rapl:N/energy_uj`` (Intel and AMD) counts microjoules of a package and
starts again at ``max_energy_range_uj``. Usually only root may read it, and virtual machines have
none; then nothing is reported. Source: Documentation/power/powercap/powercap.rst of Linux.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

RAPL = Path("/sys/class/powercap")

# Microjoules and the value at which the counter starts again, by zone.
Counters = dict[str, tuple[int, int]]


def read_counters(root: Path = RAPL) -> Counters:
    """The counters of all packages now; {} where none can be read."""
    found: Counters = {}
    for zone in sorted(root.glob("intel-rapl:*")):
        try:
            # Zones below a package, and the platform's, count the same energy again.
            if not (zone / "name").read_text().startswith("package"):
                continue
            energy = int((zone / "energy_uj").read_text())
            found[zone.name] = (energy, int((zone / "max_energy_range_uj").read_text()))
        except (OSError, ValueError):
            continue
    return found


def joules_between(before: Mapping[str, tuple[int, int]], after: Counters) -> float | None:
    """Energy of all packages in between; None where nothing was counted.

    A counter that started again is taken to have done so once.
    """
    if not after or before.keys() != after.keys():
        return None
    used = 0
    for zone, (now, most) in after.items():
        gained = now - before[zone][0]
        used += gained if gained >= 0 else gained + most
    return used / 1e6
