"""Each command's help page at 80 columns: every flag has help and a default, and no line is too long."""

import inspect
import re
from importlib import import_module

import pytest
from cyclopts import Parameter

from moe2dense.__main__ import main
from moe2dense.cli.app import COMMANDS, FIRST_WORDS
from moe2dense.config.flags import Flag, option_entries, option_flags

NAMES = [name for name, *_ in COMMANDS]


def function(command):
    module, name = next(where for c, where, _ in COMMANDS if c == command).split(":")
    return getattr(import_module(module), name)


def page(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([command, "--help"]) == 0
    return capsys.readouterr().out


def problems(text, flags):
    """What is wrong with a help page: a line too long, a flag without help, default or place on the page."""
    wrong = [f"over 80 columns: {line}" for line in text.splitlines() if len(line.rstrip()) > 80]
    parts = re.split(r"\n│ (?=--|[A-Z]+ )", text)[1:]
    entries = {}
    for part in parts:
        lines = [line.strip("│ ") for line in part.split("\n╰")[0].splitlines()]
        names = re.findall(r"--[\w-]+|^[A-Z]+", lines[0])
        entries[names[0]] = " ".join(line[26:] if i == 0 else line for i, line in enumerate(lines))
    for flag in flags:
        if flag not in entries:
            wrong.append(f"not shown: {flag}")
            continue
        plain = re.sub(r"\[[^]]*\]|\([^)]*\)", "", entries[flag]).strip()
        if len(plain) < 8:
            wrong.append(f"no help: {flag}")
        if not re.search(r"\[default: [^]]+\]|\[required\]", entries[flag]):
            wrong.append(f"no default: {flag}")
    return wrong


def flags_of(action):
    return [flag_of(p) for p in inspect.signature(action).parameters.values()]


def flag_of(parameter):
    """Return what a user types for a parameter: a flag of another name (--for, which Python keeps to itself) says so."""
    notes = [note for note in getattr(parameter.annotation, "__metadata__", ()) if isinstance(note, Parameter)]
    if names := [name for note in notes for name in note.name or ()]:
        return names[0]
    if parameter.kind is parameter.KEYWORD_ONLY:
        return "--" + parameter.name.replace("_", "-")
    return parameter.name.upper().replace("_", "-")


@pytest.mark.parametrize("command", NAMES)
def test_every_flag_is_explained(command, monkeypatch, capsys):
    assert not problems(page(command, monkeypatch, capsys), flags_of(function(command)))


@pytest.mark.parametrize("command", NAMES)
def test_every_flag_has_an_example(command):
    for name, parameter in inspect.signature(function(command)).parameters.items():
        described = [m for m in parameter.annotation.__metadata__ if isinstance(m, Flag)]
        assert len(described) == 1, name
        assert "bool" in str(parameter.annotation) or "e.g. " in described[0].help, name


def test_a_page_that_lacks_something_is_noticed():
    bad = "\n│ --tokens COUNT            How much text is read.\n(tokens; e.g. 20m) [default: 500k] │\n"
    bad += (
        "│ --lr X                    [default: 1] │\n│ --out TEXT                Folder of the run. │\n╰──╯\n"
        + "x" * 81
    )
    assert problems(bad, ["--tokens", "--lr", "--out", "--gone"]) == [
        f"over 80 columns: {'x' * 81}",
        "no help: --lr",
        "no default: --out",
        "not shown: --gone",
    ]


@pytest.mark.parametrize("command", NAMES)
def test_flags_bear_the_names_that_errors_use(command):
    """An error about an option names the flag that sets it."""
    parameters = inspect.signature(function(command)).parameters
    for name, key in option_flags(function(command)).items():
        if key != "model":
            assert option_entries()[key].flag == flag_of(parameters[name]), key


def test_a_flag_of_an_option_that_there_is_not():
    from moe2dense.config.flags import flag

    with pytest.raises(KeyError):
        flag("train.nonsense")
    assert isinstance(flag("train.lr"), Parameter)


@pytest.mark.parametrize("command", FIRST_WORDS)
def test_a_command_without_arguments_says_what_to_type(command, capsys):
    assert main([command]) == 2
    shown = capsys.readouterr().err
    assert shown.count(f"moe2dense {command}") >= 2 and max(map(len, shown.splitlines())) <= 80


def test_the_program_alone_lists_its_commands(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert [c for c in NAMES if f"│ {c} " in shown] == NAMES and "without arguments" in shown
