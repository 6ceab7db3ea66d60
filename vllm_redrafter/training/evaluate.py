# SPDX-License-Identifier: Apache-2.0
"""What a drafter is worth on recorded greedy answers: a replay of vLLM's steps, without vLLM.

A draft depends on a hidden state of the target and on the token after it, and on a greedy answer
both are known. So all positions are drafted at once, in chunks, and the steps of every answer are
then only jumps over the numbers of accepted tokens.

Counting is that of vLLM's ``spec_decode`` metrics: the first token of an answer comes from prefill,
every later step makes one draft, and the acceptance length is 1 + accepted / drafts. The end of an
answer needs two facts that its tokens do not hold:

* A draft may go on correctly behind the end. vLLM counts such tokens in the last step of a request,
  although it throws them away: they measure the drafter, not the speed. A recording can carry what
  the target would have said next (``continuation``, at least a draft long); then the replay counts
  them as well. Without it nothing is accepted behind the end, and the figure is a little lower.
* A request that ``max_tokens`` ends makes no draft when one token is left. A recording can say so
  (``finish_reason`` "length"); without it every step but the first drafts.

With both, the counts are vLLM's, request by request, wherever the engine's logits and these agree
on every argmax.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_redrafter import __version__
from vllm_redrafter.drafter.checkpoint import load_drafter
from vllm_redrafter.drafter.config import DrafterError
from vllm_redrafter.drafter.model import Drafter
from vllm_redrafter.ops.build_tree import build_tree
from vllm_redrafter.ops.draft import CompiledDraft
from vllm_redrafter.ops.walk import walk
from vllm_redrafter.training.answers import Recorded, read_answers
from vllm_redrafter.training.errors import TrainingError
from vllm_redrafter.training.files import make_directory, write_atomic, write_json
from vllm_redrafter.training.log import can_plot
from vllm_redrafter.training.options import EvalOptions
from vllm_redrafter.training.repeats import LOOPING
from vllm_redrafter.training.target import (
    Target,
    choose_device,
    padded_groups,
    tokenizer_sha256,
)

TOP = 5
NO_TOKEN = -1  # behind an answer's end; no drafted token equals it
# Numbers of one chunk's logits (positions x beams x vocabulary): 128 MiB in float32.
_CHUNK_LOGITS = 1 << 25
# bfloat16 kernels of another engine flip near ties now and then; other answers differ much more.
_EXPECTED_AGREEMENT = 0.9

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Setting:
    """Beam width W, draft length L, and the most drafted nodes N of a tree."""

    beam_width: int
    draft_length: int
    num_nodes: int

    def __str__(self) -> str:
        return f"{self.beam_width},{self.draft_length},{self.num_nodes}"


@dataclass
class Counts:
    """Sums over steps, of one setting.

    Attributes:
        drafts: steps that drafted.
        accepted: drafted tokens that the target agreed with.
        nodes: drafted tokens in the trees, roots not among them.
    """

    drafts: int = 0
    accepted: int = 0
    nodes: int = 0

    def add(self, other: Counts) -> None:
        self.drafts += other.drafts
        self.accepted += other.accepted
        self.nodes += other.nodes

    @property
    def acceptance_length(self) -> float:
        """Tokens per drafting step; NaN without a step."""
        return 1 + self.accepted / self.drafts if self.drafts else math.nan


@dataclass
class Outcome:
    """One answer's results.

    Attributes:
        counts: by setting.
        hits: ``[D, 3]`` int64 by depth: positions, right first guesses, right among the top five.
        agreeing: answer tokens that are the target's own first choice.
    """

    counts: dict[Setting, Counts] = field(default_factory=dict)
    hits: Tensor = field(default_factory=lambda: torch.zeros(0, 3, dtype=torch.int64))
    agreeing: int = 0


@dataclass(frozen=True)
class Costs:
    """Measured milliseconds of one machine.

    Attributes:
        plain: a step without drafting.
        draft: one draft, by (W, L); a float counts for all.
        rows: ascending (rows, one pass of the target over so many rows with all that is not draft).
    """

    plain: float
    draft: float | dict[tuple[int, int], float]
    rows: tuple[tuple[float, float], ...]

    def draft_ms(self, setting: Setting) -> float:
        """Raises TrainingError when the file has no time for the setting's W and L."""
        if isinstance(self.draft, float):
            return self.draft
        key = (setting.beam_width, setting.draft_length)
        if key not in self.draft:
            raise TrainingError(
                f"--costs has no draft_ms for '{key[0]},{key[1]}', which the setting {setting} "
                "needs; add it, or leave the setting out."
            )
        return self.draft[key]

    def rows_ms(self, rows: float) -> float:
        """Between measured sizes on a straight line; outside them nothing is known.

        Raises:
            TrainingError: fewer or more rows than were measured.
        """
        lowest, highest = self.rows[0][0], self.rows[-1][0]
        if not lowest <= rows <= highest:
            raise TrainingError(
                f"--costs has rows_ms for {lowest:g} to {highest:g} rows, but {rows:.2f} are "
                "needed (the root and the drafted nodes); measure that size too."
            )
        before = self.rows[0]
        for after in self.rows:
            if rows <= after[0]:
                break
            before = after
        if after[0] == before[0]:
            return after[1]
        part = (rows - before[0]) / (after[0] - before[0])
        return before[1] + part * (after[1] - before[1])

    def speed_up(self, setting: Setting, counts: Counts) -> tuple[float, float]:
        """Milliseconds per step, and tokens per second against plain decoding (prefill apart)."""
        step = self.rows_ms(1 + counts.nodes / counts.drafts) + self.draft_ms(setting)
        return step, counts.acceptance_length * self.plain / step


