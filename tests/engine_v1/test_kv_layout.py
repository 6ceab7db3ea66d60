# SPDX-License-Identifier: Apache-2.0
"""The maps that were learnt from vLLM's own cache update say where everything is."""

import pytest
import torch

from vllm_redrafter.engine import kv_layout
from vllm_redrafter.engine.kv_layout import probe_layout, split_cache
from vllm_redrafter.ops.move_kv import MoveKV

CASES = [(32, "float32"), (64, "float32"), (128, "float32"), (32, "bfloat16"), (128, "bfloat16")]


def first_layer(engine):
    return next(iter(engine.runner.compilation_config.static_forward_context.values()))


def read(cache, cache_map, slots):
    """Rows ``[slots, heads, head_dim]`` by the map alone."""
    _, heads, block_size, head_dim = cache.shape
    offsets = cache_map[: block_size * head_dim].long().view(block_size, head_dim)
    regions = cache[slots // block_size].flatten(2)
    index = offsets[slots % block_size][:, None].expand(-1, heads, -1)
    return regions.gather(2, index)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[1]}-{case[0]}")
def written(make_pair, request):
    """A cache into which vLLM wrote random rows at random slots, and the layout of its layer."""
    block_size, dtype = request.param
    pair = make_pair(dtype=dtype, block_size=block_size)
    layer = first_layer(pair.plain)
    blocks = 6
    cache = torch.zeros(blocks, *layer.kv_cache.shape[1:], dtype=layer.kv_cache.dtype)
    heads, head_dim = cache.shape[1], cache.shape[3] // 2
    generator = torch.Generator().manual_seed(block_size)
    slots = torch.randperm(blocks * block_size, generator=generator)[:50]
    key, value = torch.randn(2, 50, heads, head_dim, generator=generator).to(cache.dtype)
    layer.impl.do_kv_cache_update(layer, key, value, cache, slots)
    return cache, probe_layout(layer, layer.kv_cache), slots, key, value


def test_what_vllm_wrote_is_where_the_maps_say(written):
    cache, layout, slots, key, value = written
    key_cache, value_cache = split_cache(cache)
    assert torch.equal(read(key_cache, layout.key_map, slots), key)
    assert torch.equal(read(value_cache, layout.value_map, slots), value)


def test_a_move_is_what_vllm_would_have_written(written):
    cache, layout, slots, key, value = written
    halves = split_cache(cache)
    before = cache.clone()
    # Chains of moves: what is overwritten by one is the source of another.
    MoveKV([halves[0]], [halves[1]], layout.key_map, layout.value_map)(slots[10:30], slots[5:25])
    expected_key, expected_value = key.clone(), value.clone()
    expected_key[5:25], expected_value[5:25] = key[10:30], value[10:30]
    assert torch.equal(read(halves[0], layout.key_map, slots), expected_key)
    assert torch.equal(read(halves[1], layout.value_map, slots), expected_value)
    untouched = torch.tensor(sorted(set(range(6 * halves[0].shape[2])) - set(slots.tolist())))
    assert not read(halves[0], layout.key_map, untouched).any()
    assert not torch.equal(cache, before)


def test_probing_leaves_the_cache_alone(make_pair):
    layer = first_layer(make_pair().plain)
    before = layer.kv_cache.clone()
    probe_layout(layer, layer.kv_cache)
    assert torch.equal(layer.kv_cache, before)


def test_an_unknown_layout_is_refused(make_pair, monkeypatch):
    layer = first_layer(make_pair().plain)

    def one_row_twice(_layer, key, value, cache, slots):
        for half, rows in zip(split_cache(cache), (key, value), strict=True):
            for row, slot in zip(rows, slots.tolist(), strict=True):
                half[slot // half.shape[2], :, slot % half.shape[2] // 2] = row

    monkeypatch.setattr(layer.impl, "do_kv_cache_update", one_row_twice)
    with pytest.raises(RuntimeError, match="is not a permutation"):
        kv_layout.probe_layout(layer, layer.kv_cache)
