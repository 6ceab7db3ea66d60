# SPDX-License-Identifier: Apache-2.0
"""What a drafter is worth on recorded greedy answers: the replay, its costs and its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_redrafter import __version__
from vllm_redrafter.drafter.checkpoint import load_drafter
from vllm_redrafter.drafter.config import DrafterError
from vllm_redrafter.drafter.model import Drafter
from vllm_redrafter.lookup.sizes import MAX_CHAINS
from vllm_redrafter.training.answers import read_answers
from vllm_redrafter.training.costs import read_costs, recommend
from vllm_redrafter.training.errors import TrainingError
from vllm_redrafter.training.eval_report import grouped, markdown, plot, summed
from vllm_redrafter.training.files import make_directory, write_atomic, write_json
from vllm_redrafter.training.log import can_plot
from vllm_redrafter.training.options import EvalOptions
from vllm_redrafter.training.replay import Progress, Replay, Setting, replay
from vllm_redrafter.training.target import Target, choose_device, tokenizer_sha256

# bfloat16 kernels of another engine flip near ties now and then; other answers differ much more.
_EXPECTED_AGREEMENT = 0.9


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
            most = s.beam_width * s.draft_length + MAX_CHAINS * options.looked_up
            costs.rows_ms(1 + min(s.num_nodes, most))
    out = Path(options.out)
    make_directory(out)
    target = Target(options.target, options.target_dtype, choose_device(options.device))
    answers = read_answers(options.answers, target.vocab_size, tokenizer_sha256(options.target))
    drafter = load_served(options.drafter, target)
    budget = costs.by_nodes if options.node_budget == "auto" else None
    replayer = Replay(drafter, settings, options.tree, options.looked_up, budget)
    outcomes = replay(
        target, replayer, answers, group_tokens=options.group_tokens, progress=progress
    )
    groups = grouped(answers, outcomes, settings)
    predictions = []
    if costs is not None:
        for setting in settings:
            total = summed(outcomes, setting)
            step, speed_up = costs.speed_up(setting, total)
            predictions.append({"setting": str(setting), "step_ms": step, "speed_up": speed_up})
    agreement = sum(o.agreeing for o in outcomes) / sum(len(a.answer) for a in answers)
    warnings = []
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
        "lookup_tokens": options.looked_up,
        "node_budget": options.node_budget,
        "top_k": drafter.config.defaults.get("top_k", 0),
        "agreement": agreement,
        "warnings": warnings,
        "groups": groups,
        "predictions": predictions,
        "recommendation": recommend(predictions),
    }
    picture = out / "acceptance.png"
    if can_plot():
        plot(report, picture)
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
