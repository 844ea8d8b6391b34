"""Every option is described where it is defined."""

import dataclasses

import pytest

from moe2dense.config.options import entries, option
from moe2dense.config.schema import RunConfig
from moe2dense.config.toml import merge, merge_flags
from moe2dense.errors import UserError


@pytest.mark.parametrize("entry", list(entries(RunConfig)), ids=lambda entry: entry.key)
def test_every_option_says_what_it_is(entry):
    assert len(entry.option.help) >= 15 and entry.option.help.endswith("."), "a plain sentence"
    assert entry.default_text
    assert entry.kind is bool or entry.option.example, "a value as one would type it"


def test_a_field_without_help_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Bare:
        size: int = 3

    with pytest.raises(TypeError, match="Bare.size has no description"):
        list(entries(Bare))
    with pytest.raises(TypeError, match="help"):
        option(3)  # type: ignore[call-arg]


@pytest.mark.parametrize("entry", [e for e in entries(RunConfig) if e.option.choices], ids=lambda e: e.key)
def test_choices_hold_the_default_and_the_example(entry):
    assert {entry.default, entry.option.example} <= set(entry.option.choices)


@pytest.mark.parametrize("entry", [e for e in entries(RunConfig) if e.option.example], ids=lambda e: e.key)
def test_examples_are_valid(entry):
    value = entry.option.example
    if entry.kind in (int, float) and entry.option.parse is None:
        value = entry.kind(value)
    merge_flags(RunConfig(), {entry.key: [value] if entry.key == "evaluate.baseline" else value})


def test_counts_are_read_as_people_write_them():
    assert merge(RunConfig(), {"train": {"tokens": "2m"}}, "--config c.toml").train.tokens == 2_000_000
    with pytest.raises(UserError, match=r"--config c\.toml: train\.tokens must be a number such as"):
        merge(RunConfig(), {"train": {"tokens": "many"}}, "--config c.toml")
    with pytest.raises(UserError, match="^--tokens must be a number such as"):
        merge_flags(RunConfig(), {"train.tokens": "many"})


def test_a_value_that_is_no_choice():
    with pytest.raises(
        UserError, match=r"^--dtype must be one of bfloat16, .*; found 'float61' \(did you mean 'float16'"
    ):
        merge_flags(RunConfig(), {"export.dtype": "float61"})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"walk": {"local_steps": 3}}, r"unknown key 'walk' \(it was renamed; did you mean 'build'\?\)"),
        ({"build": {"polish_epochs": 3}}, r"unknown key 'build.polish_epochs' .*did you mean 'heal_epochs'"),
        ({"build": {"polish_lr": 3}}, "did you mean 'heal_lr'"),
        ({"build": {"polish_batch": 3}}, "did you mean 'heal_batch'"),
        ({"build": {"polish_hints": 3}}, "did you mean 'heal_hints'"),
        ({"build": {"init": "walk"}}, r"build\.init 'walk' was renamed; did you mean 'layerwise'"),
        ({"regime": {"companion_lr": 3}}, "did you mean 'peer_lr'"),
    ],
)
def test_old_names_get_the_new_one(table, message):
    with pytest.raises(UserError, match=message):
        merge(RunConfig(), table, "--config c.toml")


def test_an_old_name_as_a_flag():
    with pytest.raises(UserError, match="^--init 'walk' was renamed; did you mean 'layerwise'"):
        merge_flags(RunConfig(), {"build.init": "walk"})
