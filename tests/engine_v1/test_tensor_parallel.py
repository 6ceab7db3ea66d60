# SPDX-License-Identifier: Apache-2.0
"""A target that is divided between two ranks says what it says without drafts.

Every rank walks, moves its own share of the KV cache and drafts; the first rank's tree is the one
that all of them verify. The last tests show that this is needed.
"""

import pytest
import torch
from safetensors.torch import load_file
from vllm import SamplingParams

from engine_v1.conftest import SPEC
from engine_v1.engines import answers, tokens
from engine_v1.oracle import Oracle
from engine_v1.ranks import (
    FEW,
    RankedEngine,
    break_drafts,
    load_drafters,
    load_strictly,
    rank_of,
    read_tables,
    reset,
)
from engine_v1.tiny_target import (
    EOS,
    VOCAB,
    prompts,
    tiny_drafter,
    write_target,
    write_taught_drafter,
)
from vllm_redrafter.drafter.checkpoint import save_drafter
from vllm_redrafter.drafter.fingerprint import FIELD
from vllm_redrafter.training.fingerprint import of_directory

pytestmark = pytest.mark.slow

GREEDY = SamplingParams(temperature=0, max_tokens=24)
NODES = SPEC["spec_num_speculative_tokens"]


@pytest.fixture(scope="module")
def plain(target):
    engine = RankedEngine(target)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def trees(target, drafter):
    spec = {key.removeprefix("spec_"): value for key, value in SPEC.items()}
    engine = RankedEngine(target, drafter, spec)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def expected(plain):
    return plain.generate(prompts(8), GREEDY)


@pytest.fixture
def run(trees):
    """Generate with an oracle on every rank; returns the outputs and the ranks' counters."""

    def generate(batch, params, known, seeds=(0, 0), agree=True):
        oracles = [Oracle(known, NODES, range(EOS), seed=seed) for seed in seeds]
        trees.each_rank(reset, oracles, agree)
        outputs = trees.generate(batch, params)
        return outputs, trees.stats

    return generate


def counts(stats):
    """Counters without times, and without what differs by design."""
    return {k: v for k, v in stats.items() if k not in ("seconds", "replaced")}


def test_two_ranks_that_share_the_target(trees):
    assert trees.each_rank(rank_of) == [0, 1]


def test_tables_of_the_target_are_whole_on_every_rank(trees, target):
    """257 tokens on two ranks: 160 rows each, the last 63 of them padding."""
    stored = load_file(target / "model.safetensors")
    ids = [256, 0, 159, 160, 161, 7]
    for found in trees.each_rank(read_tables, ids):
        assert found["own_rows"] == 160
        assert found["kv_heads"] == {1}
        assert found["shape"] == (VOCAB, stored["lm_head.weight"].shape[1])
        embedding = torch.tensor(found["embedding"])
        assert torch.equal(embedding, stored["model.embed_tokens.weight"])
        assert torch.equal(torch.tensor(found["head"]), stored["lm_head.weight"])
        assert torch.equal(torch.tensor(found["rows"]), stored["lm_head.weight"][ids])


def test_the_fingerprint_is_compared_on_every_rank(trees, target, tmp_path):
    """Tables in shares, the last one padded."""
    names = {}
    other = write_target(tmp_path / "other-target", seed=4)
    for name, directory in (("right", target), ("wrong", other)):
        fields = {FIELD: of_directory(directory).to_json()}
        save_drafter(tiny_drafter(), tmp_path / name, **fields)
        names[name] = [str(tmp_path / name)] * 2
    assert trees.each_rank(load_strictly, names["right"]) == [None, None]
    for message in trees.each_rank(load_strictly, names["wrong"]):
        assert "was not made for this target, but for one whose" in message


def test_greedy(run, expected):
    outputs, stats = run(prompts(8), GREEDY, expected)
    assert answers(outputs) == answers(expected)
    first, second = stats
    assert first["moves"] > 20 and first["acceptance_length"] > 2
    assert counts(first) == counts(second)
    assert first["replaced"] == second["replaced"] == 0


