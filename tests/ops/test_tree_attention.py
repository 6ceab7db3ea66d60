# SPDX-License-Identifier: Apache-2.0
"""The compiled tree_attention against its twin in float64."""

from __future__ import annotations

import random

import pytest
import torch
from paged_cases import (
    LAYOUTS,
    AttentionCase,
    attention_case,
    by_strides,
    layout_maps,
    random_sizes,
)
from torch import Tensor

from vllm_redrafter.ops import reference
from vllm_redrafter.ops import tree_attention as module
from vllm_redrafter.ops.kv_layout import tag
from vllm_redrafter.ops.library import isa
from vllm_redrafter.ops.tree_attention import tree_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Half a unit in the last place of the result, relative, and where half precision is subnormal.
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SMALLEST = {torch.float32: 2**-149, torch.bfloat16: 2**-133, torch.float16: 2**-24}

POISON = -123.0


def run(case: AttentionCase, out: Tensor | None = None) -> Tensor:
    out = torch.full_like(case.query, POISON) if out is None else out
    tree_attention(out, *case.args())
    return out


def weighing_error(case: AttentionCase) -> float:
    """What a weight may be off by, relative to itself.

    A score is a float32 sum of products: its error grows with the sum of their sizes, which
    Cauchy and Schwarz bound, and is the weight's relative error. Where pairs of bfloat16 are
    multiplied, weights are rounded too, by at most 2^-8, and divided by the sum of the rounded
    ones.
    """
    longest = [
        x.float().nan_to_num(0).square().sum(-1).max().sqrt() for x in (case.query, _keys(case))
    ]
    error = 1e-6 + 2**-21 * case.scale * float(longest[0] * longest[1])
    pairs = case.query.dtype == torch.bfloat16 and isa() == "avx512_bf16"
    return error + (2**-7 if pairs else 0)


def _keys(case: AttentionCase) -> Tensor:
    blocks, heads, size, dim = case.key_cache.shape
    regions = case.key_cache.as_strided(
        (blocks, heads, size * dim), (case.key_cache.stride(0), case.key_cache.stride(1), 1)
    )
    return regions[:, :, case.key_map[: size * dim].long()].view(blocks, heads, size, dim)


def excess(case: AttentionCase, out: Tensor) -> float:
    """The largest error, in units of what is allowed; NaN counts as infinite."""
    exact, size = case.exact()
    covered = case.covered()
    dtype = case.query.dtype
    allowed = ROUNDING[dtype] * exact.abs() + weighing_error(case) * size + SMALLEST[dtype]
    ratio = ((out.double() - exact).abs() / allowed)[covered].nan_to_num(nan=torch.inf)
    return float(ratio.max()) if ratio.numel() else 0.0


