# SPDX-License-Identifier: Apache-2.0
"""The user's JSON object, validated: one place for keys, defaults and messages."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_redrafter.drafter.config import DrafterConfig
from vllm_redrafter.lookup.sizes import MAX_CHAINS, MAX_DEPTH
from vllm_redrafter.tree.rules import TREE_RULES

METHOD = "redrafter"

# What a drafter without defaults of its own gets. Chosen for small batches; see the README's table.
DEFAULT_BEAM_WIDTH = 4
DEFAULT_DRAFT_LENGTH = 3
DEFAULT_TREE = "best"
DEFAULT_TOP_K = 0
DEFAULT_MAX_NODES = 15
# The most that a measured budget may spend on one request.
DEFAULT_MAX_BUDGET = 24

BUDGETS = ("auto", "fixed")

# Bounds of what a draft may cost. The CUDA kernels are compiled for so many beams, and on a CPU a
# draft's time grows with beams x length: 4,096 beams took 6 s. A step that checks more than some
# hundred rows for one request takes longer than the steps that it saves.
MOST_BEAMS = 64
MOST_DRAFT_LENGTH = 64
MOST_LOOKUP_TOKENS = 256
# Merging more takes time, and what is behind so many is no likely chain.
MOST_CHAIN_PATHS = 128
# Counts go to the operators as int32 or int64, and no vocabulary is larger.
MOST_TOP_K = 2**31 - 1


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
        prompt_lookup: continuations from the request's own prompt and output compete with the
            drafter's candidates (``vllm_redrafter.lookup``).
        prompt_lookup_num_tokens: how far such a continuation is followed.
        node_budget: ``auto``: every step verifies as many nodes as pay by measured costs, up to
            ``num_speculative_tokens`` per request; ``fixed``: always that many.
        cost_table: a file of ``vllm-redrafter calibrate``; empty: measured at start-up.
        fail_on_target_mismatch: refuse to start when the drafter's fingerprint of its target
            (``vllm_redrafter.drafter.fingerprint``) is not that of the target; else warn.
    """

    model: str
    num_speculative_tokens: int
    beam_width: int = DEFAULT_BEAM_WIDTH
    draft_length: int = DEFAULT_DRAFT_LENGTH
    tree: str = DEFAULT_TREE
    top_k: int = DEFAULT_TOP_K
    num_speculative_tokens_per_batch_size: tuple[tuple[int, int, int], ...] = ()
    prompt_lookup: bool = True
    prompt_lookup_num_tokens: int = MAX_DEPTH
    node_budget: str = "auto"
    cost_table: str = ""
    fail_on_target_mismatch: bool = False

    @property
    def max_depth(self) -> int:
        """The deepest node that a tree can have."""
        deepest = self.draft_length
        if self.prompt_lookup:
            deepest = max(deepest, self.prompt_lookup_num_tokens)
        return min(deepest, self.num_speculative_tokens)

    @property
    def chain_paths(self) -> int:
        """Among how many of the likeliest nodes a chain is chosen: the likeliest few may hold a
        short one."""
        paths = self.beam_width * self.draft_length
        if self.prompt_lookup:
            paths += MAX_CHAINS * self.prompt_lookup_num_tokens
        return min(paths, MOST_CHAIN_PATHS)

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


def for_chains(options: ReDrafterOptions, chosen: bool, keeps_states: bool) -> ReDrafterOptions:
    """The options of a target that has chains verified: no more nodes than a chain can have.

    Args:
        chosen: the user gave ``num_speculative_tokens``.
        keeps_states: every node has the target keep a state of its layers; then there are as many
            as the drafter drafts along a path, unless more were asked for.
    """
    most = options.draft_length if keeps_states and not chosen else options.max_depth
    return dataclasses.replace(
        options, num_speculative_tokens=min(options.num_speculative_tokens, most)
    )


SCHEDULE = "num_speculative_tokens_per_batch_size"

# Not an option of the engine: which version of a drafter on the hub to load.
REVISION = "revision"

VALID_KEYS = ("method", *(field.name for field in dataclasses.fields(ReDrafterOptions)), REVISION)


def is_method(value: Any) -> bool:
    """Whether ``method`` asks for ReDrafter; upper and lower case are the same."""
    return isinstance(value, str) and value.strip().lower() == METHOD


