# SPDX-License-Identifier: Apache-2.0
"""The training loop: from a dataset to a drafter directory, exact to the step when resumed."""

from __future__ import annotations

import io
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from vllm_redrafter.drafter.checkpoint import save_drafter
from vllm_redrafter.drafter.config import DrafterConfig
from vllm_redrafter.drafter.fingerprint import FIELD
from vllm_redrafter.reading import one_line, shown
from vllm_redrafter.training import vocabulary
from vllm_redrafter.training.batches import Group, Schedule, make_group, num_anchors, pack, split
from vllm_redrafter.training.dataset import check_fits, join, load_dataset
from vllm_redrafter.training.defaults import resolve
from vllm_redrafter.training.errors import TrainingError, missing
from vllm_redrafter.training.files import make_directory, write_atomic, write_json
from vllm_redrafter.training.fingerprint import of_target
from vllm_redrafter.training.log import Log, can_plot, plot
from vllm_redrafter.training.losses import linear_cross_entropy, why_not_compiled
from vllm_redrafter.training.model import TrainableDrafter
from vllm_redrafter.training.options import TrainOptions, decisive
from vllm_redrafter.training.start import load_start, with_shape_of
from vllm_redrafter.training.target import (
    Target,
    choose_device,
    tokenizer_sha256,
    with_finished_states,
)

CHECKPOINT = "checkpoint.pt"

# A sample large enough for means and spreads of hidden states.
_SAMPLE_TOKENS = 2048
# Held-out text that an evaluation looks at, at most.
_EVAL_TOKENS = 65_536

