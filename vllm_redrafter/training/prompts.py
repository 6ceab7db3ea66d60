# SPDX-License-Identifier: Apache-2.0
"""Where prompts come from: a JSON-lines file, a dataset of the hub, or the target itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_redrafter.reading import one_line
from vllm_redrafter.training.errors import TrainingError, missing
from vllm_redrafter.training.jsonl import is_text, numbered_lines, parse_line

Conversation = list[dict[str, str]]

_COLUMNS = ("messages", "conversations", "prompt", "instruction", "question", "text")
_ROLES = {"human": "user", "gpt": "assistant"}
# Letters that no template changes or strips, where the user's words will stand.
_PLACEHOLDER = "REDRAFTERUSERTURN"


@dataclass
class PromptList:
    """Prompts that were read, without repetitions.

    Attributes:
        conversations: each ends with the user's turn that is to be answered.
        broken: one sentence for every line that was skipped, with its number.
        duplicates: prompts left out because they came before.
    """

    conversations: list[Conversation] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    duplicates: int = 0
    _seen: set[int] = field(default_factory=set, repr=False)

    def add(self, where: str, value: Any) -> None:
        """Take one prompt, or note what is wrong with it."""
        try:
            conversation = parse_conversation(value)
        except ValueError as error:
            self.broken.append(f"{where}: {error}")
            return
        key = prompt_key(conversation)
        if key in self._seen:
            self.duplicates += 1
            return
        self._seen.add(key)
        self.conversations.append(conversation)

    def or_fail(self, source: str) -> PromptList:
        """This list; TrainingError when nothing in the source could be used."""
        if self.conversations:
            return self
        if self.broken:
            raise TrainingError(
                f"no line of {source} is a prompt ({self.broken[0]}); every line must be a JSON "
                'object with "prompt" or "messages".'
            )
        raise TrainingError(f"{source} holds no prompts.")


def parse_conversation(value: Any) -> Conversation:
    """``{"prompt": str}`` or ``{"messages": [{"role", "content"}, ...]}`` as messages.

    Answers behind the last user's turn are left out: the target gives its own.

    Raises:
        ValueError: with what is wrong.
    """
    if not isinstance(value, dict):
        raise ValueError(f"it is a {type(value).__name__}, not an object")
    if "prompt" in value:
        if not is_text(value["prompt"]) or not value["prompt"].strip():
            raise ValueError('"prompt" is not a text, or an empty one')
        return [{"role": "user", "content": value["prompt"]}]
    if "messages" not in value:
        raise ValueError('it has neither "prompt" nor "messages"')
    messages = value["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError('"messages" is not a list of objects')
    conversation = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant") or not is_text(content):
            raise ValueError("a message lacks a known role or a text as content")
        conversation.append({"role": role, "content": content})
    while conversation and conversation[-1]["role"] != "user":
        conversation.pop()
    if not conversation or not conversation[-1]["content"].strip():
        raise ValueError("no user's turn in it to answer")
    return conversation


def prompt_key(conversation: Conversation) -> int:
    """A 63-bit hash that ignores case and spacing: equal for prompts that are as good as equal."""
    text = "\x00".join(
        " ".join(f"{m['role']} {m['content']}".lower().split()) for m in conversation
    )
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def read_prompts(path: str | Path, limit: int | None = None) -> PromptList:
    """Prompts of a JSON-lines file; lines that are none are noted and skipped.

    Raises:
        TrainingError: unreadable file, or not one usable line.
    """
    found = PromptList()
    for number, line in numbered_lines(path, "--prompts"):
        if limit is not None and len(found.conversations) >= limit:
            break
        try:
            value = parse_line(line)
        except ValueError as error:
            found.broken.append(f"line {number}: {error}")
            continue
        found.add(f"line {number}", value)
    return found.or_fail(f"--prompts {path}")


def hub_prompts(name: str, split: str, column: str | None, limit: int | None) -> PromptList:
    """Prompts of a dataset of the Hugging Face hub, read as a stream.

    Raises:
        TrainingError: `datasets` is missing, the dataset cannot be reached, or no column fits.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise missing("datasets", "--hf-dataset", extra=False) from error
    try:
        rows = load_dataset(name, split=split, streaming=True)
        return from_rows(rows, column, limit).or_fail(f"the dataset {name}")
    except TrainingError:
        raise
    except Exception as error:  # the library raises many kinds, all meaning: not available
        raise TrainingError(
            f"--hf-dataset {name} cannot be read ({type(error).__name__}: {error}); check its "
            "name, --hf-split and the network, or give --prompts."
        ) from error


