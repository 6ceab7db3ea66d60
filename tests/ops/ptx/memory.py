# SPDX-License-Identifier: Apache-2.0
"""Memory that knows its bounds, and who touched what since the last barrier."""

from __future__ import annotations

import ctypes

import numpy as np

LANES = (1 << 21) - 1  # a thread of a launch
MANY_LANES, MANY_WARPS, MANY_BLOCKS = 1 << 21, 1 << 22, 1 << 23
WHO = (1 << 24) - 1
WARP_TIMES, TIME_SHIFT, WARP_SHIFT = (1 << 16) - 1, 40, 24


class Fault(RuntimeError):
    """What a kernel must not do; the message says where."""


class Shadow:
    """The last write and the last reads of every granule of one memory, for races.

    Lanes of a warp that write the same value with one instruction do not race.

    Two accesses by different threads, at least one of them a write, are ordered by a barrier of
    the block between them or, within a warp, by ``bar.warp.sync``; blocks by nothing. A stamp holds
    the block's time (its barriers), the warp's time, flags of reads and the thread.
    """

    def __init__(self, granules: int, block_threads: int) -> None:
        self.wrote = np.zeros(granules, np.int64)
        self.read = np.zeros(granules, np.int64)
        self.threads = block_threads

    def _conflicts(self, before: np.ndarray, mine: np.ndarray) -> np.ndarray:
        """Whether an access that left stamp ``before`` is not ordered before this one."""
        same_time = before >> TIME_SHIFT == mine >> TIME_SHIFT
        lane, me = before & LANES, mine & LANES
        other_warp = (lane >> 5 != me >> 5) | (before & (MANY_WARPS | MANY_BLOCKS) != 0)
        same_warp_time = (before ^ mine) >> WARP_SHIFT & WARP_TIMES == 0
        other_lane = (lane != me) | (before & MANY_LANES != 0)
        unordered = same_time & (other_warp | (same_warp_time & other_lane))
        other_block = (lane // self.threads != me // self.threads) | (before & MANY_BLOCKS != 0)
        return (before != 0) & (unordered | other_block)

    def write(self, at: np.ndarray, mine: np.ndarray) -> bool:
        """Whether it races. ``at``: granules, ``mine``: stamps, of one shape."""
        races = self._conflicts(self.wrote[at], mine).any()
        races |= self._conflicts(self.read[at], mine).any()
        self.wrote[at] = mine
        races |= ((self.wrote[at] ^ mine) & LANES >= 32).any()  # at once, by another warp
        return bool(races)

    def note_read(self, at: np.ndarray, mine: np.ndarray) -> bool:
        """Whether it races."""
        races = self._conflicts(self.wrote[at], mine).any()
        before = self.read[at]
        if before.any():
            self.read[at] = self._joined(before, mine)
        else:
            self.read[at] = mine
        after = self.read[at]
        lost = (after ^ mine) & LANES != 0
        if lost.any():  # several lanes read the same
            self.read[at[lost]] = self._joined(after[lost], mine[lost])
        return bool(races)

    def _joined(self, before: np.ndarray, mine: np.ndarray) -> np.ndarray:
        lane, me = before & LANES, mine & LANES
        known = before != 0
        other_block = lane // self.threads != me // self.threads
        blocks = known & (other_block | (before & MANY_BLOCKS != 0))
        same_time = known & (before >> TIME_SHIFT == mine >> TIME_SHIFT)
        warps = same_time & ((lane >> 5 != me >> 5) | (before & MANY_WARPS != 0))
        same_warp_time = same_time & ((before ^ mine) >> WARP_SHIFT & WARP_TIMES == 0)
        lanes = same_warp_time & ((lane != me) | (before & MANY_LANES != 0))
        return mine | blocks * MANY_BLOCKS | warps * MANY_WARPS | lanes * MANY_LANES


class Region:
    """One allocation of global memory, at its real address."""

    def __init__(self, address: int, size: int) -> None:
        self.begin, self.end = address, address + size
        self.bytes = np.frombuffer((ctypes.c_char * size).from_address(address), np.uint8)
        self.shadow: Shadow | None = None
        self._views: dict[int, np.ndarray] = {}

    def words(self, size: int) -> np.ndarray:
        """The memory as unsigned integers of ``size`` bytes."""
        if size not in self._views:
            whole = len(self.bytes) // size * size
            self._views[size] = self.bytes[:whole].view(f"u{size}")
        return self._views[size]


class GlobalMemory:
    """The allocations that kernels may touch."""

    def __init__(self) -> None:
        self.regions: list[Region] = []

    def add(self, address: int, size: int) -> None:
        if size and not any(r.begin <= address and address + size <= r.end for r in self.regions):
            self.regions.append(Region(address, size))

    def forget_accesses(self) -> None:
        """Launches are ordered."""
        for region in self.regions:
            region.shadow = None

    def split(self, address: np.ndarray, size: int) -> list[tuple[Region, np.ndarray | slice]]:
        """The regions of accesses of ``size`` bytes, and which accesses fall into each.

        Raises:
            Fault: an access outside all of them.
        """
        low, high = int(address.min()), int(address.max()) + size
        for region in self.regions:
            if region.begin <= low and high <= region.end:
                return [(region, slice(None))]
        found, left = [], np.ones(len(address), bool)
        for region in self.regions:
            mine = left & (address >= region.begin) & (address + size <= region.end)
            if mine.any():
                found.append((region, np.flatnonzero(mine)))
                left &= ~mine
        if left.any():
            raise Fault(f"{int(left.sum())} accesses out of bounds of global memory")
        return found
