# SPDX-License-Identifier: Apache-2.0
"""The settings that the table of engine_cases/settings.py says to work, in two engines."""

import pytest
from engine_cases.settings import CACHE, SCHEDULER, SPECULATIVE, Works
from vllm import SamplingParams

from engine_v1.engines import answers
from engine_v1.tiny_target import EOS, prompts

GREEDY = SamplingParams(temperature=0, max_tokens=40)


def works(table, engine):
    return {
        field: entry
        for field, entry in table.items()
        if isinstance(entry, Works) and entry.engine == engine
    }


def settings_of(engine):
    """Arguments of ``LLM``; ``spec_*`` are of speculative_config."""
    found = {
        entry.argument or field: entry.value
        for table in (SCHEDULER, CACHE)
        for field, entry in works(table, engine).items()
    }
    for field, entry in works(SPECULATIVE, engine).items():
        if field not in ("method", "model"):
            found[f"spec_{field}"] = entry.value
    return found


def check(make_pair, engine):
    """Every value has arrived in vLLM's configuration, and the answers are plain vLLM's."""
    pair = make_pair(**settings_of(engine))
    batch, more = prompts(24, shortest=20, longest=60), {}
    if "policy" in works(SCHEDULER, engine):
        more = {"priority": [i * 7 % 5 for i in range(24)]}
    pair.plain.reset()
    expected = pair.plain.generate(batch, GREEDY, **more)
    pair.trees.reset(pair.make_oracle(expected, pair.trees.most_nodes, range(EOS), seed=2))
    # Twice, the second time with cached prompts where there is a cache.
    for _ in range(2):
        assert answers(pair.trees.generate(batch, GREEDY, **more)) == answers(expected)
    assert pair.trees.stats["moves"] > 20
    for side in (pair.plain, pair.trees):
        config = side.llm.llm_engine.vllm_config
        for part, table in ((config.scheduler_config, SCHEDULER), (config.cache_config, CACHE)):
            for field, entry in works(table, engine).items():
                # Of the constructor alone; the model's configuration keeps it.
                owner = config.model_config if field == "max_model_len" else part
                assert getattr(owner, field) == entry.value, field
    return pair


def test_settings_that_go_together(make_pair):
    pair = check(make_pair, "a")
    assert pair.trees.most_nodes == SPECULATIVE["num_speculative_tokens"].value


@pytest.mark.slow
def test_the_others(make_pair):
    pair = check(make_pair, "b")
    options = pair.trees.runner._options
    assert options.nodes_for(2) == 9 and options.nodes_for(5) == 4


def test_every_value_is_in_one_of_the_two():
    for table in (SCHEDULER, CACHE, SPECULATIVE):
        for field, entry in table.items():
            assert not isinstance(entry, Works) or entry.engine in "ab", field
