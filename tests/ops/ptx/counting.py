# SPDX-License-Identifier: Apache-2.0
"""What a warp's accesses cost, as NVIDIA says: sectors of 32 bytes, wavefronts of shared memory."""

from __future__ import annotations

from collections import Counter

import numpy as np

SECTOR, BANKS = 32, 32


def _groups(lanes: np.ndarray, per_group: int) -> np.ndarray:
    """Numbers 0, 1, ... of the groups of ``per_group`` neighbouring lanes."""
    return np.unique(lanes // per_group, return_inverse=True)[1]


def sectors(
    counts: Counter, address: np.ndarray, lanes: np.ndarray, size: int, store: bool
) -> None:
    """Distinct sectors of each warp's access of ``size`` bytes a lane."""
    warp = _groups(lanes, 32)
    first, last = address // SECTOR, (address + size - 1) // SECTOR
    touched = np.unique(np.stack([np.tile(warp, 2), np.concatenate([first, last])], 1), axis=0)
    kind = "stores" if store else "loads"
    counts[f"global {kind}"] += int(warp.max()) + 1
    counts[f"sectors of {kind}"] += len(touched)


def bank_conflicts(counts: Counter, offset: np.ndarray, lanes: np.ndarray, size: int) -> None:
    """Wavefronts of shared accesses, and how many there would be without conflicts.

    A quarter (16 bytes a lane), half (8) or all of a warp goes at once; a bank gives one 4-byte
    word in a wavefront.
    """
    group = _groups(lanes, 32 if size <= 4 else 16 if size == 8 else 8)
    words = offset[:, None] // 4 + np.arange(max(size // 4, 1))
    pairs = np.unique(np.stack([np.repeat(group, words.shape[1]), words.ravel()], 1), axis=0)
    of_bank = np.bincount(pairs[:, 0] * BANKS + pairs[:, 1] % BANKS)
    of_bank.resize((int(group.max()) + 1) * BANKS, refcheck=False)
    counts["shared wavefronts"] += int(of_bank.reshape(-1, BANKS).max(1).sum())
    counts["shared without conflicts"] += int(group.max()) + 1