def test_seeded(plain, run):
    kinds = [{}, {"top_p": 0.8}, {"top_k": 5}, {"temperature": 0.6, "top_p": 0.9, "top_k": 20}]
    params = [
        SamplingParams(**{"temperature": 1.0, "seed": i, "max_tokens": 20, **kinds[i % 4]})
        for i in range(8)
    ]
    known = plain.generate(prompts(8), params)
    outputs, stats = run(prompts(8), params, known)
    assert answers(outputs) == answers(known)
    assert stats[0]["moves"] > 10 and stats[0]["acceptance_length"] > 1.5
    assert counts(stats[0]) == counts(stats[1])


def test_the_recurrent_drafter_and_a_rank_with_another_one(
    trees, target, drafter, expected, tmp_path
):
    """The second rank drafts with other weights: seen in its counter, and nowhere else."""
    batch = prompts(8)
    texts = [text + said for text, said in zip(batch, tokens(expected), strict=True)]
    taught = str(write_taught_drafter(tmp_path / "taught", target, texts))
    save_drafter(tiny_drafter(seed=2), tmp_path / "other")
    found = {}
    for name, second in (("same", taught), ("other", str(tmp_path / "other"))):
        trees.each_rank(load_drafters, [taught, second])
        trees.each_rank(reset, None, True)
        assert answers(trees.generate(batch, GREEDY)) == answers(expected)
        found[name] = trees.stats
    for first, second in found.values():
        assert first["acceptance_length"] > 1.5
        assert counts(first) == counts(second)
    assert [stats["replaced"] for stats in found["same"]] == [0, 0]
    assert found["other"][0]["replaced"] == 0
    assert found["other"][1]["replaced"] > 0.9 * found["other"][1]["drafts"]


def test_ranks_that_draft_differently_agree(run, expected):
    outputs, stats = run(prompts(8), GREEDY, expected, seeds=(0, 1))
    assert answers(outputs) == answers(expected)
    assert stats[1]["replaced"] > 30


def test_control_without_agreement_the_same_draft_is_enough(run, expected):
    outputs, _ = run(prompts(8), GREEDY, expected, agree=False)
    assert answers(outputs) == answers(expected)


def test_control_without_agreement_different_drafts_break_it(run, expected):
    outputs, _ = run(prompts(8), GREEDY, expected, seeds=(0, 1), agree=False)
    assert answers(outputs) != answers(expected)


@pytest.mark.parametrize("ranks", [[0], [1], [0, 1]])
def test_faults_of_drafting(trees, run, expected, ranks):
    """No rank waits for another one, and all agree when the first one gives up."""
    try:
        # Some of them fail.
        oracles = [Oracle(expected, NODES, range(EOS)) for _ in range(2)]
        trees.each_rank(reset, oracles, True)
        trees.each_rank(break_drafts, ranks)
        assert answers(trees.generate(prompts(8), GREEDY)) == answers(expected)
        stats = trees.stats
    finally:
        trees.each_rank(break_drafts, [])
    errors = [sum(one["draft_errors"].values()) for one in stats]
    assert [count > 0 for count in errors] == [rank in ranks for rank in range(2)]
    assert max(errors) == FEW
    assert [one["drafting_off"] for one in stats] == [0 in ranks] * 2
    assert stats[0]["drafts"] == stats[1]["drafts"]
    assert (stats[0]["drafts"] > 10) == (0 not in ranks)
    outputs, stats = run(prompts(8), GREEDY, expected)
    assert answers(outputs) == answers(expected) and stats[0]["drafts"] > 10


def test_a_measured_budget(target, taught_drafter, expected):
    """Times differ between ranks; the first one's choice is everybody's, and costs of it alone."""
    engine = RankedEngine(target, taught_drafter, {"node_budget": "auto"})
    try:
        assert answers(engine.generate(prompts(8), GREEDY)) == answers(expected)
        first, second = engine.stats
    finally:
        engine.shutdown()
    assert first["drafts"] == second["drafts"] and first["drafts"] > 10
    assert first["accepted_by_depth"] == second["accepted_by_depth"]
    assert sum(first["draft_shapes"].values()) >= 5 and not second["draft_shapes"]
    assert second["replaced"] == 0
