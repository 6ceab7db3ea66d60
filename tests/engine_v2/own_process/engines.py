# SPDX-License-Identifier: Apache-2.0
"""Engines on Model Runner V2, plain and with ReDrafter, and the oracle that drafts in tests."""

from __future__ import annotations

import types
from dataclasses import dataclass

import torch
from engine_cases.kept import end_together
from engine_v1 import engines as v1
from engine_v1.oracle import Oracle, request_tree

from vllm_redrafter.engine.v2.tree_store import Drafted
from vllm_redrafter.ops.build_tree import _padded
from vllm_redrafter.tree.candidates import FROM_DRAFTER
from vllm_redrafter.tree.tree import NO_PARENT, Tree

SPEC = {"spec_num_speculative_tokens": 15, "spec_beam_width": 4, "spec_draft_length": 4}

HYBRID = {
    "spec_num_speculative_tokens": 15, "spec_beam_width": 6, "spec_draft_length": 4,
}  # fmt: skip
DRAFTER_ALONE = HYBRID | {"spec_prompt_lookup": False}

_ENGINES: dict = {}
end_together(_ENGINES)


class Engine:
    """One ``LLM`` in this process."""

    def __init__(self, llm):
        self.llm = llm
        core = llm.llm_engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.worker = core.model_executor.driver_worker.worker
        self.runner = self.worker.model_runner
        self.speculator = self.runner.speculator
        self.state = self.runner.model_state
        self.verifies_trees = self.speculator is not None
        self.drafts_itself = getattr(self.speculator, "_draft_trees", None)
        if self.verifies_trees:
            # In a test an error of drafting is a failure.
            self.guarded = self.speculator.draft_guard.serving
            self.speculator.draft_guard.serving = False
        self.preemptions = 0
        original = self.scheduler._preempt_request

        def preempt(*args, **kwargs):
            self.preemptions += 1
            return original(*args, **kwargs)

        self.scheduler._preempt_request = preempt

    @property
    def most_nodes(self):
        return self.speculator.num_speculative_steps

    @property
    def stats(self):
        return self.state.stats.summary()

    def reset(self, drafter=None, prefixes=True):
        """Forget counters and cached prefixes; ``drafter`` replaces ``_draft_trees``."""
        self.preemptions = 0
        if prefixes:
            assert self.llm.reset_prefix_cache()
        if not self.verifies_trees:
            return
        self.state.stats.reset()
        self.speculator._draft_trees = (
            self.drafts_itself
            if drafter is None
            else types.MethodType(
                lambda _, context, known, batch, nodes: drafter.draft(self, context, known, batch),
                self.speculator,
            )
        )

    def generate(self, prompts, params, **more):
        return self.llm.generate(v1.as_requests(prompts), params, use_tqdm=False, **more)


def engine(model, drafter=None, **settings):
    """The engine with these settings, started at the first call; see ``engine_v1.engines``."""
    from vllm import LLM

    spec = {key[5:]: settings.pop(key) for key in list(settings) if key.startswith("spec_")}
    settings = {
        "model": str(model),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "block_size": 32,
        "num_gpu_blocks_override": 128,
        "kv_cache_memory_bytes": 16 << 20,
        "async_scheduling": True,
        "seed": 0,
    } | settings
    if drafter is not None:
        settings["speculative_config"] = {"method": "redrafter", "model": str(drafter)} | spec
    key = tuple(sorted((name, repr(value)) for name, value in settings.items()))
    if key not in _ENGINES:
        _ENGINES[key] = Engine(LLM(**settings))
    return _ENGINES[key]


class V2Oracle(Oracle):
    """The oracle of the V1 tests, asked for trees of fixed size on the device."""

    def draft(self, engine, context, known, batch):
        states = engine.runner.req_states
        tokens, parents = [], []
        for i, slot in enumerate(batch.idx_mapping_np.tolist()):
            length = int(states.total_len.gpu[slot])
            prompt = int(states.prompt_len.np[slot])
            ids = states.all_token_ids.gpu[slot, :length].tolist()
            root = int(known[i])
            drafted = request_tree([], [])
            # A prefill that goes on has no known token yet.
            if length > prompt and ids[-1] == root:
                if self.contexts is not None:
                    self.contexts.append((root, context[i].clone()))
                drafted = self._tree(ids[:prompt], ids[prompt:])
            tokens.append([root, *drafted.tokens])
            parents.append([NO_PARENT, *drafted.parents])
        tree = Tree.from_lists(tokens, parents)
        tree, masks = _padded(tree, tree.packed_mask(), engine.most_nodes + 1)
        return Drafted(tree, masks, torch.full_like(tree.tokens, FROM_DRAFTER))


@dataclass(frozen=True)
class Pair(v1.Pair):
    """Plain vLLM and ReDrafter, both on Model Runner V2."""

    make_oracle = V2Oracle
