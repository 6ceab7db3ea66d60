# SPDX-License-Identifier: Apache-2.0
"""The PTX interpreter computes what the manual says, and sees every kind of bug it looks for."""

from __future__ import annotations

import numpy as np
import pytest
from ptx.machine import Counts, Launch, run
from ptx.memory import Fault, GlobalMemory
from ptx.parse import parse

TEXT = """.version 9.0
.target sm_90
.visible .entry toy(
	.param .u64 toy_param_0
)
{{
	.reg .b32 %r<9>;
	.shared .align 16 .b8 buffer[{shared}];
	ld.param.u64 %rd1, [toy_param_0];
	cvta.to.global.u64 %rd2, %rd1;
	mov.u32 %r1, %tid.x;
	mov.u32 %r2, buffer;
	shl.b32 %r3, %r1, 2;
	cvt.u64.u32 %rd3, %r3;
	add.s64 %rd4, %rd2, %rd3;
	add.s32 %r4, %r2, %r3;
{body}
	ret;
}}
"""
"""%r1: thread, %rd2: data, %rd4: the thread's word of data, %r4: its word of shared memory."""


def toy(
    body: str, data: np.ndarray, threads: int = 64, blocks: int = 1, shared: int = 256
) -> Counts:
    kernel = parse(TEXT.format(body=body, shared=shared))["toy"]
    memory = GlobalMemory()
    memory.add(data.ctypes.data, data.nbytes)
    params = int(data.ctypes.data).to_bytes(8, "little")
    return run(Launch(kernel, (blocks, 1, 1), (threads, 1, 1), 0, params), memory, measure=True)


def words(count: int = 64) -> np.ndarray:
    """0, 1, ... from the start of a sector on."""
    memory = np.zeros(count + 8, np.uint32)
    aligned = memory[-memory.ctypes.data % 32 // 4 :][:count]
    aligned[:] = np.arange(count)
    return aligned


def test_loops_of_different_lengths():
    """Every thread sums the numbers up to its own."""
    data = words()
    counts = toy(
        """mov.u32 %r5, 0;
        mov.u32 %r6, 0;
    $L_loop:
        setp.gt.u32 %p1, %r6, %r1;
        @%p1 bra $L_end;
        add.s32 %r5, %r5, %r6;
        add.s32 %r6, %r6, 1;
        bra.uni $L_loop;
    $L_end:
        st.global.u32 [%rd4], %r5;""",
        data,
    )
    assert data.tolist() == [n * (n + 1) // 2 for n in range(64)]
    # Around the loop 12; its longest threads go round 32 and 64 times and look once more.
    assert counts.instructions() == 2 * 12 + 2 * (33 + 65) + 3 * (32 + 64)


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("div.s32 %r5, %r6, 3", lambda n: int(-n / 3)),
        ("rem.s32 %r5, %r6, 3", lambda n: -(n % 3)),
        ("shr.s32 %r5, %r6, 2", lambda n: -n >> 2),
        ("shr.u32 %r5, %r6, 2", lambda n: (-n & 0xFFFFFFFF) >> 2),
        ("shl.b32 %r5, %r6, %r1", lambda n: -n << n if n < 32 else 0),
        ("mul.hi.s32 %r5, %r6, 1431655766", lambda n: -n * 1431655766 >> 32),
        ("popc.b32 %r5, %r1", lambda n: n.bit_count()),
        ("brev.b32 %r5, %r1", lambda n: int(f"{n:032b}"[::-1], 2)),
        ("bfind.shiftamt.u32 %r5, %r1", lambda n: 32 - n.bit_length() if n else -1),
        ("min.u32 %r5, %r6, 7", lambda n: min(-n & 0xFFFFFFFF, 7)),
        ("mad.lo.s32 %r5, %r6, %r6, 1", lambda n: n * n + 1),
        ("selp.b32 %r5, 5, %r1, %p2", lambda n: 5 if n > 9 else n),
        ("not.b32 %r5, %r1", lambda n: ~n),
    ],
)
def test_arithmetic(operation, expected):
    data = words()
    toy(f"setp.gt.s32 %p2, %r1, 9; neg.s32 %r6, %r1; {operation}; st.global.u32 [%rd4], %r5;", data)
    assert data.tolist() == [expected(n) & 0xFFFFFFFF for n in range(64)]


@pytest.mark.parametrize(
    ("address", "message"),
    [("[%rd2+256]", "out of bounds of global"), ("[%rd2+-4]", "out of bounds of global"),
     ("[%rd4+2]", "misaligned")],
)  # fmt: skip
def test_wild_global_addresses(address, message):
    with pytest.raises(Fault, match=f"{message}.*ld.global.u32"):
        toy(f"ld.global.u32 %r5, {address};", words())


def test_shared_memory_without_contents_or_outside():
    with pytest.raises(Fault, match="uninitialised shared"):
        toy("ld.shared.u32 %r5, [%r4];", words())
    with pytest.raises(Fault, match="out of bounds of shared"):
        toy("st.shared.u32 [%r4], %r1;", words(), shared=252)


EXCHANGE = """st.shared.u32 [%r4], %r1;
    {barrier}
    xor.b32 %r5, %r1, {other};
    shl.b32 %r5, %r5, 2;
    add.s32 %r5, %r5, %r2;
    ld.shared.u32 %r6, [%r5];
    {second}
    st.shared.u32 [%r4], %r6;
    st.global.u32 [%rd4], %r6;"""


