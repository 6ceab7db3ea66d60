# SPDX-License-Identifier: Apache-2.0
"""What each PTX instruction does, for all lanes at once.

``bind(machine, instruction)`` gives a function of the mask of lanes that take part (True: all).
Only what nvcc makes of this project's kernels is known; anything else is a NotImplementedError.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .counting import bank_conflicts, sectors
from .machine import LOCAL, PARAM, SHARED, Copy, Machine
from .memory import Fault
from .parse import SIZES, Instruction

Effect = Callable[[object], None]
_KIND = {"b": "u", "u": "u", "s": "i", "f": "f"}


def dtype_of(kind: str) -> np.dtype:
    if kind == "pred":
        return np.dtype(bool)
    return np.dtype(f"{_KIND[kind[0]]}{SIZES[kind]}")


def source(machine: Machine, text: str, dtype: np.dtype):
    """An array over lanes, or a scalar."""
    if text.startswith("%"):
        bits = machine.register(text)
        if bits.dtype == dtype:
            return bits
        if bits.dtype != bool and bits.dtype.itemsize >= dtype.itemsize:
            return bits.view(dtype)[:: bits.dtype.itemsize // dtype.itemsize]  # the low part
        raise ValueError(f"{text} is read as {dtype}")
    if text[:2] in ("0f", "0d"):
        bits = np.dtype(f"u{4 if text[1] == 'f' else 8}").type(int(text[2:], 16))
        return bits.view(dtype)
    if re.match(r"-?\d", text):
        value = int(text, 0)
        if dtype.kind == "b":
            return np.bool_(value)
        return np.array([value & (1 << 8 * dtype.itemsize) - 1], f"u{dtype.itemsize}").view(dtype)
    return np.array([_symbol(machine, text, dtype.itemsize)], f"u{dtype.itemsize}").view(dtype)


def _symbol(machine: Machine, name: str, size: int) -> int:
    kernel = machine.kernel
    if name in kernel.params:
        return PARAM + kernel.params[name][0]
    if name in kernel.local:
        return LOCAL + kernel.local[name]
    # What is not a static variable is the block's dynamic shared memory, behind them.
    offset = kernel.shared.get(name, -(-kernel.static_bytes // 16) * 16)
    return offset if size == 4 else SHARED + offset


def target(machine: Machine, text: str, dtype: np.dtype) -> np.ndarray:
    """The array that holds a register, as ``dtype`` or, where it is wider, as wide as it is."""
    bits = machine.register(text)
    if bits.dtype == bool:
        return bits
    if bits.dtype.itemsize == dtype.itemsize:
        return bits.view(dtype)
    if dtype.kind == "f":
        raise ValueError(f"{text} cannot hold {dtype}")
    return bits.view(f"{dtype.kind}{bits.dtype.itemsize}")


def put(to: np.ndarray, value, mask) -> None:
    np.copyto(to, value, where=mask, casting="unsafe")


def names_in(text: str) -> list[str]:
    """``{%r1, %r2}`` or one name."""
    return [name.strip() for name in text.strip("{}").split(",")]


# ---- arithmetic ---------------------------------------------------------------------------------


def _truncated_quotient(a, b):
    if np.asarray(a).dtype.kind == "u":
        return a // b
    return (a - np.fmod(a, b)) // b


def _fused(a, b, c):
    if a.dtype.itemsize == 8:
        return a * b + c
    return (a.astype("f8") * b + c).astype("f4")


def _towards(exact: np.ndarray, rounding: str) -> np.ndarray:
    """float64 to float32, rounded down or to zero."""
    near = exact.astype("f4")
    if rounding == "rm":
        return np.where(near > exact, np.nextafter(near, np.float32(-np.inf)), near)
    return np.where(np.abs(near) > np.abs(exact), np.nextafter(near, np.float32(0)), near)


def _leading_zeros(a):
    return np.where(a == 0, 0xFFFFFFFF, 32 - np.frexp(a.astype("f8"))[1]).astype("u4")


_REVERSED = np.array([int(f"{i:08b}"[::-1], 2) for i in range(256)], np.uint8)


def _reversed_bits(a):
    return _REVERSED[a.view(np.uint8).reshape(-1, 4)][:, ::-1].copy().view("u4")[:, 0]


_SIMPLE: dict[str, Callable] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative, "abs": np.abs,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "rem": np.fmod, "mad": lambda a, b, c: a * b + c, "div": _truncated_quotient, "fma": _fused,
    "ex2": np.exp2, "sqrt": np.sqrt, "rcp": lambda a: (1 / a).astype(a.dtype),
    "copysign": lambda a, b: np.copysign(b, a), "brev": _reversed_bits,
    "popc": lambda a: np.bitwise_count(a).astype("u4"), "bfind": _leading_zeros,
}  # fmt: skip


def _arithmetic(machine: Machine, i: Instruction) -> Effect:
    name, dtype = i.parts[0], dtype_of(i.parts[-1])
    to = target(machine, i.operands[0], dtype)
    given = [source(machine, text, dtype) for text in i.operands[1:]]
    if name in ("min", "max"):
        floats, ints = (np.fmin, np.minimum) if name == "min" else (np.fmax, np.maximum)
        function = floats if dtype.kind == "f" else ints
    elif name == "div" and dtype.kind == "f":
        function = np.divide
    elif "rm" in i.parts or "rz" in i.parts:
        rounding = "rm" if "rm" in i.parts else "rz"
        exactly = {"fma": lambda a, b, c: a * b + c, "add": np.add}[name]

        def rounded(m) -> None:
            exact = exactly(*(value.astype("f8") for value in given))
            put(to, _towards(exact, rounding), m)

        return rounded
    else:
        function = _SIMPLE[name]
    if isinstance(function, np.ufunc) and to.dtype == dtype:
        return lambda m: function(*given, out=to, where=m)
    return lambda m: put(to, function(*given), m)


def _multiply(machine: Machine, i: Instruction) -> Effect:
    """``mul`` and ``mad``: .wide, .hi or the low half."""
    dtype = dtype_of(i.parts[-1])
    if "wide" not in i.parts and "hi" not in i.parts:
        return _arithmetic(machine, i)
    wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
    a, b = (source(machine, text, dtype) for text in i.operands[1:3])
    if "hi" in i.parts:
        if dtype.itemsize == 8 or i.parts[0] == "mad":
            raise NotImplementedError
        to = target(machine, i.operands[0], dtype)
        return lambda m: put(to, np.multiply(a, b, dtype=wide) >> 8 * dtype.itemsize, m)
    to = target(machine, i.operands[0], wide)
    if i.parts[0] == "mul":
        return lambda m: np.multiply(a, b, out=to, where=m, dtype=wide)
    c = source(machine, i.operands[3], wide)
    return lambda m: put(to, np.multiply(a, b, dtype=wide) + c, m)


def _shift(machine: Machine, i: Instruction) -> Effect:
    dtype = dtype_of(i.parts[-1])
    to, bits = target(machine, i.operands[0], dtype), 8 * dtype.itemsize
    a, by = source(machine, i.operands[1], dtype), source(machine, i.operands[2], np.dtype("u4"))
    left = i.parts[0] == "shl"
    function = np.left_shift if left else np.right_shift
    if by.size == 1:
        amount = int(by[0])
        if amount < bits:
            return lambda m: function(a, dtype.type(amount), out=to, where=m)
        amount = bits - 1
        return lambda m: put(to, 0 if left or dtype.kind == "u" else a >> dtype.type(amount), m)

    def effect(m) -> None:
        clamped = np.minimum(by, bits - 1).astype(dtype)
        shifted = function(a, clamped)
        if left or dtype.kind == "u":
            shifted = np.where(by >= bits, 0, shifted)
        put(to, shifted, m)

    return effect


def _insert(machine: Machine, i: Instruction) -> Effect:
    """bfi: bits of the first operand into the second."""
    dtype = dtype_of(i.parts[-1])
    to = target(machine, i.operands[0], dtype)
    field, base = (source(machine, text, dtype) for text in i.operands[1:3])
    at, length = (int(i.operands[3]), int(i.operands[4]))
    mask = dtype.type(((1 << length) - 1) << at & (1 << 8 * dtype.itemsize) - 1)
    return lambda m: put(to, (base & ~mask) | (field << dtype.type(at) & mask), m)


_COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
            "gt": np.greater, "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal,
            "hi": np.greater, "hs": np.greater_equal}  # fmt: skip
# Comparisons that NaN satisfies: the opposite of one that it does not.
_UNORDERED = {"equ": None, "neu": np.equal, "ltu": np.greater_equal, "leu": np.greater,
              "gtu": np.less_equal, "geu": np.less}  # fmt: skip


def _set_predicate(machine: Machine, i: Instruction) -> Effect:
    name, dtype = i.parts[1], dtype_of(i.parts[-1])
    if len(i.parts) != 3:
        raise NotImplementedError
    to = machine.register(i.operands[0])
    a, b = (source(machine, text, dtype) for text in i.operands[1:])
    if name in ("nan", "num"):
        flip = name == "num"
        return lambda m: put(to, (np.isnan(a) | np.isnan(b)) ^ flip, m)
    if name == "ne" and dtype.kind == "f":
        return lambda m: put(to, (a < b) | (a > b), m)
    if name == "equ":
        return lambda m: put(to, ~((a < b) | (a > b)), m)
    if name in _UNORDERED:
        opposite = _UNORDERED[name]
        return lambda m: put(to, ~opposite(a, b), m)
    compare = _COMPARE[name]
    return lambda m: compare(a, b, out=to, where=m)


def _select(machine: Machine, i: Instruction) -> Effect:
    dtype = dtype_of(i.parts[-1])
    to = target(machine, i.operands[0], dtype)
    a, b = (source(machine, text, dtype) for text in i.operands[1:3])
    choice = machine.register(i.operands[3])
    return lambda m: put(to, np.where(choice, a, b), m)


# ---- moves and conversions ----------------------------------------------------------------------


def _move(machine: Machine, i: Instruction) -> Effect:
    dtype = dtype_of(i.parts[-1])
    to, given = i.operands
    if given.startswith("{"):
        names = names_in(given)
        part = np.dtype(f"u{dtype.itemsize // len(names)}")
        pieces = target(machine, to, dtype).view(part).reshape(machine.n, len(names))
        for_each = [source(machine, name, part) for name in names]

        def pack(m) -> None:
            for k, value in enumerate(for_each):
                put(pieces[:, k], value, m)

        return pack
    if to.startswith("{"):
        names = names_in(to)
        part = np.dtype(f"u{dtype.itemsize // len(names)}")
        pieces = source(machine, given, dtype).view(part).reshape(machine.n, len(names))
        targets = [None if n == "_" else target(machine, n, part) for n in names]

        def unpack(m) -> None:
            for k, register in enumerate(targets):
                if register is not None:
                    put(register, pieces[:, k], m)

        return unpack
    register, value = target(machine, to, dtype), source(machine, given, dtype)
    return lambda m: np.copyto(register, value, where=m)


def _convert_address(machine: Machine, i: Instruction) -> Effect:
    """Global and generic addresses are one; those of other spaces begin elsewhere."""
    dtype = dtype_of(i.parts[-1])
    to, given = target(machine, i.operands[0], dtype), source(machine, i.operands[1], dtype)
    base = {"shared": SHARED, "local": LOCAL}.get(i.parts[-2], 0)
    if base and i.parts[1] == "to":
        return lambda m: put(to, given - np.uint64(base), m)
    if base:
        return lambda m: put(to, np.where(given >= base, given, given + np.uint64(base)), m)
    return lambda m: put(to, given, m)


def widened(bits: np.ndarray, kind: str) -> np.ndarray:
    """uint16 of "bf16" or "f16" to float32."""
    if kind == "bf16":
        return (bits.astype("u4") << 16).view("f4")
    return bits.view("f2").astype("f4")


def narrowed(value: np.ndarray, kind: str) -> np.ndarray:
    """float32 to the nearest "bf16" or "f16", ties to even, as uint16."""
    if kind == "f16":
        return value.astype("f2").view("u2")
    bits = value.view("u4")
    near = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(value), 0x7FFF, near).astype("u2")


def _convert_pair(machine: Machine, i: Instruction) -> Effect:
    """Two float32 to one register; the first operand is the high half."""
    kind = i.parts[-2].removesuffix("x2")
    to = machine.register(i.operands[0])
    high, low = (source(machine, text, np.dtype("f4")) for text in i.operands[1:])

    def effect(m) -> None:
        put(to, narrowed(low, kind) | narrowed(high, kind).astype("u4") << 16, m)

    return effect


def _convert(machine: Machine, i: Instruction) -> Effect:
    halves = ("bf16", "f16")
    if i.parts[-2] in ("bf16x2", "f16x2"):
        return _convert_pair(machine, i)
    to_kind, kind = [p for p in i.parts[1:] if p in SIZES or p in halves]
    if kind in halves and to_kind == "f32":
        to, bits = target(machine, i.operands[0], np.dtype("f4")), machine.register(i.operands[1])
        return lambda m: put(to, widened(bits, kind), m)
    if to_kind in halves and kind == "f32":
        to, value = machine.register(i.operands[0]), source(machine, i.operands[1], np.dtype("f4"))
        return lambda m: put(to, narrowed(value, to_kind), m)
    dtype = dtype_of(to_kind)
    to = target(machine, i.operands[0], dtype)
    value = source(machine, i.operands[1], dtype_of(kind))
    if "sat" in i.parts:
        return lambda m: put(to, np.clip(np.nan_to_num(value, nan=0.0), 0, 1), m)
    if kind[0] == "f" and to_kind[0] != "f":
        whole = np.trunc if "rzi" in i.parts else np.rint
        return lambda m: put(to, whole(value), m)
    return lambda m: put(to, value.astype(dtype), m)


# ---- memory -------------------------------------------------------------------------------------


def address_of(machine: Machine, text: str) -> Callable[[], np.ndarray]:
    """Addresses of ``[%rd1+8]``, int64 over all lanes."""
    found = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
    base, offset = found[1], int(found[2] or 0)
    if base.startswith("%"):
        register = machine.register(base)
        return lambda: register.astype(np.int64) + offset
    constant = np.full(machine.n, _symbol(machine, base, 8) + offset, np.int64)
    return lambda: constant


def _load_or_store(machine: Machine, i: Instruction) -> Effect:
    dtype, size = dtype_of(i.parts[-1]), SIZES[i.parts[-1]]
    parts = i.parts
    if parts[0] == "ld":
        address = address_of(machine, i.operands[1])
        targets = [target(machine, name, dtype) for name in names_in(i.operands[0])]

        def load(m) -> None:
            data = machine.access(parts, address(), m, size, len(targets)).view(dtype)
            lanes = machine.lanes(m)
            for k, register in enumerate(targets):
                register[lanes] = data[:, k]

        return load
    address = address_of(machine, i.operands[0])
    bits = np.dtype(f"u{size}")
    values = [source(machine, name, bits) for name in names_in(i.operands[1])]

    def store(m) -> None:
        lanes = machine.lanes(m)
        data = np.stack([np.broadcast_to(value, (machine.n,))[lanes] for value in values], 1)
        machine.access(parts, address(), m, size, len(values), data)

    return store


def _copy(machine: Machine, i: Instruction) -> Effect:
    """cp.async: issue, commit, wait."""
    if i.parts[2] == "commit_group":

        def commit(m) -> None:
            machine.groups[machine.lanes(m)] += 1

        return commit
    if i.parts[2] == "wait_group":
        allowed = int(i.operands[0])
        return lambda m: _land(machine, m, allowed)
    shared, address = (address_of(machine, text) for text in i.operands[:2])
    valid = source(machine, i.operands[3], np.dtype("u4"))

    def issue(m) -> None:
        lanes = machine.lanes(m)
        offset, source_at = shared()[lanes], address()[lanes]
        wanted = np.broadcast_to(valid, (machine.n,))[lanes].astype(np.int64)
        at = machine.shared_at(offset, lanes, 16)
        machine.check_aligned(source_at, 16)
        machine.wrote_shared(at, lanes, 16, initialised=False)
        read = wanted > 0
        if read.any():
            machine.memory.split(source_at[read], 16)
            if machine.measure:
                sectors(machine.counts.other, source_at[read], lanes[read], 16, False)
        if machine.measure:
            bank_conflicts(machine.counts.other, offset, lanes, 16)
        machine.copies.append(
            Copy(lanes, machine.groups[lanes], at, source_at, wanted, np.ones(len(lanes), bool))
        )

    return issue


def _land(machine: Machine, m, allowed: int) -> None:
    """The waiting lanes' copies of all but their ``allowed`` last groups."""
    waits = np.zeros(machine.n, bool)
    waits[machine.lanes(m)] = True
    for copy in machine.copies:
        now = copy.left & waits[copy.lanes] & (copy.group < machine.groups[copy.lanes] - allowed)
        if not now.any():
            continue
        lanes, at = copy.lanes[now], copy.shared[now]
        data = np.zeros((len(lanes), 2), np.uint64)
        read = copy.bytes[now] == 16
        if ((copy.bytes[now] != 0) & ~read).any():
            raise NotImplementedError("part of a copy")
        source_at = copy.source[now][read]
        if read.any():
            rows = np.flatnonzero(read)
            for region, chosen in machine.memory.split(source_at, 16):
                index = ((source_at[chosen] - region.begin) // 8)[:, None] + np.arange(2)
                data[rows[chosen]] = region.words(8)[index]
        machine.shared.view("u8")[(at // 8)[:, None] + np.arange(2)] = data
        machine.wrote_shared(at, lanes, 16)
        copy.left &= ~now
    machine.copies = [copy for copy in machine.copies if copy.left.any()]


# ---- warps --------------------------------------------------------------------------------------


def _meeting(machine: Machine, members: str) -> Callable[[object], np.ndarray]:
    """Numbers of the warps that meet; they must be whole, and name all their lanes."""
    named = source(machine, members, np.dtype("u4"))

    def check(m) -> np.ndarray:
        here = np.broadcast_to(named, (machine.n,))
        if not ((here if m is True else here[m]) == 0xFFFFFFFF).all():
            raise Fault("not all lanes of a warp are named")
        return machine.whole_warps(m)

    return check


def _shuffle(machine: Machine, i: Instruction) -> Effect:
    to = machine.register(i.operands[0].split("|")[0])
    inside = machine.register(i.operands[0].split("|")[1]) if "|" in i.operands[0] else None
    value = source(machine, i.operands[1], np.dtype("u4"))
    by, clamp = (source(machine, text, np.dtype("u4")) for text in i.operands[2:4])
    lane, base, mode = machine.lane % 32, machine.lane // 32 * 32, i.parts[2]
    meet = _meeting(machine, i.operands[4])

    def effect(m) -> None:
        meet(m)
        amount = by.astype(np.int64)
        if mode == "bfly":
            of = lane ^ amount
        elif mode == "idx":
            of = np.broadcast_to(amount & 31, lane.shape)
        elif mode == "up":
            of = lane - amount
        else:
            of = lane + amount
        good = (of >= 0) & (of < 32)
        of = np.where(good, of, lane)
        put(to, np.broadcast_to(value, (machine.n,))[base + of], m)
        if inside is not None:
            put(inside, good, m)

    if mode not in ("bfly", "idx", "up", "down") or (np.asarray(clamp) & ~np.uint32(31)).any():
        raise NotImplementedError
    return effect


def _vote(machine: Machine, i: Instruction) -> Effect:
    if i.parts[2] != "ballot":
        raise NotImplementedError
    to, votes = machine.register(i.operands[0]), source(machine, i.operands[1], np.dtype(bool))
    meet = _meeting(machine, i.operands[2])

    def effect(m) -> None:
        meet(m)
        bits = np.broadcast_to(votes, (machine.n,)).reshape(-1, 32)
        words = np.packbits(bits, axis=1, bitorder="little").view("u4")[:, 0]
        put(to, np.repeat(words, 32), m)

    return effect


def _reduction(machine: Machine, i: Instruction) -> Effect:
    if i.parts[1:] != ("sync", "max", "u32"):
        raise NotImplementedError
    to, value = machine.register(i.operands[0]), source(machine, i.operands[1], np.dtype("u4"))
    meet = _meeting(machine, i.operands[2])

    def effect(m) -> None:
        meet(m)
        largest = np.broadcast_to(value, (machine.n,)).reshape(-1, 32).max(1)
        put(to, np.repeat(largest, 32), m)

    return effect


def _warp_barrier(machine: Machine, i: Instruction) -> Effect:
    meet = _meeting(machine, i.operands[0])

    def effect(m) -> None:
        warps = meet(m)
        machine.warp_time[warps] += 1
        machine.counts.other["warp barriers"] += len(warps)

    return effect


def _load_matrices(machine: Machine, i: Instruction) -> Effect:
    """ldmatrix.x4: lane l names row l % 8 of matrix l / 8."""
    if i.parts[3:5] != ("m8n8", "x4"):
        raise NotImplementedError
    targets = [machine.register(name).reshape(-1, 32) for name in names_in(i.operands[0])]
    address, turned = address_of(machine, i.operands[1]), "trans" in i.parts

    def effect(m) -> None:
        warps = machine.whole_warps(m)
        lanes = machine.lanes(m)
        offset = address()[lanes]
        at = machine.shared_at(offset, lanes, 16)
        machine.read_shared(at, lanes, 16)
        if machine.measure:
            bank_conflicts(machine.counts.other, offset, lanes, 16)
        rows = machine.shared.view("u2")[(at // 2)[:, None] + np.arange(8)]
        matrices = rows.reshape(len(warps), 4, 8, 8)
        if turned:
            matrices = matrices.swapaxes(2, 3)
        pairs = np.ascontiguousarray(matrices).view("u4").reshape(len(warps), 4, 32)
        for k, register in enumerate(targets):
            register[warps] = pairs[:, k]

    return effect


def _matrix_product(machine: Machine, i: Instruction) -> Effect:
    """mma.m16n8k16, fragments as the PTX manual draws them; sums in float32."""
    if i.parts[3:6] != ("m16n8k16", "row", "col") or i.parts[6] != "f32":
        raise NotImplementedError
    kind = i.parts[7]
    d, a, b, c = (
        [machine.register(name).reshape(-1, 32) for name in names_in(text)] for text in i.operands
    )

    def halves(registers: list[np.ndarray], warps: np.ndarray) -> np.ndarray:
        """float32 [registers, warps, 8 groups, 4 lanes, 2]"""
        bits = np.stack([register[warps] for register in registers])
        return widened(bits.view("u2"), kind).reshape(len(registers), len(warps), 8, 4, 2)

    def effect(m) -> None:
        warps = machine.whole_warps(m)
        count = len(warps)
        left = halves(a, warps).reshape(2, 2, count, 8, 4, 2)  # column half, row half, ...
        left = left.transpose(2, 1, 3, 0, 4, 5).reshape(count, 16, 16)
        right = halves(b, warps).transpose(1, 0, 3, 4, 2).reshape(count, 16, 8)
        before = np.stack([register[warps].view("f4") for register in c])
        before = before.reshape(2, 2, count, 8, 4).transpose(2, 0, 3, 4, 1)
        result = (left @ right).reshape(count, 2, 8, 4, 2) + before
        result = np.ascontiguousarray(result.transpose(1, 4, 0, 2, 3)).reshape(4, count, 32)
        for k, register in enumerate(d):
            register[warps] = result[k].view("u4")
        machine.counts.other["products"] += count

    return effect


_BINDERS: dict[str, Callable[[Machine, Instruction], Effect]] = {
    "mul": _multiply, "mad": _multiply, "shl": _shift, "shr": _shift, "bfi": _insert,
    "min": _arithmetic, "max": _arithmetic, "setp": _set_predicate, "selp": _select, "mov": _move,
    "cvta": _convert_address, "cvt": _convert, "ld": _load_or_store, "st": _load_or_store,
    "cp": _copy, "shfl": _shuffle, "vote": _vote, "redux": _reduction, "bar": _warp_barrier,
    "ldmatrix": _load_matrices, "mma": _matrix_product,
}  # fmt: skip


def bind(machine: Machine, instruction: Instruction) -> Effect:
    """What the instruction does to the machine's lanes.

    Raises:
        KeyError, ValueError, NotImplementedError: it is not known.
    """
    name = instruction.parts[0]
    return _BINDERS.get(name, _arithmetic)(machine, instruction)
