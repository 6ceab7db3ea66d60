# SPDX-License-Identifier: Apache-2.0
"""Options of the commands `data`, `train` and `eval`: name, type, default and help together."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from vllm_redrafter.lookup.sizes import MAX_DEPTH
from vllm_redrafter.training.errors import TrainingError


def option(default: Any, help: str, **metadata: Any) -> Any:  # noqa: A002 - argparse's own word
    """A dataclass field that the command line and YAML files know by the same name."""
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class DataOptions:
    """`vllm-redrafter data`."""

    target: str | None = option(None, "directory of the target model", required=True)
    out: str | None = option(None, "directory to write; an interrupted run continues there",
                             required=True)  # fmt: skip
    prompts: str | None = option(
        None, 'prompts, one JSON object a line: {"prompt": "..."} or {"messages": [...]}; without '
        "--prompts and --hf-dataset the target invents them from its chat template")  # fmt: skip
    hf_dataset: str | None = option(
        None, "take prompts from this dataset of the Hugging Face hub (needs `datasets`)"
    )
    hf_split: str = option("train", "split of --hf-dataset")
    hf_column: str | None = option(
        None, "column of --hf-dataset; else the first of messages, conversations, prompt, "
        "instruction, question, text that it has")  # fmt: skip
    num_prompts: int | None = option(
        None, "prompts to answer; default: all of a file or dataset, 10000 invented ones",
        minimum=1)  # fmt: skip
    raw: bool = option(False, "continue prompts as plain text, without a chat template")
    temperatures: tuple[float, ...] = option(
        (0.0, 0.7, 1.0), "sampling temperatures, taken in turn from prompt to prompt", minimum=0
    )
    invent_temperature: float = option(0.9, "temperature of invented prompts", minimum=0)
    max_tokens: int = option(512, "longest answer", minimum=1)
    max_model_len: int = option(2048, "longest prompt with answer; longer prompts are left out",
                                minimum=2)  # fmt: skip
    min_tokens: int = option(8, "drop answers with fewer tokens", minimum=0)
    only_ended: bool = option(False, "drop answers that --max-tokens cut off")
    max_repeats: float = option(
        0.3, "drop answers of whose 8-grams a larger share occurred before; 1 keeps all", minimum=0
    )
    shard_size: int = option(256, "prompts per shard: what an interruption can cost", minimum=1)
    processes: int | None = option(
        None, "engines that run side by side; default: one per visible GPU, else 1. Small models "
        "on a CPU are fastest with one process per core", minimum=1, free=True)  # fmt: skip
    dtype: str = option("auto", "type in which the target runs", choices=("auto", "bfloat16",
                        "float16", "float32"))  # fmt: skip
    hidden_states: bool = option(
        False, "keep the target's hidden states of the answers as well: training need not compute "
        "them, at hidden size times 2 bytes (4 in float32) per answer token")  # fmt: skip
    compile: bool = option(False, "let vLLM compile the target: faster on GPUs, slow to start")
    seed: int = option(0, "seed of everything random", minimum=0)

    def __post_init__(self) -> None:
        check(self)
        if self.prompts and self.hf_dataset:
            raise TrainingError("--prompts and --hf-dataset were both given; give one of them.")
        if not self.temperatures:
            raise TrainingError("--temperatures is empty; give at least one, such as 0.")
        if self.max_tokens >= self.max_model_len:
            raise TrainingError(
                f"--max-tokens {self.max_tokens} leaves no room for a prompt in --max-model-len "
                f"{self.max_model_len}; raise --max-model-len."
            )


@dataclass(frozen=True)
class TrainOptions:
    """`vllm-redrafter train`."""

    target: str | None = option(None, "directory of the target model", required=True)
    data: tuple[str, ...] = option(
        (), "directory written by `vllm-redrafter data`, or one of `hs_*.safetensors` files with "
        "hidden states as the project speculators writes them; several are joined",
        required=True)  # fmt: skip
    out: str | None = option(None, "directory of the drafter to write", required=True)
    resume: bool = option(False, "go on from the last checkpoint in --out, exactly as if the run "
                          "had not stopped", free=True)  # fmt: skip

    init: str | None = option(
        None,
        "directory of a drafter of this target to start from: its shape is kept, --blocks may be "
        "more, and the draft vocabulary is chosen anew if it shares the target's head",
    )
    loss: str = option("soft", "soft: the target's own distribution is the goal (distillation); "
                       "hard: the tokens of the text are, as in Apple's trainer",
                       choices=("soft", "hard"))  # fmt: skip
    offsets: int = option(5, "drafted tokens to train for, K; loss is the sum over all of them",
                          minimum=1)  # fmt: skip
    offset_decay: float = option(
        1.0, "weight of each offset's loss over that of the one before. Below 1 the first drafted "
        "tokens, on which all others depend, learn more: try 0.7", above=0)  # fmt: skip
    draft_vocab_size: int | None = option(
        None,
        "most frequent tokens that can be drafted; default 8192 (measured), 16384 or 32768 "
        "(guesses) for targets of hidden size below 1024, below 3072 or above; the target's size "
        "means all",
        minimum=1,
    )
    head: str = option(
        "shared",
        "shared: the target's own rows, frozen and not stored; tuned: starts as those, "
        "is trained and stored; own: starts at random",
        choices=("shared", "tuned", "own"),
    )
    exit_dim: int | None = option(
        None,
        "width inside the drafter; default: the target's hidden size, which `shared` and "
        "`tuned` need; twice that is Apple's shape, without input projection",
        minimum=1,
    )
    blocks: int | None = option(None, "residual blocks; default: 2, for targets of every size",
                                minimum=0)  # fmt: skip
    rnn: bool = option(True, "recurrent cell; without it the state is a sum of embeddings")
    save_dtype: str = option("bfloat16", "type of the stored weights",
                             choices=("bfloat16", "float16", "float32"))  # fmt: skip

    epochs: float = option(1.0, "passes over the data", above=0)
    max_steps: int | None = option(None, "stop after this many steps; the learning rate then falls "
                                   "to zero there", minimum=1)  # fmt: skip
    batch_size: int | None = option(
        None, "positions per step and process; default 320 (measured), 512 or 1024 (guesses) for "
        "targets of hidden size below 1024, below 3072 or above", minimum=1)  # fmt: skip
    group_tokens: int = option(
        65536,
        "tokens of text whose hidden states are in memory at once; the positions of one step are "
        "drawn from all of them, so more is better",
        minimum=1,
    )
    cache: bool = option(
        False, "keep hidden states in memory after they were first computed: saves the target's "
        "passes in later epochs, takes hidden size times 2 or 4 bytes per token (2.3 GB for a "
        "million tokens of size 576 in float32)")  # fmt: skip
    max_length: int = option(2048, "cut sequences to this many tokens", minimum=3)
    lr: float | None = option(None, "highest learning rate (AdamW); default: 0.001, for targets of "
                              "every size", above=0)  # fmt: skip
    warmup: float = option(0.03, "share of the steps in which the learning rate rises; it then "
                           "falls to zero as a cosine", minimum=0)  # fmt: skip
    weight_decay: float = option(0.0, "AdamW's weight decay", minimum=0)
    clip: float = option(1.0, "largest norm of a step's gradient", above=0)
    bf16: bool = option(False, "compute the drafter under bfloat16 autocast; weights stay float32")
    compile: bool = option(
        False, "fuse the loss with torch.compile, which on a CPU needs a C++ compiler: steps take "
        "about two thirds of the time")  # fmt: skip
    target_dtype: str = option("auto", "type in which the target computes hidden states; best the "
                               "one it is served in", choices=("auto", "bfloat16", "float16",
                               "float32"))  # fmt: skip
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto: a GPU if there is one", free=True)
    seed: int = option(0, "seed of initial weights and data order", minimum=0)

    held_out: float = option(0.02, "share of the sequences that is kept for evaluation", minimum=0)
    eval_every: int = option(200, "steps between evaluations", minimum=1)
    save_every: int = option(200, "steps between checkpoints", minimum=1, free=True)
    log_every: int = option(10, "steps between lines of training/log.jsonl", minimum=1)
    tensorboard: bool = option(False, "also log for TensorBoard (needs `tensorboard`)", free=True)
    plot: bool = option(True, "draw training/curves.png at the end (needs `matplotlib`)", free=True)

    def __post_init__(self) -> None:
        if isinstance(self.data, str):
            object.__setattr__(self, "data", (self.data,))
        check(self)
        if self.held_out >= 1 or self.warmup >= 1:
            raise TrainingError(
                f"--held-out {self.held_out} and --warmup {self.warmup} must be below 1."
            )


@dataclass(frozen=True)
class EvalOptions:
    """`vllm-redrafter eval`."""

    target: str | None = option(None, "directory of the target model", required=True)
    drafter: str | None = option(None, "directory of the drafter", required=True)
    answers: str | None = option(
        None, "greedy answers of the target, one JSON object a line: "
        '{"prompt_token_ids": [...], "token_ids": [...], "category": "..."}; or a directory that '
        "`vllm-redrafter data` made, of which the answers at temperature 0 are taken. It should "
        "not be the one that the drafter was trained on. Two more keys make the end of an answer "
        'count as in vLLM: "finish_reason", "stop" or "length", and "max_tokens", the limit of the '
        "request", required=True)  # fmt: skip
    out: str | None = option(None, "directory for report.md, report.json and acceptance.png",
                             required=True)  # fmt: skip
    settings: tuple[str, ...] = option(
        ("1,3,3", "4,3,7", "4,3,11", "8,3,15"),
        "beam width, draft length and most drafted nodes, as W,L,N; several are separated by "
        "spaces")  # fmt: skip
    tree: str = option("best", "rule that turns a draft into a tree", choices=("best", "beams"))
    lookup: bool | None = option(
        None, "candidates from the text's own earlier tokens compete with the drafter's, as in the "
        "engine; default: with the tree best, which alone allows it")  # fmt: skip
    lookup_tokens: int = option(MAX_DEPTH, "how far the lookup follows an earlier occurrence",
                                minimum=1)  # fmt: skip
    node_budget: str = option(
        "fixed", "fixed: all of a tree's N nodes; auto: in each step as many as pay by --costs, as "
        "in the engine for one request", choices=("fixed", "auto"))  # fmt: skip
    costs: str | None = option(
        None, "file of `vllm-redrafter calibrate`, for predictions; or measured milliseconds: "
        '{"plain_ms": x, "draft_ms": x or {"W,L": x, ...}, "rows_ms": {"1": x, "4": x, ...}}; '
        "without it no setting is recommended")  # fmt: skip
    target_dtype: str = option(
        "auto", "type in which the target computes; best the one it is served in. The drafter "
        "computes in the type in which it is stored, as in vLLM",
        choices=("auto", "bfloat16", "float16", "float32"))  # fmt: skip
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto: a GPU if there is one")
    group_tokens: int = option(8192, "tokens of text whose hidden states are in memory at once",
                               minimum=1)  # fmt: skip

    def __post_init__(self) -> None:
        check(self)
        if not self.settings:
            raise TrainingError("--settings is empty; give at least one, such as 4,3,7.")
        if self.node_budget == "auto" and (self.costs is None or self.tree == "beams"):
            raise TrainingError(
                "--node-budget auto weighs nodes by measured times: give --costs, a file of "
                "`vllm-redrafter calibrate`, and --tree best."
            )
        if self.lookup and self.tree == "beams":
            raise TrainingError(
                "--lookup was given, but the tree 'beams' holds the drafter's beams alone; give "
                "--tree best, or leave --lookup out."
            )

    @property
    def looked_up(self) -> int:
        """Tokens that the lookup follows, 0 for no lookup."""
        on = self.tree == "best" if self.lookup is None else self.lookup
        return self.lookup_tokens if on else 0


def check(options: Any) -> None:
    """Raise TrainingError for the first field that is missing or out of its range."""
    for field in dataclasses.fields(options):
        value, rule = getattr(options, field.name), field.metadata
        flag = "--" + field.name.replace("_", "-")
        if value is None or value == ():
            if rule.get("required"):
                raise TrainingError(f"{flag} is missing: {rule['help']}.")
            continue
        values = value if isinstance(value, tuple) else (value,)
        for one in values:
            if "choices" in rule and one not in rule["choices"]:
                raise TrainingError(f"{flag} is {one!r}; give one of {', '.join(rule['choices'])}.")
            if "minimum" in rule and not one >= rule["minimum"]:
                raise TrainingError(f"{flag} is {one}; it must be at least {rule['minimum']}.")
            if "above" in rule and not one > rule["above"]:
                raise TrainingError(f"{flag} is {one}; it must be above {rule['above']}.")


def decisive(options: Any) -> dict[str, Any]:
    """The options that decide what comes out: a run may only be continued with the same."""
    return {
        field.name: list(value) if isinstance(value, tuple) else value
        for field in dataclasses.fields(options)
        if not field.metadata.get("free")
        for value in [getattr(options, field.name)]
    }