def parse_settings(texts: Sequence[str]) -> list[Setting]:
    """``W,L,N`` each; doubled ones count once.

    Raises:
        TrainingError: not three whole numbers of at least 1.
    """
    settings: dict[Setting, None] = {}
    for text in texts:
        try:
            width, length, nodes = (int(part) for part in text.split(","))
        except ValueError:
            width = length = nodes = 0
        if min(width, length, nodes) < 1:
            raise TrainingError(
                f"--settings has {text!r}; a setting is W,L,N, three whole numbers of at least 1, "
                "such as 4,3,7."
            )
        settings[Setting(width, length, nodes)] = None
    return list(settings)


def read_costs(path: str | Path) -> Costs:
    """The file of ``--costs``.

    Raises:
        TrainingError: unreadable, or not of the form that ``--help`` shows.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"--costs {path} cannot be read: {error}") from error
    try:
        plain = _milliseconds(value["plain_ms"])
        draft = value["draft_ms"]
        if isinstance(draft, dict):
            draft = {_pair(key): _milliseconds(one, zero=True) for key, one in draft.items()}
        else:
            draft = _milliseconds(draft, zero=True)
        rows = sorted((float(int(key)), _milliseconds(v)) for key, v in value["rows_ms"].items())
        if not rows:
            raise ValueError("rows_ms is empty")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise TrainingError(
            f"--costs {path} is not of the form that --help shows ({what}): give plain_ms, "
            "draft_ms and rows_ms in milliseconds."
        ) from error
    return Costs(plain, draft, tuple(rows))


def _milliseconds(value: Any, zero: bool = False) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (value > 0 or (zero and value == 0)) or math.isinf(value):
        raise ValueError(f"{value!r} is not a time")
    return float(value)


def _pair(key: str) -> tuple[int, int]:
    width, length = key.split(",")
    return int(width), int(length)


def steps_of(accepted: Sequence[int], nodes: Sequence[int]) -> Counts:
    """Decode one answer: jump over what every draft on the way gets accepted.

    Args:
        accepted: by position p of the known token, from 0 on while drafts are made: how many
            tokens of the draft made there agree with the answer (and its continuation).
        nodes: drafted tokens in the tree at each of these positions.
    """
    counts, at = Counts(), 0
    while at < len(accepted):
        counts.add(Counts(1, accepted[at], nodes[at]))
        at += accepted[at] + 1
    return counts


class Replay:
    """A drafter at several settings over the hidden states of answers.

    Memory: on the CPU every pair of W and L among the settings packs the drafter's layers once.

    Args:
        drafter: with its embedding bound, on one device.
        settings: at least one.
        rule: ``best`` or ``beams``.
    """

    def __init__(self, drafter: Drafter, settings: Sequence[Setting], rule: str) -> None:
        self.drafter, self.settings, self.rule = drafter, list(settings), rule
        self.depth = max(setting.draft_length for setting in settings)
        self._drafts: dict[tuple[int, int], CompiledDraft] = {}
        for s in settings:
            key = (s.beam_width, s.draft_length)
            if key not in self._drafts:
                self._drafts[key] = CompiledDraft(
                    drafter, beam_width=s.beam_width, draft_length=s.draft_length
                )

    def accepted(self, context: Tensor, following: Tensor) -> dict[Setting, tuple[Tensor, Tensor]]:
        """Draft at every position and walk the trees along the answer.

        Args:
            context: ``[P, H]``, the hidden states that predicted the known tokens.
            following: ``[P, >= depth + 2]`` int64, the known token, those after it, and NO_TOKEN
                behind the end.

        Returns:
            By setting: accepted tokens ``[P]`` and drafted nodes ``[P]``, int64, on the CPU.
        """
        parts: dict[Setting, list[tuple[Tensor, Tensor]]] = {s: [] for s in self.settings}
        for (width, length), draft in self._drafts.items():
            mine = [s for s in self.settings if (s.beam_width, s.draft_length) == (width, length)]
            size = self._chunk(width)
            for states, tokens in zip(context.split(size), following.split(size), strict=True):
                beams = draft(states, tokens[:, 0].contiguous())
                for setting in mine:
                    tree, _ = build_tree(beams, self.rule, setting.num_nodes)
                    # On the accepted path the target's choice at depth d is the answer's token.
                    choices = tokens.gather(1, tree.depths.clamp(0, length) + 1)
                    count = walk(tree, choices).num_accepted
                    parts[setting].append((count.cpu(), (tree.num_nodes - 1).cpu()))
        return {
            setting: (torch.cat([a for a, _ in chunks]), torch.cat([n for _, n in chunks]))
            for setting, chunks in parts.items()
        }

    @torch.inference_mode()
    def hits(self, context: Tensor, following: Tensor) -> Tensor:
        """Teacher-forced guesses: the state at depth i was fed with the answer's own tokens.

        Args:
            context, following: as in ``accepted``.

        Returns:
            ``[P, depth, 3]`` bool on the CPU: whether the answer has a token there, whether it is
            the first guess, whether it is among the first five.
        """
        parts = []
        size = self._chunk(1)
        for states, tokens in zip(context.split(size), following.split(size), strict=True):
            state = self.drafter.initial_state(len(tokens))
            depths = []
            for i in range(self.depth):
                # Behind the end there is no token to feed; what comes of token 0 is not counted.
                logits, state = self.drafter(states, tokens[:, i].clamp(min=0), state)
                truth = tokens[:, i + 1]
                best = logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices
                right = self.drafter.to_target_ids(best) == truth[:, None]
                depths.append(torch.stack([truth != NO_TOKEN, right[:, 0], right.any(1)], 1))
            parts.append(torch.stack(depths, 1).cpu())
        return torch.cat(parts)

    def _chunk(self, width: int) -> int:
        return max(1, _CHUNK_LOGITS // (width * self.drafter.config.draft_vocab_size))


def following_tokens(answer: Sequence[int], depth: int, continuation: Sequence[int] = ()) -> Tensor:
    """``[len(answer) - 1, depth + 2]`` int64: row p holds the answer from p on, then NO_TOKEN.

    Args:
        continuation: stands behind the answer, before NO_TOKEN.
    """
    padded = torch.tensor([*answer, *continuation, *[NO_TOKEN] * (depth + 1)], dtype=torch.int64)
    return padded.unfold(0, depth + 2, 1)[: len(answer) - 1]


def replay(
    target: Target,
    replayer: Replay,
    answers: Sequence[Recorded],
    *,
    group_tokens: int = 8192,
    progress: Progress = lambda done, total: None,
) -> list[Outcome]:
    """Results of every answer, in their order.

    Args:
        group_tokens: texts, padding included, whose hidden states are computed at once; one text
            may be longer.
        progress: called as ``progress(answers done, answers in all)``.
    """
    outcomes: list[Outcome] = [Outcome() for _ in answers]
    done = 0
    for members in padded_groups([len(a.prompt + a.answer) for a in answers], group_tokens):
        states = target.hidden([torch.tensor(answers[i].prompt + answers[i].answer)
                                for i in members])  # fmt: skip
        context, following, continued, lengths = [], [], [], []
        for i, hidden in zip(members, states, strict=True):
            first, length = len(answers[i].prompt) - 1, len(answers[i].answer)
            predicting = hidden[first : first + length]
            outcomes[i].agreeing = _agreeing(target, predicting, answers[i].answer)
            context.append(predicting[:-1])  # the last token is the known one of no step
            following.append(following_tokens(answers[i].answer, replayer.depth))
            continued.append(
                following_tokens(answers[i].answer, replayer.depth, answers[i].continuation)
            )
            lengths.append(length - 1)
        if sum(lengths):
            rows = torch.cat(context)
            accepted = replayer.accepted(rows, torch.cat(continued).to(target.device))
            hits = replayer.hits(rows, torch.cat(following).to(target.device))
        for at, i in enumerate(members):
            begin = sum(lengths[:at])
            end = begin + lengths[at]
            if begin == end:
                outcomes[i].counts = {setting: Counts() for setting in replayer.settings}
                outcomes[i].hits = torch.zeros(replayer.depth, 3, dtype=torch.int64)
                continue
            outcomes[i].hits = hits[begin:end].sum(0)
            end = begin + answers[i].drafting_positions
            for setting, (count, nodes) in accepted.items():
                outcomes[i].counts[setting] = steps_of(
                    count[begin:end].tolist(), nodes[begin:end].tolist()
                )
        done += len(members)
        progress(done, len(answers))
    return outcomes


@torch.inference_mode()
def _agreeing(target: Target, predicting: Tensor, answer: Sequence[int]) -> int:
    """How many tokens are the argmax of the target (its logits' scale and cap change no argmax)."""
    wanted = torch.tensor(answer, device=predicting.device)
    size = max(1, _CHUNK_LOGITS // target.vocab_size)
    same = 0
    for states, tokens in zip(predicting.split(size), wanted.split(size), strict=True):
        same += int(((states.to(target.head.dtype) @ target.head.T).argmax(-1) == tokens).sum())
    return same


def recommend(predictions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The setting with the best predicted speed-up; none without predictions or above 1.

    Returns:
        ``{"setting": "W,L,N" or None, "why": one sentence}``.
    """
    if not predictions:
        return {
            "setting": None,
            "why": "No setting is recommended, because no costs were given: more nodes accept "
            "more and make a step dearer, and only times of your machine can weigh that (--costs).",
        }
    best = max(predictions, key=lambda entry: entry["speed_up"])
    if best["speed_up"] <= 1:
        return {
            "setting": None,
            "why": "No setting is recommended, because none is predicted to be faster than "
            f"plain decoding (best: {best['setting']}, {best['speed_up']:.2f} times its speed).",
        }
    return {
        "setting": best["setting"],
        "why": f"Recommended is {best['setting']}, the best prediction: {best['speed_up']:.2f} "
        "times the speed of plain decoding, by the costs that were given.",
    }


def evaluate(options: EvalOptions, progress: Progress = lambda done, total: None) -> dict[str, Any]:
    """Replay, and write ``report.json``, ``report.md`` and, with matplotlib, ``acceptance.png``.

    Args:
        progress: called as ``progress(answers done, answers in all)``.

    Returns:
        what ``report.json`` holds.

    Raises:
        TrainingError: models, answers, settings, costs or disk do not allow it.
    """
    settings = parse_settings(options.settings)
    costs = read_costs(options.costs) if options.costs else None
    if costs is not None:
        for s in settings:  # what the file lacks is better told before the work than after it
            costs.draft_ms(s)
            costs.rows_ms(1 + min(s.num_nodes, s.beam_width * s.draft_length))
    out = Path(options.out)
    make_directory(out)
    target = Target(options.target, options.target_dtype, choose_device(options.device))
    answers = read_answers(options.answers, target.vocab_size, tokenizer_sha256(options.target))
    drafter = load_served(options.drafter, target)
    replayer = Replay(drafter, settings, options.tree)
    outcomes = replay(
        target, replayer, answers, group_tokens=options.group_tokens, progress=progress
    )
    groups = _grouped(answers, outcomes, settings)
    predictions = []
    if costs is not None:
        for setting in settings:
            total = _summed(outcomes, setting)
            step, speed_up = costs.speed_up(setting, total)
            predictions.append({"setting": str(setting), "step_ms": step, "speed_up": speed_up})
    agreement = sum(o.agreeing for o in outcomes) / sum(len(a.answer) for a in answers)
    warnings = _short_continuations(answers, replayer.depth)
    if agreement < _EXPECTED_AGREEMENT:
        warnings.append(
            f"only {agreement:.1%} of the answers' tokens are the target's first choice; the "
            "replay is only right for greedy answers of this target to these very prompts."
        )
    report = {
        "version": __version__,
        "target": target.name,
        "drafter": Path(options.drafter).resolve().name,
        "dtype": str(target.head.dtype).removeprefix("torch."),
        "drafter_dtype": str(drafter.dtype).removeprefix("torch."),
        "tree": options.tree,
        "top_k": drafter.config.defaults.get("top_k", 0),
        "agreement": agreement,
        "continued": sum(bool(recorded.continuation) for recorded in answers),
        "warnings": warnings,
        "groups": groups,
        "predictions": predictions,
        "recommendation": recommend(predictions),
    }
    picture = out / "acceptance.png"
    if can_plot():
        _plot(report, picture)
    else:
        picture.unlink(missing_ok=True)  # an older run's picture would be taken for this one's
    write_json(out / "report.json", report)
    write_atomic(out / "report.md", markdown(report, picture.is_file()).encode())
    return report


def load_served(directory: str | Path, target: Target) -> Drafter:
    """The drafter as it is served: in the dtype in which it is stored, with the target's tables.

    Raises:
        TrainingError: no drafter, or not this target's.
    """
    try:
        drafter = load_drafter(
            directory, embedding=target.embedding.cpu(), lm_head=target.head.cpu()
        )
    except DrafterError as error:
        raise TrainingError(str(error)) from error
    drafter.embedding = target.embedding
    return drafter.to(target.device)


def _short_continuations(answers: Sequence[Recorded], depth: int) -> list[str]:
    """A warning when some continuations cannot hold all that a last draft might get accepted."""
    short = sum(0 < len(recorded.continuation) < depth - 1 for recorded in answers)
    if not short:
        return []
    return [
        f"{short} continuations have fewer than {depth - 1} tokens, so the longest drafts are not "
        "counted to their end in the last step; record longer ones."
    ]


def _summed(outcomes: Sequence[Outcome], setting: Setting) -> Counts:
    total = Counts()
    for outcome in outcomes:
        total.add(outcome.counts[setting])
    return total


def _grouped(
    answers: Sequence[Recorded], outcomes: Sequence[Outcome], settings: Sequence[Setting]
) -> list[dict[str, Any]]:
    """All answers first, then looping and other ones, then by category (if any has one)."""
    looping = [recorded.looping for recorded in answers]
    members: dict[tuple[str, str], list[int]] = {("all", "all"): list(range(len(answers)))}
    for name, wanted in (("not looping", False), ("looping", True)):
        members["loops", name] = [i for i, is_one in enumerate(looping) if is_one == wanted]
    if any(recorded.category is not None for recorded in answers):
        for name in sorted({recorded.category or "(none)" for recorded in answers}):
            members["category", name] = [
                i for i, recorded in enumerate(answers) if (recorded.category or "(none)") == name
            ]
    groups = []
    for (kind, name), indices in members.items():
        if not indices:
            groups.append({"kind": kind, "name": name, "answers": 0, "tokens": 0,
                           "settings": {}, "depths": []})  # fmt: skip
            continue
        chosen = [outcomes[i] for i in indices]
        results = {}
        for setting in settings:
            total = _summed(chosen, setting)
            results[str(setting)] = {
                "drafts": total.drafts,
                "accepted": total.accepted,
                # A number only where something was drafted: JSON has no NaN.
                "acceptance_length": total.acceptance_length if total.drafts else None,
                "nodes_per_draft": total.nodes / total.drafts if total.drafts else None,
            }
        hits = torch.stack([outcome.hits for outcome in chosen]).sum(0).tolist()
        depths = [
            {"depth": depth, "positions": n, "top1": top1 / n, f"top{TOP}": top / n}
            for depth, (n, top1, top) in enumerate(hits, start=1)
            if n
        ]
        groups.append({
            "kind": kind, "name": name, "answers": len(indices),
            "tokens": sum(len(answers[i].answer) for i in indices),
            "settings": results, "depths": depths,
        })  # fmt: skip
    return groups


def markdown(report: dict[str, Any], picture: bool) -> str:
    """The report for people.

    Args:
        report: as ``evaluate`` returns it.
        picture: whether acceptance.png lies beside it.
    """
    settings = list(report["groups"][0]["settings"])
    lines = [
        f"# {report['drafter']} for {report['target']}", "",
        f"Offline replay of recorded greedy answers: trees by the rule `{report['tree']}`, "
        f"the target in {report['dtype']}, the drafter in {report['drafter_dtype']}, top_k "
        f"{report['top_k']}. {report['agreement']:.1%} of the tokens are the target's first choice "
        "as computed here.", "",
        *[f"**Warning:** {text}\n" for text in report["warnings"]],
        report["recommendation"]["why"], "",
        "## Acceptance length", "",
        "1 + accepted tokens / drafts, as vLLM counts; the first token of an answer needs no "
        f"draft. {_ends(report['continued'], report['groups'][0]['answers'])} Columns: W,L,N. An "
        f"answer is looping when more than {LOOPING:.0%} of its 8-grams are repetitions.", "",
        *_table(
            ["answers", "count", "tokens", *settings],
            [[_cell(g["name"]), str(g["answers"]), str(g["tokens"]),
              *[_number(g["settings"].get(s, {}).get("acceptance_length"), 3) for s in settings]]
             for g in report["groups"]],
        ), "",
    ]  # fmt: skip
    if report["predictions"]:
        lines += ["## Predicted speed-up", "",
                  "Not a measurement: acceptance length x plain_ms / (draft_ms + rows_ms at the "
                  "mean number of rows), from the given costs, without prefill.", "",
                  *_table(["W,L,N", "ms per step", "speed-up"],
                          [[p["setting"], f"{p['step_ms']:.2f}", f"{p['speed_up']:.2f}"]
                           for p in report["predictions"]]), ""]  # fmt: skip
    lines += ["## Accuracy by depth", "",
              "Teacher forced: at every depth the state was fed with the answer's own tokens.", "",
              *_table(["answers", "depth", "positions", "top-1", f"top-{TOP}"],
                      [[_cell(g["name"]), str(d["depth"]), str(d["positions"]),
                        f"{d['top1']:.3f}", f"{d[f'top{TOP}']:.3f}"]
                       for g in report["groups"] for d in g["depths"]]), ""]  # fmt: skip
    lines.append(
        "![acceptance](acceptance.png)" if picture
        else "No acceptance.png: it needs `matplotlib` (pip install 'vllm-redrafter[train]')."
    )  # fmt: skip
    return "\n".join(lines) + "\n"


def _ends(continued: int, answers: int) -> str:
    """What counts behind the end of an answer."""
    if continued == answers:
        return "What is accepted behind an answer's end counts, as in vLLM's counters."
    which = "" if not continued else f"Of {answers - continued} answers without continuation "
    return (
        f"{which}{'nothing' if which else 'Nothing'} counts as accepted behind the end, where "
        "vLLM counts on to the end of the draft: its figure is a little higher."
    )


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _cell(text: str) -> str:
    """A name from the file must not end its cell or its line."""
    return " ".join(text.split()).replace("|", "\\|")


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _plot(report: dict[str, Any], path: Path) -> None:
    """Acceptance lengths by setting, and accuracies by depth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    settings = list(report["groups"][0]["settings"])
    shown = [g for g in report["groups"] if g["kind"] != "category" and g["answers"]]
    for i, group in enumerate(shown):
        heights = [group["settings"][s]["acceptance_length"] or 0 for s in settings]
        places = [at + (i - (len(shown) - 1) / 2) * 0.8 / len(shown) for at in range(len(settings))]
        left.bar(places, heights, 0.8 / len(shown), label=f"{group['name']} ({group['answers']})")
    left.set_xticks(range(len(settings)), settings)
    left.set(xlabel="W,L,N", ylabel="tokens per step", title="acceptance length")
    depths = report["groups"][0]["depths"]
    for key in ("top1", f"top{TOP}"):
        right.plot([d["depth"] for d in depths], [d[key] for d in depths], "o-", label=key)
    right.set_xticks([d["depth"] for d in depths])
    right.set(xlabel="depth", ylabel="share", ylim=(0, 1.05), title="right guesses, teacher forced")
    for axes in (left, right):
        axes.grid(alpha=0.3, axis="y")
        axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
