# SPDX-License-Identifier: Apache-2.0
"""Trees for requests with a grammar, on Model Runner V1.

vLLM's scheduler holds the grammars, and walks a request's drafts as if they followed each other.
Where it runs in the worker's process (an ``LLM`` in the caller's process; vLLM's CPU servers have a
worker of their own) it can be asked here: the draft is made of what the grammar allows, and two
methods of ``StructuredOutputManager`` learn what a tree is. One leaves such a draft whole; the
other fills each node's row of the bitmask with the state behind the node's own path. Anywhere
else, and for other backends than xgrammar, or while a reasoning section lasts, the draft is cut to
its first chain and vLLM's own methods do the rest.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import numpy as np
import torch
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

from vllm_redrafter.engine.v1.request_tree import RequestTree
from vllm_redrafter.tree.grammar import walk

_WRAPPED_MARK = "_vllm_redrafter_wrapped"
_EVERYTHING = -1  # a word of a bitmask that allows all its tokens

_EVERY: weakref.WeakSet[Grammars] = weakref.WeakSet()


class XgrammarMatcher:
    """A copy of a request's grammar, as ``tree.grammar.Matcher``.

    Args:
        grammar: vLLM's ``XgrammarGrammar``; it stays as it is.
        tokenizer: the target's; None where nothing is to be drafted.
    """

    def __init__(self, grammar: Any, tokenizer: Any = None) -> None:
        self._matcher = grammar.matcher.fork()
        self._tokenizer = tokenizer
        self._vocab_size = grammar.vocab_size
        self._texts = grammar.ctx.tokenizer_info.decoded_vocab if tokenizer is not None else None
        words = -(-self._vocab_size // 32)
        self._mask = torch.full((1, words), _EVERYTHING, dtype=torch.int32)

    @property
    def ended(self) -> bool:
        return bool(self._matcher.is_terminated())

    def advance(self, token: int) -> bool:
        return bool(self._matcher.accept_token(token))

    def back(self, count: int) -> None:
        self._matcher.rollback(count)

    def fill(self, rows: torch.Tensor, row: int) -> None:
        """Fill a row of a bitmask, all bits set where the grammar has ended."""
        if self.ended:
            rows[row].fill_(_EVERYTHING)
        else:
            self._matcher.fill_next_token_bitmask(rows, row)

    def allowed(self) -> np.ndarray:
        self.fill(self._mask, 0)
        bits = np.unpackbits(self._mask.numpy().view(np.uint8), bitorder="little")
        return np.flatnonzero(bits[: self._vocab_size])

    def forced(self) -> list[int]:
        text = self._matcher.find_jump_forward_string()
        return self._tokenizer.encode(text, add_special_tokens=False) if text else []

    def text(self, token: int) -> bytes:
        return bytes(self._texts[token]) if token < len(self._texts) else b""


class Grammars:
    """The grammars of one engine's requests, as far as this process has them.

    Args:
        vllm_config: the engine's; what is in its process has the same object.
        alone: whether there is no other rank that would have to draft the same tree.
    """

    def __init__(self, vllm_config: Any, alone: bool) -> None:
        self.vllm_config = vllm_config
        self._alone = alone
        self._manager: Any = None
        self._requests: dict[str, Any] = {}
        # Drafts that the grammar was asked about, until they are verified or replaced.
        self.drafted: dict[str, RequestTree] = {}
        # What the step that runs verifies.
        self.verified: dict[str, RequestTree] = {}
        _wrap()
        _EVERY.add(self)

    def seen(self, manager: Any, requests: dict[str, Any], ids: list[str]) -> None:
        """The scheduler asked for these requests' bitmask."""
        self._manager = manager
        self._requests = {req_id: requests[req_id] for req_id in ids}

    def matcher(self, req_id: str, said: list[int]) -> XgrammarMatcher | None:
        """The grammar of a request behind what this step said; None where only a chain may be.

        Args:
            said: the step's tokens, which the scheduler has not seen yet.
        """
        request = self._requests.get(req_id)
        if request is None or not self._alone:
            return None
        # Not while a reasoning section lasts: the step in which it ends is vLLM's to read.
        if self._manager._get_constraint_bounds(request, ()).constraint_start:
            return None
        grammar = request.structured_output_request.grammar
        if not isinstance(grammar, XgrammarGrammar):
            return None
        matcher = XgrammarMatcher(
            grammar, cached_tokenizer_from_config(self.vllm_config.model_config)
        )
        for token in said:
            if not matcher.ended and not matcher.advance(token):
                return None
        return matcher

    def forget(self, req_id: str) -> None:
        """The request has ended."""
        for known in (self._requests, self.drafted, self.verified):
            known.pop(req_id, None)

    def fill_rows(self, rows: torch.Tensor, req_id: str, tree: RequestTree) -> None:
        """The masks of a request's root and nodes, each behind its own path.

        Args:
            rows: ``[1 + nodes, words]`` int32, filled.
        """
        # What the grammar forbids is not reached, whatever may follow it.
        rows.fill_(_EVERYTHING)
        matcher = XgrammarMatcher(self._requests[req_id].structured_output_request.grammar)
        walk(tree.tokens, tree.parents, matcher, lambda node: matcher.fill(rows, node))


def _of(manager: Any) -> Grammars | None:
    for grammars in _EVERY:
        if grammars.vllm_config is manager.vllm_config:
            return grammars
    return None


def _wrap() -> None:
    """Teach the manager, once per process; other engines' managers are unchanged."""
    if getattr(StructuredOutputManager.grammar_bitmask, _WRAPPED_MARK, False):
        return
    validate = StructuredOutputManager.validate_tokens
    fill = StructuredOutputManager.grammar_bitmask

    @functools.wraps(validate)
    def validate_tokens(self: Any, request: Any, spec_tokens: list[int]) -> list[int]:
        grammars = _of(self)
        tree = grammars.drafted.get(request.request_id) if grammars is not None else None
        if tree is not None and tree.tokens == spec_tokens:
            return spec_tokens
        return validate(self, request, spec_tokens)

    @functools.wraps(fill)
    def grammar_bitmask(
        self: Any, requests: Any, structured_output_request_ids: Any,
        scheduled_spec_decode_tokens: Any,
    ) -> Any:  # fmt: skip
        grammars, ids = _of(self), structured_output_request_ids
        scheduled = scheduled_spec_decode_tokens
        if grammars is None or not ids:
            return fill(self, requests, ids, scheduled)
        grammars.seen(self, requests, ids)
        trees = {
            req_id: tree for req_id in ids
            if (tree := grammars.verified.get(req_id)) is not None
            and tree.tokens == scheduled.get(req_id)
        }  # fmt: skip
        # Of padding vLLM asks no grammar, and leaves room for its rows.
        unasked = {req_id: [-1] * len(tree) for req_id, tree in trees.items()}
        rows = fill(self, requests, ids, {**scheduled, **unasked})
        row = 0
        for req_id in ids:
            count = 1 + len(scheduled.get(req_id, ()))
            if req_id in trees:
                of_request = torch.from_numpy(rows[row : row + count])
                grammars.fill_rows(of_request, req_id, trees[req_id])
            row += count
        return rows

    setattr(grammar_bitmask, _WRAPPED_MARK, True)
    StructuredOutputManager.validate_tokens = validate_tokens  # type: ignore[method-assign]
    StructuredOutputManager.grammar_bitmask = grammar_bitmask  # type: ignore[method-assign]