def check_keys(user: Mapping[str, Any]) -> None:
    """Raise OptionError, listing the valid keys, if ``user`` holds an unknown one."""
    unknown = [key for key in user if key not in VALID_KEYS]
    if unknown:
        raise OptionError(
            f"speculative_config has the unknown key {unknown[0]!r}; ReDrafter's keys are "
            f"{', '.join(VALID_KEYS)}."
        )


def resolve_options(
    user: Mapping[str, Any], drafter: DrafterConfig, *, fixed_rows: bool = False
) -> ReDrafterOptions:
    """Fill in what the user left out: from the drafter's config.json, then sensible values.

    Args:
        user: the speculative_config as given, keys checked with ``check_keys``; ``model`` must be
            the local directory.
        drafter: that directory's config.
        fixed_rows: the engine verifies the same number of nodes for every request of a step, as
            Model Runner V2 does.

    Raises:
        OptionError: a value of the wrong type or out of range.
    """

    def pick(name: str, default: Any) -> tuple[Any, str]:
        if user.get(name) is not None:
            return user[name], "speculative_config"
        if name in drafter.defaults:
            return drafter.defaults[name], "the drafter's config.json"
        return default, "the default"

    def integer(name: str, default: int, minimum: int, maximum: int | None = None) -> int:
        value, source = pick(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise OptionError(
                f"{name} is {value!r} in {source}; it must be an integer >= {minimum}."
            )
        if maximum is not None and value > maximum:
            raise OptionError(f"{name} is {value} in {source}; it must be {maximum} or less.")
        return value

    def choice(name: str, default: str, allowed: tuple[str, ...]) -> str:
        value, source = pick(name, default)
        if value not in allowed:
            raise OptionError(
                f"{name} is {value!r} in {source}; it must be one of {', '.join(allowed)}."
            )
        return value

    beam_width = integer("beam_width", DEFAULT_BEAM_WIDTH, 1, MOST_BEAMS)
    draft_length = integer("draft_length", DEFAULT_DRAFT_LENGTH, 1, MOST_DRAFT_LENGTH)
    top_k = integer("top_k", DEFAULT_TOP_K, 0, MOST_TOP_K)
    tree = choice("tree", DEFAULT_TREE, TREE_RULES)
    # Apple's rule knows beams alone, in an order of their own: no other sources, no best part.
    lookup = _lookup(*pick("prompt_lookup", tree != "beams"), tree)
    lookup_tokens = integer("prompt_lookup_num_tokens", MAX_DEPTH, 1, MOST_LOOKUP_TOKENS)
    budget = choice("node_budget", "fixed" if tree == "beams" else "auto", BUDGETS)
    if budget == "auto" and tree == "beams":
        raise OptionError(
            "node_budget is 'auto', but tree 'beams' does not order its nodes by probability; set "
            "node_budget to 'fixed' or tree to 'best'."
        )
    # No further candidates can exist: more nodes could never be filled.
    most_nodes = beam_width * draft_length + (MAX_CHAINS * lookup_tokens if lookup else 0)
    nodes = integer("num_speculative_tokens", min(most_nodes, DEFAULT_MAX_NODES), 1)
    if budget == "auto" and not fixed_rows and user.get("num_speculative_tokens") is None:
        # The measured budget decides: the drafter's number was chosen for one machine.
        nodes = DEFAULT_MAX_BUDGET
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
        prompt_lookup=lookup,
        prompt_lookup_num_tokens=lookup_tokens,
        node_budget=budget,
        cost_table=_path(user.get("cost_table")),
        fail_on_target_mismatch=_flag(user, "fail_on_target_mismatch"),
    )


def _lookup(value: Any, source: str, tree: str) -> bool:
    if not isinstance(value, bool):
        raise OptionError(f"prompt_lookup is {value!r} in {source}; it must be true or false.")
    if value and tree == "beams":
        raise OptionError(
            "prompt_lookup is true, but tree 'beams' holds the drafter's beams alone; set "
            "prompt_lookup to false or tree to 'best'."
        )
    return value


def _flag(user: Mapping[str, Any], name: str) -> bool:
    value = user.get(name)
    if value is not None and not isinstance(value, bool):
        raise OptionError(
            f"{name} is {value!r} in speculative_config; it must be true or false."
        )
    return bool(value)


def _path(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise OptionError(
            f"cost_table is {value!r} in speculative_config; it must be the path of a file that "
            "`vllm-redrafter calibrate` wrote."
        )
    return value


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