Progress = Callable[[int, int, dict[str, Any]], None]


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        out: directory of the drafter.
        steps: in all, those before a resumption included.
        coverage: share of the answers' tokens inside the draft vocabulary.
        last: the last line of the log that has held-out figures, else the last line.
        picture: curves.png, if it was drawn.
    """

    out: Path
    steps: int
    coverage: float
    last: dict[str, Any]
    picture: Path | None


def train(options: TrainOptions, progress: Progress | None = None) -> Result:
    """Train a drafter and write it to ``options.out``.

    Args:
        progress: called as ``progress(steps done, steps in all, log line)``.

    Raises:
        TrainingError: options, data, target or disk do not allow it; the message says what to do.
    """
    if options.tensorboard:
        _need_tensorboard()
    with _processes() as (rank, world, device_index):
        return _Run(options, rank, world, device_index).run(progress or (lambda *_: None))


class _Run:
    """One process's part of a run."""

    def __init__(self, options: TrainOptions, rank: int, world: int, local: int | None) -> None:
        self.options, self.rank, self.world = options, rank, world
        self.out = Path(options.out)
        self.aside = self.out / "training"
        self.device = choose_device(options.device, local)
        saved = self._read_checkpoint()
        datasets = [load_dataset(directory, options.max_length) for directory in options.data]
        self.target = Target(options.target, options.target_dtype, self.device)
        # First of all: the target must not be given tokens that it does not know.
        tokenizer = tokenizer_sha256(options.target) if any(d.manifest for d in datasets) else None
        for dataset, directory in zip(datasets, options.data, strict=True):
            check_fits(dataset, self.target.vocab_size, tokenizer, directory)
        self.dataset = join([with_finished_states(self.target, dataset) for dataset in datasets])
        begin = load_start(options, self.target)
        self.options = options = with_shape_of(options, begin)
        self.recipe = resolve(options, self.target.hidden_size, self.target.vocab_size)
        self.cache: dict[int, Tensor] | None = {} if options.cache else None
        self.members, self.held_out = split(self.dataset, options.held_out, options.seed)
        if not self.members:
            raise TrainingError(
                f"no sequence in '{', '.join(options.data)}' has two answer tokens in its first "
                f"{options.max_length}; make longer answers or raise --max-length."
            )
        self.vocabulary = vocabulary.choose(
            self.dataset,
            self.members,
            self.recipe.draft_vocab_size,
            self.target.vocab_size,
            # Rows that belong to a head of its own cannot be exchanged.
            fixed=None if begin is None or begin.config.shared_head else begin.draft_vocab,
        )
        self.offset_weights = offset_weights(options.offsets, options.offset_decay).to(self.device)
        ids = self.vocabulary.ids
        self.target_head = (
            self.target.head if ids is None else self.target.head[ids.to(self.device)]
        )
        self.row_of = self.vocabulary.rows.to(self.device)
        self.schedule = Schedule(
            self.members,
            [num_anchors(answer) for answer in self.dataset.answer],
            [len(tokens) for tokens in self.dataset.tokens],
            group_tokens=options.group_tokens,
            batch_size=self.recipe.batch_size,
            seed=options.seed,
            rank=rank,
            world=world,
        )
        self.steps = options.max_steps or self.schedule.steps(options.epochs)
        if not self.schedule.epoch(0):
            raise TrainingError(
                f"there are fewer groups of --group-tokens than the {world} processes; lower "
                "--group-tokens."
            )
        if options.compile and (reason := why_not_compiled(self.device)):
            raise TrainingError(
                f"--compile does not work here ({reason}); mend that, or leave --compile out."
            )
        torch.manual_seed(options.seed)
        self.model = self._model()
        if begin is not None:
            self.model.take(begin)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trained = trained
        self.optimizer = torch.optim.AdamW(
            trained, lr=self.recipe.lr, weight_decay=options.weight_decay
        )
        self.done = 0
        if saved is not None:
            self._restore(saved)
        if world > 1:
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                dist.broadcast(tensor.data, 0)

    def run(self, progress: Progress) -> Result:
        options = self.options
        log = None
        if self.rank == 0:
            make_directory(self.aside)
            write_json(self.aside / "options.json", self._deciding())
            log = Log(self.aside, self.done, options.tensorboard)
        last: dict[str, Any] = {}
        group, loaded = None, None
        totals = _Totals(options.offsets)
        began, positions = time.perf_counter(), 0
        for place in self.schedule.places(self.done):
            if self.done >= self.steps:
                break
            if loaded != (place.epoch, place.group):
                group = None  # before the next one takes its memory
                group, loaded = self._group(place.members), (place.epoch, place.group)
            at = self.schedule.positions(place, len(group.anchor)).to(self.device)
            lr = self._step(group, at, totals)
            positions += len(at) * self.world
            self.done += 1
            at_end = self.done == self.steps
            line = None
            if self.done % options.log_every == 0 or at_end:
                seconds = time.perf_counter() - began
                line = {"step": self.done, "epoch": place.epoch, "lr": lr, **totals.take(""),
                        "positions_per_second": round(positions / seconds, 1)}  # fmt: skip
                began, positions = time.perf_counter(), 0
            if self.held_out and (self.done % options.eval_every == 0 or at_end):
                line = {"step": self.done, **(line or {}), **self.evaluate()}
                began = time.perf_counter()
            if line is not None:
                if log is not None:
                    log.write(line)
                last = line if "eval_loss" in line or "eval_loss" not in last else last
                progress(self.done, self.steps, line)
            if self.rank == 0 and (self.done % options.save_every == 0 or at_end):
                self._save_checkpoint()
        picture = None
        if self.rank == 0:
            self._save()
            picture = plot(self.aside) if options.plot and can_plot() else None
        return Result(self.out, self.done, self.vocabulary.coverage, last, picture)

    def _step(self, group: Group, at: Tensor, totals: _Totals) -> float:
        """One step of the optimizer; returns the learning rate it took."""
        lr = self.recipe.lr * _schedule(self.done, self.steps, self.options.warmup)
        for settings in self.optimizer.param_groups:
            settings["lr"] = lr
        loss = self._loss(group, at, totals)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.world > 1:
            for parameter in self.trained:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.world
        torch.nn.utils.clip_grad_norm_(self.trained, self.options.clip)
        self.optimizer.step()
        return lr

    def _loss(self, group: Group, at: Tensor, totals: _Totals) -> Tensor:
        """Weighted sum over the offsets of the mean cross-entropy of the anchors ``at``."""
        options = self.options
        tokens, valid = group.tokens[at], group.valid[at]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=options.bf16):
            features = self.model(group.hidden[group.anchor[at]], tokens[:, :-1])
            features = features.flatten(0, 1)
            if options.bf16:
                features = features.bfloat16()
        label = self.row_of[tokens[:, 1:]]
        drafted = label >= 0
        teacher = None
        if options.loss == "hard":
            valid = valid & drafted
            rows = label
        else:
            wanted, rows = group.teacher_rows(at).unique(return_inverse=True)
            teacher = self.target.probabilities(group.hidden[wanted], self.target_head)
        # Offset by offset, as the features lie.
        share = self.offset_weights / valid.sum(0).clamp(min=1)
        scale = (valid * share).T.flatten().float()
        loss, per_row, best = linear_cross_entropy(
            features, self.model.head, rows.T.flatten(), scale, teacher, compiled=options.compile
        )
        shape = (options.offsets, len(at))
        right = (best.view(shape) == label.T) & drafted.T
        totals.add(per_row.view(shape), right, valid.T, group.valid[at].T)
        return loss

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Loss and accuracy by depth on the held-out sequences."""
        lengths = [len(tokens) for tokens in self.dataset.tokens]
        totals = _Totals(self.options.offsets)
        room = min(self.options.group_tokens, _EVAL_TOKENS)
        for members in pack(self.held_out, lengths, room)[: _EVAL_TOKENS // room]:
            group = self._group(members)
            for at in torch.arange(len(group.anchor), device=self.device).split(
                self.recipe.batch_size
            ):
                self._loss(group, at, totals)
        return totals.take("eval_")

    def _group(self, members: Any) -> Group:
        return make_group(
            self.target,
            self.dataset,
            members,
            offsets=self.options.offsets,
            cache=self.cache,
        )

    def _model(self) -> TrainableDrafter:
        options, target = self.options, self.target
        width = options.exit_dim or target.hidden_size
        if options.head != "own" and width != target.hidden_size:
            raise TrainingError(
                f"--head {options.head} needs --exit-dim {target.hidden_size}, the target's hidden "
                f"size, but it is {width}; leave --exit-dim out or give --head own."
            )
        config = DrafterConfig(
            vocab_size=target.vocab_size,
            hidden_size=target.hidden_size,
            exit_dim=width,
            num_draft_layers=self.recipe.blocks,
            rnn=options.rnn,
            draft_vocab_size=self.vocabulary.size,
            shared_head=options.head == "shared",
        )
        sample, rows = [], 0
        for i in self.members:
            if rows >= _SAMPLE_TOKENS:
                break
            group = make_group(target, self.dataset, [i], offsets=1)
            sample.append(group.hidden[group.anchor])
            rows += len(group.anchor)
        model = TrainableDrafter(
            config, target.embedding, self.target_head, options.head, torch.cat(sample).cpu()
        )
        return model.to(self.device)

    def _read_checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint to go on from, if asked for; refuses to write over an older run."""
        path = self.aside / CHECKPOINT
        if not self.options.resume:
            if path.is_file() or (self.out / "model.safetensors").is_file():
                raise TrainingError(
                    f"'{self.out}' already holds a drafter or a run; give --resume to go on with "
                    "it, or another --out."
                )
            return None
        if not path.is_file():
            return None
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle fails in any way
            raise TrainingError(
                f"'{path}' cannot be read ({type(error).__name__}); remove it to start anew."
            ) from error
        kinds = {"step": int, "options": dict, "members": list, "model": dict, "optimizer": dict,
                 "rng": Tensor}  # fmt: skip
        for name, kind in kinds.items():
            if not isinstance(saved, dict) or not isinstance(saved.get(name), kind):
                raise TrainingError(
                    f"'{path}' has no {name}, so it is no checkpoint; remove it to start anew."
                )
        return saved

    def _restore(self, saved: dict[str, Any]) -> None:
        now = self._deciding()
        for name, before in saved["options"].items():
            # Directories may have moved; what is in them is compared by other means.
            moves = name in ("target", "data", "out", "init")
            if not moves and not _equal(now.get(name), before):
                raise TrainingError(
                    f"the run in '{self.out}' had {shown(name)} {shown(before)}, now it is "
                    f"{now.get(name)!r}; resume with the same options, or give another --out."
                )
        if not _equal(saved["members"], self._fingerprint()):
            raise TrainingError(
                f"the run in '{self.out}' was on other data; resume with the same --data, or give "
                "another --out."
            )
        try:
            found = self.model.load_state_dict(saved["model"], strict=False)
            lost = set(found.missing_keys) - self._not_saved()
            if lost or found.unexpected_keys or saved["step"] < 0:
                raise ValueError(f"{len(lost)} tensors are missing, step {saved['step']}")
            self.optimizer.load_state_dict(saved["optimizer"])
            torch.set_rng_state(saved["rng"])
        except Exception as error:  # other shapes and types fail in any way
            raise TrainingError(
                f"'{self.aside / CHECKPOINT}' does not fit this run ({one_line(error)}); "
                "remove it to start anew."
            ) from error
        self.done = saved["step"]

    def _save_checkpoint(self) -> None:
        buffer = io.BytesIO()
        model = self.model.state_dict()
        for name in self._not_saved():
            del model[name]
        torch.save(
            {
                "step": self.done,
                "options": self._deciding(),
                "members": self._fingerprint(),
                "model": model,
                "optimizer": self.optimizer.state_dict(),
                "rng": torch.get_rng_state(),
            },
            buffer,
        )
        write_atomic(self.aside / CHECKPOINT, buffer.getvalue())

    def _not_saved(self) -> set[str]:
        """Tensors that no checkpoint holds: a shared head is frozen and large, and the target's."""
        shared = self.options.head == "shared"
        return {f"drafter.lm_head.{self.recipe.blocks}.weight"} if shared else set()

    def _deciding(self) -> dict[str, Any]:
        """Options that decide what comes out, with the recipe's values for those not given."""
        return {**decisive(self.options), **asdict(self.recipe), "world": self.world}

    def _fingerprint(self) -> list[int]:
        return [len(self.dataset), sum(map(len, self.dataset.tokens)), self.vocabulary.size]

    def _save(self) -> None:
        options = self.options
        dtype = getattr(torch, options.save_dtype)
        drafter = self.model.export(self.vocabulary.ids, dtype)
        fields: dict[str, Any] = {
            "target": self.target.name,
            FIELD: of_target(self.target, options.target).to_json(),
        }
        if options.offsets < 3:
            fields["draft_length"] = options.offsets  # deeper drafts were never trained
        try:
            save_drafter(drafter, self.out, **fields)
        except (OSError, RuntimeError) as error:
            raise TrainingError(
                f"the drafter cannot be written to '{self.out}' ({error}); the run is kept: free "
                "some space and run again with --resume."
            ) from error


