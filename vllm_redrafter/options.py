# SPDX-License-Identifier: Apache-2.0
"""The user's JSON object, validated: one place for keys, defaults and messages."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_redrafter.drafter.config import DrafterConfig
from vllm_redrafter.tree.rules import TREE_RULES

METHOD = "redrafter"

# What a drafter without defaults of its own gets. Chosen for small batches; see the README's table.
DEFAULT_BEAM_WIDTH = 4
DEFAULT_DRAFT_LENGTH = 3
DEFAULT_TREE = "best"
DEFAULT_TOP_K = 0
DEFAULT_MAX_NODES = 15


class OptionError(ValueError):
    """A speculative_config that cannot be used; the message names the value and the cure."""


@dataclass(frozen=True)
class ReDrafterOptions:
    """Everything the engine needs to know, in plain values that survive pickling.

    Attributes:
        model: local drafter directory.
        num_speculative_tokens: the most drafted nodes of one request's tree (root not counted).
        beam_width: W, candidates kept at every depth.
        draft_length: L, drafted tokens along one path, never counting the known token.
        tree: ``best`` or ``beams``, see ``vllm_redrafter.tree.build``.
        top_k: renormalise the drafter's law over its k likeliest tokens; 0 is off.
        num_speculative_tokens_per_batch_size: vLLM's own key and format for easing off under
            load: ``((first, last, nodes), ...)``, inclusive ranges of running requests from 1
            on; beyond the last range its nodes stay. Empty: always ``num_speculative_tokens``.
    """

    model: str
    num_speculative_tokens: int
    beam_width: int = DEFAULT_BEAM_WIDTH
    draft_length: int = DEFAULT_DRAFT_LENGTH
    tree: str = DEFAULT_TREE
    top_k: int = DEFAULT_TOP_K
    num_speculative_tokens_per_batch_size: tuple[tuple[int, int, int], ...] = ()

    def nodes_for(self, batch_size: int) -> int:
        """How many nodes each of ``batch_size`` running requests may draft."""
        nodes = self.num_speculative_tokens
        for first, _, limit in self.num_speculative_tokens_per_batch_size:
            if batch_size >= first:
                nodes = limit
        return min(nodes, self.num_speculative_tokens)

    def tree_rows(self, most_requests: int) -> list[int]:
        """Rows of a request's tree, root included, with 1, 2, ... ``most_requests`` running."""
        return [1 + self.nodes_for(running) for running in range(1, most_requests + 1)]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


SCHEDULE = "num_speculative_tokens_per_batch_size"

VALID_KEYS = ("method", *(field.name for field in dataclasses.fields(ReDrafterOptions)))


def check_keys(user: Mapping[str, Any]) -> None:
    """Raise OptionError, listing the valid keys, if ``user`` holds an unknown one."""
    unknown = [key for key in user if key not in VALID_KEYS]
    if unknown:
        raise OptionError(
            f"speculative_config has the unknown key {unknown[0]!r}; ReDrafter's keys are "
            f"{', '.join(VALID_KEYS)}."
        )


def resolve_options(user: Mapping[str, Any], drafter: DrafterConfig) -> ReDrafterOptions:
    """Fill in what the user left out: from the drafter's config.json, then sensible values.

    Args:
        user: the speculative_config as given, keys checked with ``check_keys``; ``model`` must be
            the local directory.
        drafter: that directory's config.

    Raises:
        OptionError: a value of the wrong type or out of range.
    """

    def pick(name: str, default: Any) -> tuple[Any, str]:
        if user.get(name) is not None:
            return user[name], "speculative_config"
        if name in drafter.defaults:
            return drafter.defaults[name], "the drafter's config.json"
        return default, "the default"

    def integer(name: str, default: int, minimum: int) -> int:
        value, source = pick(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise OptionError(
                f"{name} is {value!r} in {source}; it must be an integer >= {minimum}."
            )
        return value

    beam_width = integer("beam_width", DEFAULT_BEAM_WIDTH, 1)
    draft_length = integer("draft_length", DEFAULT_DRAFT_LENGTH, 1)
    top_k = integer("top_k", DEFAULT_TOP_K, 0)
    tree, source = pick("tree", DEFAULT_TREE)
    if tree not in TREE_RULES:
        raise OptionError(
            f"tree is {tree!r} in {source}; it must be one of {', '.join(TREE_RULES)}."
        )
    # A draft has at most W candidates at each of L depths: more nodes can never be filled.
    most_nodes = beam_width * draft_length
    nodes = integer("num_speculative_tokens", min(most_nodes, DEFAULT_MAX_NODES), 1)
    schedule = user.get(SCHEDULE)
    # A fixed number that the user asked for is not overruled by the drafter's own schedule.
    if schedule is None and user.get("num_speculative_tokens") is None:
        schedule = drafter.defaults.get(SCHEDULE)
    return ReDrafterOptions(
        num_speculative_tokens_per_batch_size=_schedule(schedule),
        model=str(user["model"]),
        num_speculative_tokens=min(nodes, most_nodes),
        beam_width=beam_width,
        draft_length=draft_length,
        tree=tree,
        top_k=top_k,
    )


def _schedule(value: Any) -> tuple[tuple[int, int, int], ...]:
    """Check a schedule by batch size; the rules are those of vLLM's key of the same name."""
    if value is None:
        return ()
    problem = OptionError(
        f"{SCHEDULE} is {value!r}; it must be a list of [first, last, nodes] with ranges of batch "
        "sizes that start at 1, rise without overlap, and hold 0 or more nodes."
    )
    if not isinstance(value, (list, tuple)) or not value:
        raise problem
    entries = []
    for entry in value:
        if not isinstance(entry, (list, tuple)) or len(entry) != 3:
            raise problem
        if any(isinstance(item, bool) or not isinstance(item, int) for item in entry):
            raise problem
        entries.append(tuple(entry))
    entries.sort()
    previous_last = 0
    for first, last, nodes in entries:
        if not previous_last < first <= last or nodes < 0:
            raise problem
        previous_last = last
    if entries[0][0] != 1:
        raise problem
    return tuple(entries)
