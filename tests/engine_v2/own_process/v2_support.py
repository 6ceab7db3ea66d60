# SPDX-License-Identifier: Apache-2.0
"""As ``engine_v1/test_support.py`` on Model Runner V2."""

from engine_cases import reasoning
from engine_cases.support_parameters import ask, note
from engine_cases.support_table import PARAMETERS

from vllm_redrafter.engine.v2.model_state import TreeModelState
from vllm_redrafter.engine.v2.tree_store import TreeStore


def test_parameters(make_pair, monkeypatch):
    pair, most, prompt_of = make_pair(**reasoning.settings()), {}, {}
    state = pair.trees.state

    def add_request(req_index, new_req_data):
        prompt_of[req_index] = new_req_data.prompt_token_ids
        TreeModelState.add_request(state, req_index, new_req_data)

    def put(slots, drafted, drafts):
        tokens = TreeStore.put(state.trees, slots, drafted, drafts)
        for slot in slots.tolist():
            nodes = int(state.trees.num_nodes[slot])
            if nodes > 1:
                parents = state.trees.parents[slot, 1:nodes].tolist()
                note(most, prompt_of[slot], parents == list(range(nodes - 1)))
        return tokens

    monkeypatch.setattr(state, "add_request", add_request)
    monkeypatch.setattr(state.trees, "put", put)
    assert ask(pair, most, tokens=12) == {name: row.v2 for name, row in PARAMETERS.items()}