def from_rows(rows: Iterable[dict[str, Any]], column: str | None, limit: int | None) -> PromptList:
    """Prompts from table rows: texts, or messages in OpenAI's or ShareGPT's spelling."""
    found = PromptList()
    for number, row in enumerate(rows):
        if limit is not None and len(found.conversations) >= limit:
            break
        if column is None:
            column = next((name for name in _COLUMNS if row.get(name)), None)
        if column is None or column not in row:
            raise TrainingError(
                f"the dataset has columns {', '.join(row)}, of which "
                f"{'none is known to hold prompts' if column is None else f'none is {column!r}'}; "
                "give --hf-column."
            )
        value = row[column]
        if isinstance(value, list):
            value = {"messages": [_openai(message) for message in value]}
        else:
            value = {"prompt": value}
        found.add(f"row {number}", value)
    return found


def _openai(message: Any) -> Any:
    if not isinstance(message, dict) or "from" not in message:
        return message
    role = message["from"]
    return {"role": _ROLES.get(role, role), "content": message.get("value")}


class ChatTokens:
    """The target's tokenizer, and its chat template where one is needed.

    Args:
        directory: of the target.
        raw: never use the template.

    Raises:
        TrainingError: no tokenizer, or no chat template although ``raw`` is False.
    """

    def __init__(self, directory: str | Path, raw: bool = False) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise missing("transformers", "making data") from error
        if not Path(directory).is_dir():
            raise TrainingError(
                f"the target '{directory}' does not exist; give a local model directory."
            )
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(directory))
        except Exception as error:  # broken files make it raise many kinds
            raise TrainingError(
                f"'{directory}' has no usable tokenizer ({one_line(error)})."
            ) from error
        self.raw = raw
        if not raw and not self.tokenizer.chat_template:
            raise TrainingError(
                f"the target '{directory}' has no chat template; give --raw with --prompts to "
                "continue prompts as plain text, or add one to its tokenizer_config.json."
            )

    def encode(self, conversation: Conversation) -> list[int]:
        """Token ids up to where the answer begins.

        Raises:
            TrainingError: the template refuses this order of roles.
        """
        if self.raw:
            return self.tokenizer(conversation[-1]["content"])["input_ids"]
        return self._ids(self._render(conversation, add_generation_prompt=True))

    def invention(self) -> tuple[list[int], list[int], str]:
        """How to let the target speak as a user.

        Returns:
            ids up to the user's words; ids that end them; the text behind them in the template.
        """
        text = self._render([{"role": "user", "content": _PLACEHOLDER}])
        before, _, after = text.partition(_PLACEHOLDER)
        if not after and _PLACEHOLDER not in text:
            raise TrainingError(
                "the target's chat template does not show the user's words as they are; give "
                "--prompts."
            )
        ends = {self.tokenizer.eos_token_id} - {None}
        following = self._ids(after)
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        if following and following[0] in special:
            ends.add(following[0])
        ids = self._ids(before)
        if not ids:
            # A template with nothing before the user: a model has to start from something.
            start = self.tokenizer.bos_token_id
            ids = [self.tokenizer.eos_token_id if start is None else start]
        return ids, sorted(ends), after

    def invented(self, ids: list[int], after: str) -> str:
        """The user's words in what the target said as a user."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        mark = after.strip()
        return (text.split(mark)[0] if mark else text).strip()

    def _render(self, conversation: Conversation, **keywords: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(conversation, tokenize=False, **keywords)
        except Exception as error:  # templates raise whatever they like
            raise TrainingError(
                f"the target's chat template refuses a conversation ({one_line(error)}); leave it "
                "out of the prompts."
            ) from error

    def _ids(self, text: str) -> list[int]:
        # The template already holds every special token.
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
