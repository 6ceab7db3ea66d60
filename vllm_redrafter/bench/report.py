# SPDX-License-Identifier: Apache-2.0
"""What the demo prints: one answer, a table, and how equal the outputs are."""

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from vllm_redrafter.bench.compare import BUSY_CORES, Comparison, Equality
from vllm_redrafter.bench.own_counters import SOURCES


def results_table(comparison: Comparison, labels: Mapping[str, str]) -> RenderableType:
    """One column per variant, one row per figure, under a line that says what ran.

    Args:
        comparison: a finished comparison.
        labels: column heads by variant; a variant without one shows its name.
    """
    names = list(comparison.variants)
    summaries = {name: comparison.summary(name) for name in names}
    ratios = {name: comparison.ratio(name) for name in names if name != comparison.baseline}
    table = Table()
    table.add_column("")
    for name in names:
        table.add_column(labels.get(name, name), justify="right")

    def row(head: str, cell: "dict[str, str]") -> None:
        table.add_row(head, *(cell.get(name, "–") for name in names))

    row("tokens/s", {n: f"{s.tokens_per_second:.1f}" for n, s in summaries.items()})
    row("ratio to plain, all tokens", {n: f"{r.overall:.2f}" for n, r in ratios.items()})
    row("  median of pairs", {n: f"{r.median:.2f}" for n, r in ratios.items()})
    row("  quartiles of pairs", {n: f"{r.low:.2f} – {r.high:.2f}" for n, r in ratios.items()})
    row(
        "  each round alone",
        {n: " ".join(f"{value:.2f}" for value in r.per_round) for n, r in ratios.items()},
    )
    row(
        "acceptance length",
        {n: f"{s.acceptance_length:.2f}" for n, s in summaries.items() if s.acceptance_length},
    )
    row(
        "accepted at depth 1, 2, ...",
        {
            n: " ".join(f"{share:.2f}" for share in s.accepted_at_depth if share)
            for n, s in summaries.items()
            if s.accepted_at_depth
        },
    )
    row(
        "drafted nodes per step",
        {n: f"{s.nodes_per_step:.1f}" for n, s in summaries.items() if s.nodes_per_step},
    )
    row(
        "accepted from drafter / lookup / both",
        {
            n: " / ".join(f"{s.accepted_by_source.get(name, 0):.0%}" for name in SOURCES)
            for n, s in summaries.items()
            if s.accepted_by_source
        },
    )
    row("ms per step", {n: f"{s.ms_per_step:.1f}" for n, s in summaries.items()})
    row(
        "  of it, drafting",
        {
            n: f"{s.part_ms_per_step['draft']:.1f}"
            for n, s in summaries.items()
            if "draft" in s.part_ms_per_step
        },
    )
    row("peak memory, GB", {n: f"{s.peak_rss_bytes / 1e9:.2f}" for n, s in summaries.items()})
    row(
        "outputs equal to plain",
        {n: equality_text(comparison.equality(n)) for n in names if n != comparison.baseline},
    )
    return Group(Text(_title(comparison), style="bold"), table)


def equality_text(equality: Equality) -> str:
    """`"7 of 8 (88 %)"`; 100 % only when all are equal, 0 % only when none is."""
    percent = 100 * equality.share
    if 0 < equality.equal < equality.total:
        percent = min(max(percent, 1), 99)
    return f"{equality.equal} of {equality.total} ({percent:.0f} %)"


def notes(comparison: Comparison) -> list[str]:
    """Sentences that belong under the table: what was timed, loops, fallbacks, equality."""
    lines = [
        "Times are wall time of whole requests, prefill and decode; engine start-up is not in "
        "them. A step is one forward pass of the target over all rows."
    ]
    load = comparison.other_load()
    if load > BUSY_CORES:
        lines.append(
            f"The machine was busy: other programs used {load:.1f} cores while these runs were "
            "timed. Do not quote the times and ratios; waiting threads suffer unevenly from it."
        )
    looping = comparison.looping_groups()
    all_groups = {run.group for run in comparison.runs}
    others = [name for name in comparison.variants if name != comparison.baseline]
    if looping and looping != all_groups:
        without = ", ".join(
            f"{name} {comparison.ratio(name, all_groups - looping).overall:.2f}" for name in others
        )
        unit = "answers" if comparison.settings.batch_size == 1 else "batches hold answers that"
        lines.append(
            f"{len(looping)} of {len(all_groups)} {unit} go in circles, which is easy to draft "
            f"for. Ratio without them: {without}."
        )
    for name in comparison.variants:
        fallbacks = comparison.summary(name).fallbacks
        if fallbacks:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in fallbacks.items())
            lines.append(f"{name} gave up drafts {sum(fallbacks.values())} times ({reasons}).")
        if not comparison.is_repeatable(name):
            lines.append(f"{name} did not give the same tokens in every round.")
    self_equality = comparison.self_equality()
    if self_equality is not None:
        lines.append(
            f"Yardstick for {comparison.settings.dtype}: plain vLLM at batch size "
            f"{comparison.other_batch_size} equals plain vLLM at batch size "
            f"{comparison.settings.batch_size} in {equality_text(self_equality)}. Its kernels "
            "round differently for other row counts, and near-ties then fall either way."
        )
    return lines


def exactness_line(comparison: Comparison, variant: str) -> Text:
    """The verdict on equality in float32."""
    equality = comparison.equality(variant)
    verdict = Text("float32: ", style="bold")
    exact = equality.equal == equality.total
    verdict.append(
        f"outputs equal to plain vLLM: {equality_text(equality)}",
        style="bold green" if exact else "bold red",
    )
    if not exact:
        verdict.append(
            f"; first differences at token {', '.join(map(str, equality.first_differences))}. "
            "Unless plain vLLM has two tokens there that are equal up to rounding (README, What is "
            "exact), this is a defect: please report it."
        )
    return verdict


def answer_panel(question: str, answer: str) -> RenderableType:
    """One question and the answer that ReDrafter gave."""
    body = Group(Text(question, style="bold"), Text(""), Text(answer.strip()))
    return Panel(body, title="one answer", title_align="left")


def _title(comparison: Comparison) -> str:
    settings = comparison.settings
    prompts = len({prompt for run in comparison.runs for prompt in run.prompts})
    return (
        f"{settings.dtype}, batch size {settings.batch_size}, {prompts} prompts, "
        f"up to {settings.max_tokens} tokens, {settings.rounds} round{'s'[: settings.rounds > 1]}, "
        f"{settings.num_threads} threads"
    )
