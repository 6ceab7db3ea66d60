# SPDX-License-Identifier: Apache-2.0
"""No setting of vLLM is left to chance: each works, is refused, or has a reason not to be tried."""

from typing import ClassVar, get_origin

import pytest
from engine_cases.settings import CACHE, SCHEDULER, SPECULATIVE, NotTried, Refused, Works

from vllm_redrafter.options import VALID_KEYS

TABLES = {"SchedulerConfig": SCHEDULER, "CacheConfig": CACHE, "SpeculativeConfig": SPECULATIVE}
ENTRIES = [(name, field, entry) for name, table in TABLES.items() for field, entry in table.items()]


def fields_of(name):
    """All fields of the installed vLLM's class, those for its constructor alone included."""
    import vllm.config

    return {
        field
        for field, declared in getattr(vllm.config, name).__dataclass_fields__.items()
        if get_origin(declared.type) is not ClassVar and "ClassVar" not in str(declared.type)
    }


@pytest.mark.parametrize("name", TABLES)
def test_every_field_is_in_the_table(name):
    assert fields_of(name) == set(TABLES[name])


@pytest.mark.parametrize("name, field", [("SchedulerConfig", "policy"), ("CacheConfig", "new")])
def test_the_comparison_sees_a_new_field_and_one_that_went(name, field, monkeypatch):
    import vllm.config

    declared = dict(getattr(vllm.config, name).__dataclass_fields__)
    if declared.pop(field, None) is None:
        declared[field] = declared["block_size"]
    monkeypatch.setattr(getattr(vllm.config, name), "__dataclass_fields__", declared)
    assert fields_of(name) ^ set(TABLES[name]) == {field}


@pytest.mark.parametrize(
    "field, entry",
    [(field, entry) for _, field, entry in ENTRIES if isinstance(entry, Refused)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_with_our_sentence(engine_config, field, entry):
    with pytest.raises(ValueError) as raised:
        engine_config(**entry.arguments)
    text = str(raised.value)
    assert type(raised.value).__module__.startswith("vllm_redrafter."), text
    assert entry.message in text and "\n" not in text and text.endswith(".")


def test_what_is_not_refused_is_a_key_of_ours():
    ours = {field for field, entry in SPECULATIVE.items() if isinstance(entry, Works)}
    assert ours == set(SPECULATIVE) & set(VALID_KEYS)
    assert not any(isinstance(entry, NotTried) for entry in SPECULATIVE.values())


def test_reasons_are_given():
    for _, field, entry in ENTRIES:
        assert not isinstance(entry, NotTried) or len(entry.why) > 10, field
