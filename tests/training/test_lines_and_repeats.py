# SPDX-License-Identifier: Apache-2.0
"""JSON lines and repeated text: one reader and one rule for all who need them."""

from __future__ import annotations

import pytest

from vllm_redrafter.training.errors import TrainingError
from vllm_redrafter.training.jsonl import numbered_lines, parse_line
from vllm_redrafter.training.repeats import is_looping, repeated_share, repeats_more_than


def test_lines_have_their_numbers(tmp_path):
    path = tmp_path / "lines"
    # A carriage return and a line separator end no line; no line feed is needed at the end.
    path.write_bytes(b'{"a": 1}\r\n\n  \n["\xe2\x80\xa8"]\nx\n"\xff"')
    lines = numbered_lines(path, "--some")
    assert [number for number, _ in lines] == [1, 4, 5, 6]
    assert [parse_line(line) for _, line in lines[:2]] == [{"a": 1}, ["\u2028"]]
    for _, line in lines[2:]:
        with pytest.raises(ValueError, match="^not JSON"):
            parse_line(line)
    with pytest.raises(TrainingError, match="^--some .*none cannot be read"):
        numbered_lines(tmp_path / "none", "--some")


def test_repeated_share():
    assert repeated_share([1, 2, 3, 4], n=2) == 0.0
    assert repeated_share([1, 2, 1, 2, 1], n=2) == 0.5
    assert repeated_share([1, 2], n=3) == 0.0
    assert repeated_share([1, 2] * 8) == pytest.approx(1 - 2 / 9)


def test_exactly_the_share_is_not_more():
    # 20 8-grams of which 6 came before; 1 - 14 / 20 is not 0.3 in binary.
    text = [*range(14), *range(13)]
    assert not repeats_more_than(text, 0.3) and not is_looping(text)
    assert repeats_more_than(text, 0.29) and is_looping([*range(13), *range(13)])