@pytest.mark.parametrize("other", [1, 33])
def test_missing_barriers_are_races(other):
    """Lane 1 is of the same warp, 33 of the other one."""
    right = [n ^ other for n in range(64)]
    for barrier in ("bar.sync 0;", "bar.warp.sync -1;"):
        good = {"barrier": barrier, "second": barrier, "other": other}
        data = words()
        if barrier.startswith("bar.warp") and other == 33:
            with pytest.raises(Fault, match="race for shared memory"):
                toy(EXCHANGE.format(**good), data)
            continue
        toy(EXCHANGE.format(**good), data)
        assert data.tolist() == right
        with pytest.raises(Fault, match=r"race for shared memory \(read\)"):
            toy(EXCHANGE.format(**good | {"barrier": ""}), words())
        with pytest.raises(Fault, match=r"race for shared memory \(write\)"):
            toy(EXCHANGE.format(**good | {"second": ""}), words())


def test_blocks_are_not_ordered():
    body = "bar.sync 0; {}.global.u32 {};"
    toy("st.global.u32 [%rd4], %r1;", words())
    with pytest.raises(Fault, match=r"race for global memory \(write\)"):
        toy("st.global.u32 [%rd4], %r1;", words(), blocks=2)
    with pytest.raises(Fault, match=r"race for global memory \(write\)"):
        toy(body.format("ld", "%r5, [%rd4]") + "st.global.u32 [%rd4], %r5;", words(), blocks=2)


def test_equal_writes_of_a_warp_do_not_race():
    toy("st.global.u32 [%rd2], 7;", words(), threads=32)
    with pytest.raises(Fault, match="different values"):
        toy("st.global.u32 [%rd2], %r1;", words(), threads=32)
    with pytest.raises(Fault, match="race"):  # of two warps
        toy("st.global.u32 [%rd2], 7;\n setp.gt.u32 %p1, %r1, 31;\n @%p1 st.global.u32 [%rd2], 8;",
            words())  # fmt: skip


def test_barriers_and_warps_that_do_not_meet():
    half = "setp.lt.u32 %p1, %r1, {};\n @%p1 bra $L_one;\n"
    with pytest.raises(Fault, match="waits at two barriers"):
        toy(half.format(32) + "bar.sync 0;\n ret;\n $L_one:\n bar.sync 0;", words())
    with pytest.raises(Fault, match="lanes of a warp are elsewhere"):
        toy(half.format(16) + "vote.sync.ballot.b32 %r5, %p1, -1;\n $L_one:", words())
    with pytest.raises(Fault, match="not all lanes"):
        toy("vote.sync.ballot.b32 %r5, %p1, 65535;", words())


def test_lanes_that_come_later_are_waited_for():
    """Some lanes take a longer way to the vote."""
    data = words()
    toy(
        """setp.lt.u32 %p1, %r1, 40;
        @%p1 bra $L_vote;
        bra.uni $L_detour;
    $L_vote:
        vote.sync.ballot.b32 %r5, %p1, -1;
        st.global.u32 [%rd4], %r5;
        ret;
    $L_detour:
        bra.uni $L_vote;""",
        data,
    )
    assert set(data[:32].tolist()) == {0xFFFFFFFF} and set(data[32:].tolist()) == {0xFF}


def test_shuffles():
    for mode, by, of in (("bfly", 5, lambda n: n ^ 5), ("idx", 3, lambda n: n // 32 * 32 + 3),
                         ("up", 1, lambda n: n - 1 if n % 32 else n),
                         ("down", 2, lambda n: n + 2 if n % 32 < 30 else n)):  # fmt: skip
        data = words()
        toy(f"shfl.sync.{mode}.b32 %r5|%p1, %r1, {by}, 31, -1; st.global.u32 [%rd4], %r5;", data)
        assert data.tolist() == [of(n) for n in range(64)]


COPY = """shl.b32 %r5, %r1, 4;
    add.s32 %r6, %r2, %r5;
    cvt.u64.u32 %rd5, %r5;
    add.s64 %rd6, %rd2, %rd5;
    cp.async.cg.shared.global [%r6], [%rd6], 16, 16;
    cp.async.commit_group;
    {wait}
    ld.shared.u32 %r7, [{from_}];"""


def test_asynchronous_copies_arrive_when_they_are_waited_for():
    data = words(256)
    wait = "cp.async.wait_group 0;"
    toy(COPY.format(wait=wait, from_="%r6"), data, shared=1024)
    toy(COPY.format(wait=wait + "bar.sync 0;", from_="%r2"), data, shared=1024)
    for too_soon in ("", "cp.async.wait_group 1;", "bar.sync 0;"):
        with pytest.raises(Fault, match="uninitialised"):
            toy(COPY.format(wait=too_soon, from_="%r6"), data, shared=1024)
    with pytest.raises(Fault, match="race"):
        toy(COPY.format(wait=wait, from_="%r2"), data, shared=1024)


@pytest.mark.parametrize(("stride", "sectors", "wavefronts"), [(1, 4, 1), (2, 8, 2), (32, 32, 32)])
def test_counts(stride, sectors, wavefronts):
    counts = toy(
        f"""mul.lo.s32 %r5, %r1, {4 * stride};
        add.s32 %r6, %r2, %r5;
        st.shared.u32 [%r6], %r1;
        cvt.u64.u32 %rd5, %r5;
        add.s64 %rd6, %rd2, %rd5;
        ld.global.u32 %r7, [%rd6];""",
        words(32 * 32), threads=32, shared=4096,
    )  # fmt: skip
    assert counts.other["sectors of loads"] == sectors
    assert counts.other["shared wavefronts"] == wavefronts
    assert counts.other["shared without conflicts"] == 1
    assert counts.instructions() == counts.most_of_a_block == 15


def test_unknown_instructions_are_named():
    with pytest.raises(NotImplementedError, match="atom.global.add.u32"):
        toy("atom.global.add.u32 %r5, [%rd4], 1;", words())
