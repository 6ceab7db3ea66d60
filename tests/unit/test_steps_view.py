# SPDX-License-Identifier: Apache-2.0
"""`vllm-redrafter show` without an engine: what is drawn of recorded steps, and bad options."""

import xml.etree.ElementTree as ElementTree

import pytest
from rich.console import Console

from vllm_redrafter import cli
from vllm_redrafter.demo.steps_view import everything, shown, summary, svg
from vllm_redrafter.engine.v1.recording import RecordedStep

WORDS = {1: "one", 2: " two", 3: "\n", 4: "four", 5: ""}
STEPS = [
    RecordedStep([1]),
    RecordedStep([2, 4, 1], [2, 3, 4], [0, 0, 1], [1, 3], ["both", "drafter", "lookup"],
                 [0.5, 0.25, 0.125]),
    RecordedStep([2], [4], [0], [], ["drafter"]),
]  # fmt: skip


def decode(ids):
    return WORDS[ids[0]]


def printed(content):
    console = Console(width=80, no_color=True)
    with console.capture() as captured:
        console.print(content)
    return [line.rstrip() for line in captured.get().splitlines()]


def test_steps_as_text():
    assert printed(everything(STEPS, decode)) == [
        "✓ accepted   drafter   lookup   both",
        "step 0  the prompt  nothing drafted, then one",
        "step 1  one  2 of 3 nodes accepted, then one",
        "├── ✓ ␣two  0.50",
        "│   └── ✓ four  0.12",
        "└──   ⏎  0.25",
        "step 2  one  0 of 1 nodes accepted, then ␣two",
        "└──   four",
        "5 tokens in 3 steps, the prompt's among them; acceptance length 2.00, accepted",
        "from 0 drafter, 1 lookup, 1 both.",
    ]


def test_the_first_steps_only():
    lines = printed(everything(STEPS, decode, 1))
    assert len(lines) == 4 and "step 1" not in "".join(lines)
    assert lines[-2].startswith("5 tokens")


def test_nothing_drafted():
    assert summary([RecordedStep([1])]) == "1 tokens in 1 steps; nothing was drafted."
    assert shown(5, decode) == "∅"


def test_the_svg_loads_nothing_and_is_the_same_every_time():
    text = svg(everything(STEPS, decode), "title")
    assert text == svg(everything(STEPS, decode), "title")
    ElementTree.fromstring(text)
    assert "url(http" not in text and "@font-face" not in text
    assert "␣two" in text and "title" in text


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--speculative-config", "[1]"], "'[1]' is not a JSON object"),
        (["--speculative-config", "{"], "'{' is not a JSON object"),
        (["--target", "somewhere"], "belong together"),
        (["--max-tokens", "0"], "at least 1"),
        (["--steps", "0"], "at least 1"),
        (["--svg", "no/such/dir/a.svg"], "no such directory"),
    ],
)
def test_bad_options_are_one_sentence(argv, message, capsys):
    assert cli.main(["show", "prompt", *argv]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
