# SPDX-License-Identifier: Apache-2.0
"""As ``engine_v1/test_windows.py`` on Model Runner V2: windows, and blocks that are freed."""

import pytest
from engine_cases.cases import greedy, seeded
from engine_cases.run import sampling_params
from engine_cases.targets import write_drafter
from engine_cases.windows import write_windowed
from engine_v1.tiny_target import prompts

from engine_v2.own_process.engines import SPEC, Pair, engine

WINDOW = 21


def pair_of(tmp_path, family):
    model = write_windowed(tmp_path / family, family, window=WINDOW)
    drafter = write_drafter(tmp_path / "drafter")
    return Pair(engine(model), engine(model, drafter, **SPEC))


def layers(pair):
    found = pair.trees.runner.vllm_config.compilation_config.static_forward_context.values()
    return [layer for layer in found if hasattr(layer, "impl")]


@pytest.mark.parametrize(
    "family, groups", [("mistral", 1), pytest.param("gemma2", 4, marks=pytest.mark.slow)]
)
def test_windows(tmp_path, monkeypatch, family, groups):
    pair = pair_of(tmp_path, family)
    assert len(pair.trees.runner.kv_cache_config.kv_cache_groups) == groups
    # Every prompt has left a block behind, and the second goes on through the end of another.
    batch = prompts(3, shortest=56, longest=90)
    kinds = [greedy(max_tokens=12), seeded(1, max_tokens=12), greedy(max_tokens=12)]
    params = [sampling_params(kind) for kind in kinds]
    run = pair.run(batch, params)
    run.assert_equal()
    run.assert_saw_trees(moves=1, accepted=0.5)
    # The control: our rows look back on one position more.
    for layer in layers(pair):
        if layer.impl.redrafter_window:
            monkeypatch.setattr(layer.impl, "redrafter_window", WINDOW + 1)
    assert not pair.run(batch, params).equal
