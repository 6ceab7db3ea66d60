# SPDX-License-Identifier: Apache-2.0
"""As ``engine_v1/test_chains.py`` on Model Runner V2.

vLLM's kernels of Mamba 2 go back behind a rejected token on GPUs alone: those that update states
run in Triton's interpreter here, in both engines.
"""

import importlib.util

import pytest
from engine_cases.chains import write_chained
from engine_cases.targets import write_drafter
from engine_v1.tiny_target import prompts
from vllm import SamplingParams
from vllm.model_executor.layers.mamba import mamba_mixer2
from vllm.model_executor.layers.mamba.ops import causal_conv1d, mamba_ssm
from vllm.platforms import current_platform

from engine_v2.own_process.engines import SPEC, Pair, engine
from vllm_redrafter.engine import target_shape
from vllm_redrafter.engine.target_shape import Recurrence
from vllm_redrafter.engine.v2.model_state import HybridChainModelState

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.0, seed=5, max_tokens=16, ignore_eos=True)


def for_gpus(module, name):
    """A function of a module of vLLM's as it is on GPUs."""
    spec = importlib.util.spec_from_file_location(f"{module.__name__}_for_gpus", module.__file__)
    loaded = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(current_platform), "is_cpu", lambda self: False)
        spec.loader.exec_module(loaded)
    return getattr(loaded, name)


@pytest.fixture
def triton_states(monkeypatch):
    """Mamba 2 with vLLM's kernels for GPUs that update states."""
    monkeypatch.setitem(target_shape.KEEP_STATES, True, target_shape.KEEP_STATES[False])
    update = for_gpus(mamba_ssm, "selective_state_update")
    monkeypatch.setattr(mamba_mixer2, "selective_state_update", update)
    convolve = for_gpus(causal_conv1d, "causal_conv1d_update")
    monkeypatch.setattr(mamba_mixer2, "causal_conv1d_update", convolve)


def pair_of(tmp_path, family, dtype):
    model = write_chained(tmp_path / family, family, dtype)
    drafter = write_drafter(tmp_path / "drafter")
    settings = {"dtype": dtype, "enable_prefix_caching": False, "num_gpu_blocks_override": 256}
    return Pair(engine(model, **settings), engine(model, drafter, **settings, **SPEC))


def check(pair):
    """Greedy and seeded: accepted chains of several tokens, and no tree."""
    for params in (GREEDY, SEEDED):
        run = pair.run(prompts(3, shortest=20, longest=60), params, chain_first=True)
        run.assert_equal()
        stats = pair.trees.stats
        assert stats["acceptance_length"] > 1.5 and not stats["moves"], stats
        assert not stats["fallbacks"], stats


@pytest.mark.slow
def test_mamba_2(tmp_path, triton_states, monkeypatch):
    pair = pair_of(tmp_path, "falcon_h1", "float32")
    assert isinstance(pair.trees.state, HybridChainModelState)
    check(pair)
    # The control: every request goes on from the state behind its root.
    state = pair.trees.state
    honest = HybridChainModelState.postprocess_state

    def forget(slots, *args, **kwargs):
        honest(state, slots, *args, **kwargs)
        state.num_accepted_tokens_gpu[slots] = 1

    monkeypatch.setattr(state, "postprocess_state", forget)
    assert not pair.run(prompts(3, shortest=20, longest=60), GREEDY, chain_first=True).equal


def test_refused_with_vllms_kernels_for_cpus(tmp_path):
    with pytest.raises(target_shape.UnsupportedError, match=Recurrence.MAMBA2.value):
        pair_of(tmp_path, "falcon_h1", "float32")
