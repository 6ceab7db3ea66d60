# SPDX-License-Identifier: Apache-2.0
"""What is held, by an engine's own account, and what vLLM's profile run gets to see."""

import torch

OWNERS = (
    "TreeStore", "Endings", "StepRows", "DeviceStats", "DraftBuffers", "AcceptBuffers",
    "InputBuffers",
)  # fmt: skip


def tensors_of(*owners):
    """Storages held by objects, through lists, dicts, tuples and objects of vLLM's and ours."""
    found, seen, stack = {}, set(), list(owners)
    while stack:
        one = stack.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            storage = one.untyped_storage()
            found[storage._cdata] = storage.nbytes()
        elif isinstance(one, dict):
            stack.extend(one.values())
        elif isinstance(one, (list, tuple)):
            stack.extend(one)
        elif type(one).__name__ in OWNERS:
            stack.append(vars(one))
    return sum(found.values())


def test_the_formula_counts_what_an_engine_holds(pair):
    speculator, state = pair.trees.speculator, pair.trees.state
    pair.trees.reset()
    # Rows of a step that no schedule has were not drafted for before the first request.
    layouts = state.rows._layouts
    kept = {rows: layouts[rows] for rows in speculator.options.tree_rows(state.max_num_reqs)}
    rows = {name: value for name, value in vars(state.rows).items() if name != "_layouts"}
    own = {name: value for name, value in vars(speculator).items() if name != "model"}
    held = tensors_of(state.trees, state.stats, state._positions, rows, kept, own)
    assert held == speculator.extra_memory().buffers


def test_caches_of_the_profile_run_are_let_go(pair, monkeypatch):
    """vLLM calls ``set_attn`` before it makes the real cache."""
    speculator, state, runner = pair.trees.speculator, pair.trees.state, pair.trees.runner
    monkeypatch.setattr(state, "movers", state.movers)
    speculator.set_attn(state, runner.kv_cache_config, None, None, None)
    assert state.movers == []


def test_the_profile_run_sees_the_widest_step(pair, monkeypatch):
    """Logits of all rows of all trees, the sampler's copy of them, a draft for all requests."""
    speculator = pair.trees.speculator
    rows, made, drafted = [], [], []
    logits_of, empty, draft = speculator._compute_logits, torch.empty, speculator._draft_trees

    def compute_logits(hidden):
        rows.append(hidden.shape[0])
        return logits_of(hidden)

    def note(*shape, **settings):
        made.append(shape)
        return empty(*shape, **settings)

    def draft_trees(context, known, batch, nodes):
        drafted.append(known.shape[0])
        return draft(context, known, batch, nodes)

    monkeypatch.setattr(speculator, "_compute_logits", compute_logits)
    monkeypatch.setattr(speculator, "_draft_trees", draft_trees)
    monkeypatch.setattr(torch, "empty", note)
    pair.trees.runner.profile_run()
    assert rows == [8 * 16] and drafted == [8]
    assert (8 * 16, speculator.vocab_size) in made