def _equal(ours: Any, read: Any) -> bool:
    """``==`` for what a file says: tensors in it have no truth value."""
    try:
        return bool(ours == read)
    except RuntimeError:
        return False


class _Totals:
    """Sums for the log, by depth; read seldom, because on a GPU reading waits for it."""

    def __init__(self, offsets: int) -> None:
        self._sums: Tensor | None = None
        self._offsets = offsets

    def add(self, loss: Tensor, right: Tensor, weighed: Tensor, counted: Tensor) -> None:
        """All ``[K, P]``: losses, first guesses that hit, rows with a loss, rows with a token."""
        sums = torch.stack(
            [
                (loss * weighed).sum(1, dtype=torch.float64),
                weighed.sum(1).double(),
                (right & counted).sum(1).double(),
                counted.sum(1).double(),
            ]
        ).detach()
        self._sums = sums if self._sums is None else self._sums + sums

    def take(self, prefix: str) -> dict[str, Any]:
        """Mean loss and accuracy by depth since the last call."""
        loss, weighed, right, counted = self._sums.cpu().clamp(min=0)
        self._sums = None
        per_depth = loss / weighed.clamp(min=1)
        return {
            f"{prefix}loss": round(float(per_depth.mean()), 5),
            f"{prefix}top1": [round(v, 4) for v in (right / counted.clamp(min=1)).tolist()],
        }


def offset_weights(offsets: int, decay: float) -> Tensor:
    """``[K]`` float32, geometric, with the sum K: the learning rate means the same for all."""
    weights = decay ** torch.arange(offsets, dtype=torch.float64)
    return (weights * (offsets / weights.sum())).float()


def _schedule(step: int, steps: int, warmup: float) -> float:
    """The learning rate's factor at a step (from 0): a rising line, then a falling cosine."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


class _processes:
    """This process's rank, the number of processes and its local number under torchrun."""

    _ours = False

    def __enter__(self) -> tuple[int, int, int | None]:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return 0, 1, None
        local = int(os.environ["LOCAL_RANK"])
        if torch.cuda.is_available():
            torch.cuda.set_device(local)
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        self._ours = True
        return dist.get_rank(), world, local

    def __exit__(self, *exc: Any) -> None:
        # A caller's groups, an engine's for example, stay as they are.
        if self._ours:
            dist.destroy_process_group()


def _need_tensorboard() -> None:
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise missing("tensorboard", "--tensorboard", extra=False) from error
