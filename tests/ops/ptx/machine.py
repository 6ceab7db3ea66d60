# SPDX-License-Identifier: Apache-2.0
"""A grid of blocks in lockstep: of all threads those at the lowest instruction go first.

Nothing is timed. Asynchronous copies arrive when they are waited for, shared memory starts without
contents, warps must be whole where CUDA demands it. Counts are of PTX: what ptxas makes of it has
other numbers, but not fewer loads, products or barriers.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .counting import bank_conflicts, sectors
from .memory import TIME_SHIFT, WARP_SHIFT, Fault, GlobalMemory, Shadow
from .parse import SIZES, Instruction, Kernel

# Where generic addresses of other spaces begin: above all addresses of the host.
SHARED, LOCAL, PARAM = 1 << 50, 1 << 51, 1 << 52
LANES_AT_ONCE = 1 << 13
MOST_STEPS = 20_000_000
BRANCH, RETURN, BARRIER = 1, 2, 3
MEETINGS = ("shfl", "vote", "redux", "mma", "ldmatrix")
CONTROL = {"bra": BRANCH, "ret": RETURN, "exit": RETURN, "bar": BARRIER}


@dataclass
class Launch:
    kernel: Kernel
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    params: bytes

    @property
    def threads(self) -> int:
        return math.prod(self.block)


@dataclass
class Counts:
    """Of one launch. ``issued``: warp instructions by position in the kernel."""

    issued: np.ndarray
    most_of_a_block: int = 0
    other: Counter = field(default_factory=Counter)

    def instructions(self) -> int:
        return int(self.issued.sum())


@dataclass
class Copy:
    """One cp.async of some lanes, under way."""

    lanes: np.ndarray
    group: np.ndarray  # number of the lane's group
    shared: np.ndarray  # bytes, in all blocks' shared memory
    source: np.ndarray
    bytes: np.ndarray
    left: np.ndarray


class Machine:
    """Some blocks of a launch."""

    def __init__(
        self, launch: Launch, memory: GlobalMemory, first_block: int, blocks: int,
        counts: Counts, measure: bool,
    ) -> None:  # fmt: skip
        from .instructions import bind

        kernel, threads = launch.kernel, launch.threads
        self.bind, self.kernel, self.launch, self.memory = bind, kernel, launch, memory
        self.counts, self.measure = counts, measure
        self.n = blocks * threads
        self.lane = np.arange(self.n)
        self.block = self.lane // threads
        self.params = np.frombuffer(launch.params.ljust(kernel.param_bytes + 8, b"\0"), np.uint8)
        self.registers: dict[str, np.ndarray] = {}
        self._special(first_block)
        # Shared memory of all blocks, one behind the other.
        self.shared_bytes = kernel.static_bytes
        if launch.shared_bytes:  # behind the static variables
            self.shared_bytes = -(-kernel.static_bytes // 16) * 16 + launch.shared_bytes
        self.shared_stride = -(-max(self.shared_bytes, 1) // 16) * 16
        self.shared = np.full(blocks * self.shared_stride, 0xFF, np.uint8)
        self.granule = _granule(kernel)
        granules = len(self.shared) // self.granule
        self.initialised = np.zeros(granules, bool)
        self.shadow = Shadow(granules, threads)
        self.local = np.full(self.n * max(kernel.local_bytes, 16), 0xFF, np.uint8)
        self.time = 1
        self.warp_time = np.zeros(-(-self.n // 32), np.int64)
        self.thread = self.lane + first_block * threads  # in the launch
        self.issued = 0  # instructions of the group that runs
        self.per_block = np.zeros(blocks, np.int64)  # warp instructions
        self.block_warps = np.zeros(blocks, np.int64)  # of the group that runs
        self.copies: list[Copy] = []
        self.groups = np.zeros(self.n, np.int64)  # committed

    def _special(self, first_block: int) -> None:
        (bx, by, _), (gx, gy, _) = self.launch.block, self.launch.grid
        thread = self.lane % self.launch.threads
        block = self.block + first_block
        values = {"tid": (thread % bx, thread // bx % by, thread // (bx * by)),
                  "ctaid": (block % gx, block // gx % gy, block // (gx * gy)),
                  "ntid": self.launch.block, "nctaid": self.launch.grid}  # fmt: skip
        for name, axes in values.items():
            for axis, value in zip("xyz", axes, strict=True):
                self.registers[f"%{name}.{axis}"] = np.broadcast_to(
                    np.asarray(value, np.uint32), (self.n,)
                ).copy()

    # ---- control ------------------------------------------------------------------------------

    def run(self) -> None:
        """Until all threads have returned.

        Raises:
            Fault: an access, a barrier or a warp that must not be; the instruction is named.
        """
        code, labels = self.kernel.code, self.kernel.labels
        control = [CONTROL.get(i.parts[0], 0) if i.parts[:2] != ("bar", "warp") else 0
                   for i in code]  # fmt: skip
        meets = [i.parts[0] in MEETINGS or i.parts[:2] == ("bar", "warp") for i in code]
        bound: list = [None] * len(code)
        self.waiting: dict[int, np.ndarray] = {0: np.ones(self.n, bool)}
        self.blocked: dict[int, np.ndarray] = {}
        self.held: dict[int, np.ndarray] = {}
        pc, steps = self._next_group(), 0
        following = min(self.waiting, default=len(code) + 1)
        with np.errstate(all="ignore"):
            while pc is not None:
                steps += 1
                if steps > MOST_STEPS:
                    raise Fault(f"no end: {code[pc]}")
                instruction = code[pc]
                if meets[pc] and not self.whole:
                    self._hold(pc)
                    pc = self._next_group()
                    following = min(self.waiting, default=len(code) + 1)
                    continue
                self.counts.issued[pc] += self.warps
                self.issued += 1
                mask = self.mask
                if instruction.predicate:
                    chosen = self.predicate(instruction.predicate)
                    mask = mask & ~chosen if instruction.negated else mask & chosen
                kind = control[pc]
                if kind == 0:
                    if bound[pc] is None:
                        bound[pc] = self._bound(instruction)
                    self._execute(bound[pc], instruction, mask)
                    pc += 1
                    if pc < following:
                        continue
                    self._join(pc)
                elif kind == BRANCH:
                    target = labels[instruction.operands[-1]]
                    if not instruction.predicate or (mask == self.mask).all():
                        pc = target
                        if pc < following:
                            continue
                        self._join(pc)
                    elif not mask.any():
                        pc += 1
                        if pc < following:
                            continue
                        self._join(pc)
                    else:
                        self._add(self.waiting, target, mask)
                        self._add(self.waiting, pc + 1, self.mask & ~mask)
                else:
                    if kind == BARRIER:
                        self._add(self.blocked, pc, mask)
                    self._add(self.waiting, pc + 1, self.mask & ~mask)
                pc = self._next_group()
                following = min(self.waiting, default=len(code) + 1)

    def _bound(self, instruction: Instruction):
        try:
            return self.bind(self, instruction)
        except (KeyError, IndexError, ValueError, NotImplementedError) as error:
            raise NotImplementedError(f"{instruction}: {error!r}") from error

    def _execute(self, effect, instruction: Instruction, mask: np.ndarray) -> None:
        try:
            if not instruction.predicate:
                effect(True if self.full else mask)
            elif mask.any():
                effect(mask)
        except Fault as fault:
            raise Fault(f"{fault}: {instruction} in {self.kernel.name}") from None

    def _add(self, groups: dict[int, np.ndarray], pc: int, mask: np.ndarray) -> None:
        if pc in groups:
            groups[pc] = groups[pc] | mask
        elif mask.any():
            groups[pc] = mask

    def _join(self, pc: int) -> None:
        """The group that ran waits at ``pc`` with those that do."""
        self._add(self.waiting, pc, self.mask)

    def _hold(self, pc: int) -> None:
        """Lanes wait for the rest of their warps where all of a warp must meet."""
        here = self.mask | self.held.pop(pc, False)
        whole = np.repeat(here.reshape(-1, 32).all(1), 32)
        self._add(self.waiting, pc, here & whole)
        self._add(self.held, pc, here & ~whole)

    def _next_group(self) -> int | None:
        """The lowest of all waiting groups becomes the one that runs; None at the end."""
        self._flush()
        if not self.waiting:
            self._pass_barrier()
        if not self.waiting:
            return None
        pc = min(self.waiting)
        self.mask = self.waiting.pop(pc)
        self.full = bool(self.mask.all())
        lanes = self.mask.reshape(-1, 32)
        by_warp = lanes.any(1)
        self.whole = self.full or bool((by_warp == lanes.all(1)).all())
        self.warps = int(by_warp.sum())
        threads = self.launch.threads
        self.block_warps = np.add.reduceat(by_warp, np.arange(0, len(by_warp), threads // 32))
        self.issued = 0
        return pc

    def _flush(self) -> None:
        """Count for each block what the group that ran has issued."""
        self.per_block += self.block_warps * self.issued
        self.counts.most_of_a_block = max(self.counts.most_of_a_block, int(self.per_block.max()))

    def _pass_barrier(self) -> None:
        """All that still run wait at a barrier."""
        for pc in self.held:
            raise Fault(f"lanes of a warp are elsewhere: {self.kernel.code[pc]}")
        if len(self.blocked) > 1:
            where = np.full(self.n // self.launch.threads, -1)
            for pc, mask in self.blocked.items():
                here = np.unique(self.block[mask])
                if (where[here] != -1).any():
                    raise Fault(f"a block waits at two barriers in {self.kernel.name}: "
                                f"{self.kernel.code[pc]}")  # fmt: skip
                where[here] = pc
        self.counts.other["barriers"] += sum(
            len(np.unique(self.block[mask])) for mask in self.blocked.values()
        )
        for pc, mask in self.blocked.items():
            self._add(self.waiting, pc + 1, mask)
        self.blocked.clear()
        self.time += 1

    # ---- registers ----------------------------------------------------------------------------

    def register(self, name: str) -> np.ndarray:
        """Bits of a register; its width follows from the letters of its name."""
        if name not in self.registers:
            letters = name.rstrip("0123456789").rstrip(".")
            kind = {"%p": np.bool_, "%rs": np.uint16, "%r": np.uint32, "%f": np.uint32}
            self.registers[name] = np.zeros(self.n, kind.get(letters, np.uint64))
        return self.registers[name]

    def predicate(self, name: str) -> np.ndarray:
        return self.register(name)

    def whole_warps(self, mask) -> np.ndarray:
        """Numbers of the warps that take part.

        Raises:
            Fault: some lanes of a warp are elsewhere.
        """
        if mask is True:
            return np.arange(self.n // 32)
        by_warp = mask.reshape(-1, 32)
        any_lane = by_warp.any(1)
        if not by_warp[any_lane].all():
            raise Fault("lanes of a warp are elsewhere")
        return np.flatnonzero(any_lane)

    # ---- memory -------------------------------------------------------------------------------

    def lanes(self, mask) -> np.ndarray:
        return self.lane if mask is True else np.flatnonzero(mask)

    def stamps(self, lanes: np.ndarray) -> np.ndarray:
        warp_time = self.warp_time[lanes >> 5]
        return self.thread[lanes] | warp_time << WARP_SHIFT | self.time << TIME_SHIFT

    def _granules(self, byte: np.ndarray, size: int) -> np.ndarray:
        return (byte // self.granule)[:, None] + np.arange(max(size // self.granule, 1))

    def shared_at(self, offset: np.ndarray, lanes: np.ndarray, size: int) -> np.ndarray:
        """Bytes in ``shared`` of offsets in each block's.

        Raises:
            Fault: outside the block's shared memory, or not aligned.
        """
        if ((offset < 0) | (offset + size > self.shared_bytes)).any():
            raise Fault("out of bounds of shared memory")
        self.check_aligned(offset, size)
        return offset + self.block[lanes] * self.shared_stride

    def check_aligned(self, address: np.ndarray, size: int) -> None:
        if (address % min(size, 16)).any():
            raise Fault("misaligned")

    def read_shared(self, at: np.ndarray, lanes: np.ndarray, size: int) -> None:
        """What must hold before a read of ``size`` bytes at ``at`` in ``shared``."""
        granules = self._granules(at, size)
        if not self.initialised[granules].all():
            raise Fault("uninitialised shared memory is read")
        stamps = np.broadcast_to(self.stamps(lanes)[:, None], granules.shape)
        if self.shadow.note_read(granules, stamps):
            raise Fault("race for shared memory (read)")

    def wrote_shared(
        self, at: np.ndarray, lanes: np.ndarray, size: int, initialised: bool = True
    ) -> None:
        granules = self._granules(at, size)
        stamps = np.broadcast_to(self.stamps(lanes)[:, None], granules.shape)
        if self.shadow.write(granules, stamps):
            raise Fault("race for shared memory (write)")
        self.initialised[granules] = initialised

    def space_of(self, parts: tuple[str, ...], address: np.ndarray) -> tuple[str, np.ndarray]:
        """The space of an access and addresses in it."""
        for space in ("global", "shared", "local", "param"):
            if space in parts:
                base = {"shared": SHARED, "local": LOCAL, "param": PARAM}.get(space, 0)
                return space, np.where(address >= base, address - base, address)
        for space, base in (("param", PARAM), ("local", LOCAL), ("shared", SHARED)):
            if (address >= base).all():
                return space, address - base
        return "global", address

    def access(
        self, parts: tuple[str, ...], address: np.ndarray, mask, size: int, count: int,
        data: np.ndarray | None = None,
    ) -> np.ndarray:  # fmt: skip
        """A load, or a store of ``data``: ``[lanes of mask, count]`` words of ``size`` bytes."""
        lanes = self.lanes(mask)
        space, address = self.space_of(parts, address[lanes])
        total = size * count
        if data is None:
            data = np.empty((len(lanes), count), f"u{size}")
            store = False
        else:
            store = True
        if space == "global":
            self._global(address, lanes, size, count, data, store)
        elif space == "shared":
            at = self.shared_at(address, lanes, total)
            if self.measure:
                bank_conflicts(self.counts.other, address, lanes, total)
            self._words(self.shared, at, size, count, data, store)
            if store:
                self.wrote_shared(at, lanes, total)
            else:
                self.read_shared(at, lanes, total)
        elif space == "local":
            self.counts.other["local accesses"] += len(np.unique(lanes >> 5))
            at = address + lanes * (len(self.local) // self.n)
            self._words(self.local, at, size, count, data, store)
        else:
            self._words(self.params[: len(self.params) // size * size], address, size, count,
                        data, False)  # fmt: skip
        return data

    @staticmethod
    def _words(memory, at, size, count, data, store) -> None:
        words = memory.view(f"u{size}")
        index = (at // size)[:, None] + np.arange(count)
        if store:
            words[index] = data
            _check_kept(words[index], data)
        else:
            data[:] = words[index]

    def _global(self, address, lanes, size, count, data, store) -> None:
        total = size * count
        self.check_aligned(address, total)
        for region, chosen in self.memory.split(address, total):
            at = address[chosen] - region.begin
            index = (at // size)[:, None] + np.arange(count)
            if store:
                region.words(size)[index] = data[chosen]
                _check_kept(region.words(size)[index], data[chosen])
            else:
                data[chosen] = region.words(size)[index]
            self._race(region, at, lanes[chosen], total, store)
        if self.measure:
            sectors(self.counts.other, address, lanes, total, store)

    def _race(self, region, at, lanes, size, store) -> None:
        if region.shadow is None:
            granules = -(-len(region.bytes) // self.granule)
            region.shadow = Shadow(granules, self.launch.threads)
        granules = self._granules(at, size)
        stamps = np.broadcast_to(self.stamps(lanes)[:, None], granules.shape)
        if region.shadow.write(granules, stamps) if store else region.shadow.note_read(
            granules, stamps
        ):
            raise Fault(f"race for global memory ({'write' if store else 'read'})")


def _check_kept(found: np.ndarray, written: np.ndarray) -> None:
    if (found != written).any():
        raise Fault("race: lanes write different values to one place")


def _granule(kernel: Kernel) -> int:
    """Bytes of the smallest access of a kernel."""
    sizes = [SIZES[i.parts[-1]] for i in kernel.code
             if i.parts[0] in ("ld", "st") and "param" not in i.parts]  # fmt: skip
    return min([*sizes, 8])


def run(launch: Launch, memory: GlobalMemory, measure: bool = False) -> Counts:
    """Run all blocks.

    Args:
        measure: also count sectors and bank conflicts.

    Raises:
        Fault: see ``Machine.run``.
    """
    counts = Counts(np.zeros(len(launch.kernel.code), np.int64))
    blocks = math.prod(launch.grid)
    memory.forget_accesses()
    at_once = max(1, LANES_AT_ONCE // launch.threads)
    for first in range(0, blocks, at_once):
        some = min(at_once, blocks - first)
        Machine(launch, memory, first, some, counts, measure).run()
    return counts
