# SPDX-License-Identifier: Apache-2.0
"""RAPL's counters from a folder that looks like Linux's."""

import pytest

from vllm_redrafter.bench.energy import joules_between, read_counters


def zone(root, name, kind, energy, most=1000):
    (root / name).mkdir()
    (root / name / "name").write_text(kind + "\n")
    (root / name / "energy_uj").write_text(f"{energy}\n")
    (root / name / "max_energy_range_uj").write_text(f"{most}\n")


def test_packages_count_once(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 500)
    zone(tmp_path, "intel-rapl:0:0", "core", 400)
    zone(tmp_path, "intel-rapl:1", "package-1", 7)
    zone(tmp_path, "intel-rapl:2", "psys", 900)
    assert read_counters(tmp_path) == {"intel-rapl:0": (500, 1000), "intel-rapl:1": (7, 1000)}


def test_a_counter_starts_again():
    before = {"a": (900_000, 1_000_000), "b": (5, 1_000_000)}
    after = {"a": (100_000, 1_000_000), "b": (300_005, 1_000_000)}
    assert joules_between(before, after) == pytest.approx(0.2 + 0.3)


def test_nothing_where_nothing_is_told(tmp_path):
    assert read_counters(tmp_path / "none") == {}
    assert joules_between({}, {}) is None
    assert joules_between({}, {"a": (1, 2)}) is None
    zone(tmp_path, "intel-rapl:0", "package-0", "no number")
    assert read_counters(tmp_path) == {}