def check(case: AttentionCase, out: Tensor | None = None) -> None:
    out = run(case, out)
    assert excess(case, out) <= 1.0
    assert (out[~case.covered()] == POISON).all(), "rows of no request were written"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes(dtype, layout, each_isa):
    """Head sizes, groups and block sizes, ragged requests."""
    torch.manual_seed(1)
    for head_dim, kv_heads, group, block_size in [
        (64, 3, 3, 128), (80, 2, 1, 16), (96, 1, 5, 32), (128, 2, 4, 64), (256, 1, 2, 32),
    ]:  # fmt: skip
        check(
            attention_case(
                dtype,
                [77, 0, 130],
                [6, 3, 17],
                head_dim=head_dim,
                kv_heads=kv_heads,
                group=group,
                block_size=block_size,
                layout=layout,
            )  # fmt: skip
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_block_edges(dtype, block_size, each_isa):
    """Contexts that end before, at and after the edges of blocks and of vector tiles."""
    torch.manual_seed(2)
    contexts = [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257]
    for rows in (1, 2, 8):
        check(
            attention_case(
                dtype, contexts, [rows] * len(contexts), kv_heads=2, group=1, block_size=block_size
            )
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows(dtype, each_isa):
    """More rows than a mask word, than a unit of work, and than a tile has keys."""
    torch.manual_seed(3)
    check(attention_case(dtype, [50, 0, 7], [100, 128, 300], kv_heads=2, group=3))


@pytest.mark.parametrize("threads_used", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thread_counts(threads_used, dtype, threads):
    """Keys of one head cut among many threads, and many requests among few."""
    torch.manual_seed(4)
    threads(threads_used)
    check(attention_case(dtype, [3000], [12], kv_heads=1, group=3, block_size=128))
    check(attention_case(dtype, [200, 5, 90, 1200], [8, 1, 30, 4], kv_heads=3, block_size=128))


@pytest.mark.parametrize("seed", range(12))
def test_random_sweep(seed, threads):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    threads(rng.choice([1, 2, 4]))
    check(
        attention_case(
            **random_sizes(rng, DTYPES, 900),
            softcap=rng.choice([0.0, 0.0, 5.0, 30.0]),
            sharpness=rng.choice([1.0, 1.0, 8.0]),
        )
    )


def test_float32_is_as_accurate_as_pytorch(each_isa):
    """float32 output must equal plain vLLM's, near ties apart: no accuracy may be given away."""
    torch.manual_seed(5)
    case = attention_case(torch.float32, [200, 900], [8, 20], block_size=128)
    exact, _ = case.exact()
    twin = torch.zeros_like(case.query)
    reference.tree_attention(twin, *case.args())
    covered = case.covered()

    def rms(x: Tensor) -> float:
        return float((x.double() - exact)[covered].square().mean().sqrt())

    assert rms(run(case)) <= 1.6 * rms(twin)


def test_bfloat16_noise_is_that_of_its_rounding(each_isa):
    """Rounded weights add to the rounding of the result, which no kernel avoids, but not more."""
    torch.manual_seed(5)
    case = attention_case(torch.bfloat16, [200, 900], [8, 20], block_size=128)
    exact, _ = case.exact()
    noise = [(x.double() - exact)[case.covered()].square().mean().sqrt()
             for x in (run(case), exact.bfloat16())]  # fmt: skip
    assert noise[0] <= 1.5 * noise[1]


def test_softcap(each_isa):
    torch.manual_seed(6)
    case = attention_case(torch.float32, [90], [9], softcap=3.0, sharpness=6.0)
    check(case)
    assert excess(case.but(softcap=0.0), run(case)) > 100, "the cap must matter here"


def test_a_wrong_mask_is_noticed():
    """Negative control: one bit of one row."""
    torch.manual_seed(7)
    case = attention_case(torch.float32, [40], [9])
    row = int(case.row_start[0]) + 5
    wrong = case.but(masks=case.masks.clone())
    wrong.masks[row] ^= 1 << 2
    out = run(wrong)
    assert excess(wrong, out) <= 1.0
    assert excess(case, out) > 100


def test_strided_query_and_out(each_isa):
    """The query is usually a slice of a fused projection; the last dimension may be strided too."""
    torch.manual_seed(8)
    for dtype in DTYPES:
        case = attention_case(dtype, [70, 3], [7, 4], kv_heads=2, group=2)
        tokens, heads, dim = case.query.shape
        fused = torch.randn(tokens, (heads + 4) * dim).to(dtype)
        check(case.but(query=fused[:, : heads * dim].view(tokens, heads, dim)))
        turned = torch.randn(dim, tokens, heads).to(dtype).permute(1, 2, 0)
        out = torch.full((heads, dim, tokens), POISON, dtype=dtype).permute(2, 0, 1)
        check(case.but(query=turned), out)


def test_key_and_value_caches_of_their_own():
    """Strides come from the tensors: K and V need not share memory, nor heads follow blocks."""
    torch.manual_seed(9)
    case = attention_case(torch.float32, [70, 3], [7, 4])
    blocks, heads, size, dim = case.key_cache.shape
    key = torch.empty(heads, blocks, size, dim).transpose(0, 1).copy_(case.key_cache)
    value = torch.empty(blocks, heads, size, dim).copy_(case.value_cache)
    check(case.but(key_cache=key, value_cache=value))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tagged_maps_change_nothing(layout, dtype):
    torch.manual_seed(10)
    case = attention_case(dtype, [70, 3], [7, 4], layout=layout)
    size, dim = case.key_cache.shape[2:]
    tagged = case.but(
        key_map=tag(case.key_map, size, dim), value_map=tag(case.value_map, size, dim)
    )
    assert tagged.key_map.numel() == size * dim + 1
    assert torch.equal(run(case), run(tagged))
    check(tagged)


def test_tags():
    """Every layout is told from the others, and from one that differs in two elements."""
    size, dim = 32, 64
    tags = [int(tag(m, size, dim)[-1]) for m in (*layout_maps("vector", size, dim),
                                                 *layout_maps("amx", size, dim))]  # fmt: skip
    assert tags == [1, 2, 3, 4]
    for layout in ("vector", "amx"):
        for cache_map in layout_maps(layout, size, dim):
            cache_map[[700, 2000]] = cache_map[[2000, 700]]
            assert int(tag(cache_map, size, dim)[-1]) == 0
    with pytest.raises(ValueError, match="permutation"):
        tag(torch.zeros(size * dim, dtype=torch.int32), size, dim)


def test_sharp_and_huge_scores(each_isa):
    """Scores of some thousands: the softmax is one-hot, nothing overflows."""
    torch.manual_seed(11)
    for dtype in DTYPES:
        check(attention_case(dtype, [300], [10], sharpness=500.0))


def test_a_row_that_sees_nothing_is_zero(each_isa, threads):
    torch.manual_seed(12)
    threads(1)
    for dtype in DTYPES:
        case = attention_case(dtype, [0, 500], [5, 5])
        case.masks[int(case.row_start[0]) + 3] = 0
        out = run(case)
        assert (out[int(case.row_start[0]) + 3] == 0).all()
        check(case)


def test_infinities_stay_with_their_rows(each_isa):
    """NaN or inf in one request's visible keys is that request's result alone."""
    torch.manual_seed(13)
    for dtype in DTYPES:
        case = attention_case(dtype, [60, 61], [5, 6], kv_heads=1)
        clean = run(case)
        block = int(case.block_table[case.request_index[0], 0])
        case.key_cache[block] = torch.inf
        out = run(case)
        first = slice(int(case.row_start[0]), int(case.row_start[0]) + 5)
        second = slice(int(case.row_start[1]), int(case.row_start[1]) + 6)
        assert out[first].isnan().all()
        assert torch.equal(out[second], clean[second])


def test_no_request_and_no_row():
    torch.manual_seed(14)
    case = attention_case(torch.float32, [10, 20, 30], [2, 0, 3])
    check(case)
    none = attention_case(torch.float32, [], [])
    assert (run(none) == POISON).all()


def test_repeated_calls_are_equal(threads):
    """Scratch memory is reused: nothing of an earlier, larger call may show."""
    torch.manual_seed(15)
    threads(2)
    small = attention_case(torch.bfloat16, [33], [3])
    large = attention_case(torch.bfloat16, [900, 400], [30, 60], head_dim=128)
    first = run(small)
    for _ in range(3):
        run(large)
        assert torch.equal(run(small), first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    torch.manual_seed(16)
    case = attention_case(dtype, [20, 3], [4, 2], kv_heads=1, group=2, block_size=16)
    # opcheck compares with NaN unequal to itself, so no poison.
    case.key_cache.nan_to_num_(0.0)
    case.value_cache.nan_to_num_(0.0)
    torch.library.opcheck(
        torch.ops.redrafter.tree_attention.default, (torch.zeros_like(case.query), *case.args())
    )


def test_without_the_library_the_twin_answers(monkeypatch):
    torch.manual_seed(17)
    case = attention_case(torch.float32, [20, 3], [4, 2])
    compiled = run(case)
    monkeypatch.setattr(module, "has_kernel", lambda device: False)
    twin = run(case)
    assert not torch.equal(compiled, twin)  # other rounding: it was another code
    torch.testing.assert_close(compiled, twin, atol=1e-5, rtol=1e-5)


def test_bad_arguments():
    torch.manual_seed(18)
    case = attention_case(torch.float32, [20, 3], [4, 2], block_size=16)

    def expect(message: str, **changes: object) -> None:
        with pytest.raises(RuntimeError, match=message):
            run(case.but(**changes), torch.zeros_like(case.query))

    expect("query has dtype Double", query=case.query.double())
    expect("key_cache has dtype BFloat16", key_cache=case.key_cache.bfloat16())
    expect("out must have the shape of query", query=case.query[:, :, :32].contiguous())
    expect("key_map has 100 elements; it must have 1024", key_map=case.key_map[:100])
    expect("row_count has dtype Long", row_count=case.row_count.long())
    expect("context_lens has 1 elements", context_lens=case.context_lens[:1])
    expect("request_index\\[0\\] is 9", request_index=case.request_index * 0 + 9)
    expect("request 0 has rows 1 to 100", row_count=case.row_count * 0 + 99)
    expect("has 4000 keys|has 4004 keys", context_lens=case.context_lens * 0 + 4000)
    expect("block_table\\[.*\\] is -1", block_table=case.block_table * 0 - 1)
    expect("masks", masks=case.masks.int())
    expect("scale is 0", scale=0.0)
    expect("softcap is -1", softcap=-1.0)


@pytest.mark.parametrize("name", ["key_map", "value_map"])
@pytest.mark.parametrize("wild", [-1, 1024, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("tagged", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_map_that_leads_out_of_its_region_is_refused(name, wild, tagged, layout):
    """Or, where its tag says which layout it is, not read at all."""
    torch.manual_seed(21)
    case = attention_case(torch.float32, [20, 3], [4, 2], block_size=16, layout=layout)
    wanted = run(case)
    cache_map = getattr(case, name).clone()
    if tagged:
        cache_map = tag(cache_map, 16, case.query.shape[2])
    cache_map[5] = wild
    case = case.but(**{name: cache_map})
    if tagged and layout != "random":
        assert torch.equal(run(case)[case.covered()], wanted[case.covered()])
        return
    with pytest.raises(RuntimeError, match=rf"{name}\[5\] is {wild}; a region has elements 0 to"):
        run(case)


@pytest.mark.parametrize("wild", [-1, 5, 99, 2**31 - 1])
def test_a_tag_that_is_none_is_refused(wild):
    torch.manual_seed(22)
    case = attention_case(torch.float32, [20, 3], [4, 2], block_size=16)
    cache_map = tag(case.key_map, 16, case.query.shape[2]).clone()
    cache_map[-1] = wild
    with pytest.raises(RuntimeError, match=f"key_map ends with {wild}, which is no layout"):
        run(case.but(key_map=cache_map))


def test_a_map_needs_consecutive_regions():
    torch.manual_seed(23)
    case = attention_case(torch.float32, [20, 3], [4, 2], block_size=16)
    one = torch.zeros(1).expand(case.key_cache.shape)
    with pytest.raises(RuntimeError, match="consecutive elements, but the cache has strides 0"):
        run(case.but(key_cache=one))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_without_maps_strides_say_where_tokens_are(dtype, interleaved):
    torch.manual_seed(0)
    case = by_strides(attention_case(dtype, [33, 0], [5, 9]), interleaved=interleaved)
    out = torch.full_like(case.query, 77)
    tree_attention(out, *case.args())
    twin = torch.full_like(case.query, 77)
    reference.tree_attention(twin, *case.args())
    exact, size = case.exact()
    covered = case.covered()
    # Two roundings to the type, as in the other tests of this file.
    eps = max(3e-6, 1.05 * torch.finfo(dtype).eps)
    for found in (out, twin):
        assert ((found.double() - exact).abs() <= eps * size + 1e-6)[covered].all()
        assert (found[~covered] == 77).all()
