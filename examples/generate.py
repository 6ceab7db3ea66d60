# SPDX-License-Identifier: Apache-2.0
"""ReDrafter decoding in one page, on transformers: what the engines of this package compute.

    python examples/generate.py "Why is the sky blue?" [TARGET DRAFTER_DIR]

One step (arXiv 2403.09919, sections 3.1 to 3.3): the drafter proposes beams from the target's last
hidden state and the known token; beams become a prefix tree; the target reads the whole tree in one
forward pass; the longest path that it agrees with is accepted, with one token more behind it; the
KV of that path stays. Batch size 1, greedy, no lookup and no node budget.
"""

import sys

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from vllm_redrafter import Drafter, Tree, beam_search, build_tree, load_drafter, walk_greedy


# --8<-- [start:forward]
def forward(target, cache: DynamicCache, tree: Tree) -> tuple[Tensor, Tensor]:
    """The target reads all M nodes: its own token after each, ``[M]``, and hidden states [M, H]."""
    context = cache.get_seq_length()
    nodes = tree.ancestor_mask()[0]  # a node sees itself and its ancestors ...
    sees = torch.cat([nodes.new_ones(len(nodes), context), nodes], 1)  # ... and the whole context
    mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(target.dtype).min)
    hidden = target.model(
        input_ids=tree.tokens,
        position_ids=tree.positions(torch.tensor([context])),  # by depth: siblings share one
        attention_mask=mask[None, None].to(target.dtype),
        past_key_values=cache,
    ).last_hidden_state
    return target.lm_head(hidden)[0].argmax(-1), hidden[0]
# --8<-- [end:forward]


# --8<-- [start:move]
def keep_accepted(cache: DynamicCache, context: int, path: list[int]) -> None:
    """Of the tree's KV only the root's and the accepted path's stay, behind the context."""
    rows = torch.tensor([*range(context), context, *(context + node for node in path)])
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, rows], layer.values[:, :, rows]
# --8<-- [end:move]


@torch.inference_mode()
def generate(
    target, drafter: Drafter, prompt: list[int], max_new_tokens: int,
    beam_width: int = 4, draft_length: int = 3, num_nodes: int = 11,
) -> tuple[list[int], float]:  # fmt: skip
    """The target's greedy answer, token for token, and the acceptance length (tokens per step)."""
    cache = DynamicCache(config=target.config)
    chain = Tree.from_lists([prompt], [list(range(-1, len(prompt) - 1))])  # a prompt is a chain
    says, hidden = forward(target, cache, chain)
    known, context = says[-1:], hidden[-1:]  # the first token, and the state that predicted it
    answer, steps = known.tolist(), 0
    ends = target.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    while len(answer) < max_new_tokens and not ends & set(answer):
        # --8<-- [start:step]
        # Draft: beams of the recurrent drafter, merged into one tree whose root is the known token.
        beams = beam_search(drafter, context, known, beam_width, draft_length)
        tree = build_tree(beams, "best", num_nodes)
        # Verify: one forward pass, then from the root as far as drafted and own tokens agree.
        before = cache.get_seq_length()
        says, hidden = forward(target, cache, tree)
        walk = walk_greedy(tree, says[None])
        path = walk.path[0, : walk.num_accepted[0]].tolist()
        keep_accepted(cache, before, path)
        # The last accepted node has the state, and the token behind it, for the next step.
        known, context = walk.next_token, hidden[walk.last_node]
        answer += [*tree.tokens[0, path].tolist(), int(known)]
        # --8<-- [end:step]
        steps += 1
    end = min((i + 1 for i, token in enumerate(answer) if token in ends), default=max_new_tokens)
    return answer[:end], (len(answer) - 1) / max(steps, 1)


def main() -> None:
    question, *pair = sys.argv[1:] or ["Why is the sky blue?"]
    if not pair:
        from vllm_redrafter.bench.variants import BUNDLED_DRAFTER
        from vllm_redrafter.demo.target import smollm2

        pair = [smollm2(), BUNDLED_DRAFTER]
    target = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32)
    tables = {"embedding": target.model.embed_tokens.weight, "lm_head": target.lm_head.weight}
    drafter = load_drafter(pair[1], dtype=torch.float32, **tables)
    tokenizer = AutoTokenizer.from_pretrained(pair[0])
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    answer, length = generate(target, drafter, prompt["input_ids"], max_new_tokens=96)
    print(tokenizer.decode(answer, skip_special_tokens=True))
    print(f"\nacceptance length {length:.2f} (1 without a drafter)")


if __name__ == "__main__":
    main()
