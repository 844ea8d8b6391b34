"""A run that names no text gets one that suits its teacher, and its plan says which."""

import pytest

from moe2dense.conversion.configure import configure
from moe2dense.conversion.default_text import CORPORA, default_text, kind_of_text, text_kind
from moe2dense.data.hub import hub_split
from moe2dense.data.load import parse_mixture


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mistralai/Mixtral-8x7B-v0.1", "general"), ("mistralai/Mixtral-8x7B-Instruct-v0.1", "chat"), ("Qwen/Qwen3-30B-A3B", "general"),
        ("Qwen/Qwen3-Coder-30B-A3B-Instruct", "code"), ("deepseek-ai/DeepSeek-Coder-V2-Lite-Base", "code"), ("Qwen/Qwen2.5-Math-MoE", "math"),
        ("google/gemma-4-26b-a4b-it", "chat"), ("openai/gpt-oss-20b", "chat"), ("Qwen/Qwen3-30B-A3B-Thinking-2507", "chat"),
        ("ibm-granite/granite-3.1-3b-a800m-base", "general"), ("white-iteration", "general"), ("codec-moe", "general"), ("", "general"),
    ],
)  # fmt: skip
def test_names_say_what_a_teacher_was_made_for(name, kind):
    assert text_kind(name) == kind and default_text(name) == CORPORA[kind] and kind_of_text(CORPORA[kind]) == kind


def test_every_default_is_text_that_data_takes():
    for text in CORPORA.values():
        weights = parse_mixture(text) if "=" in text else {text: 1.0}
        assert sum(weights.values()) == pytest.approx(1) and all("/" in name for name in weights)


def test_the_settings_name_it_and_any_other_text_goes_before(tiny):
    assert configure("mixtral", "7b").data.path == CORPORA["general"]
    assert configure("mixtral-instruct", "7b").data.path == CORPORA["chat"]
    assert configure("qwen3-coder", "25%").data.path == CORPORA["code"]
    assert configure("mixtral-instruct", "7b", None, {"data.path": "own.jsonl"}).data.path == "own.jsonl"
    assert configure(str(tiny), "3.2m").data.path.endswith("text")


def test_the_plan_says_why(capsys):
    from moe2dense.__main__ import main

    assert main(["plan", "qwen3-coder", "--to", "25%"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "smoltalk:self-oss-instruct=0.5" in shown
        and "the default for a code model, which the teacher's name says it is" in shown
    )


@pytest.mark.parametrize(
    ("split", "available", "expected"),
    [
        ("train", ["train"], ("train", True)), ("valid", ["train"], ("train", True)), ("test", ["train"], ("train", True)),
        ("train", ["train", "test"], ("train", True)), ("valid", ["train", "test"], ("train", True)), ("test", ["train", "test"], ("test", False)),
        ("train", ["train", "validation"], ("train", False)), ("valid", ["train", "validation"], ("validation", False)),
        ("test", ["train", "validation"], ("", False)), ("valid", ["test"], ("", False)), ("train", ["test"], ("", False)),
        ("ood", ["train"], ("train", True)), ("ood", ["train", "test"], ("", False)),
    ],
)  # fmt: skip
def test_splits_of_the_hub(split, available, expected):
    """What a data set does not hold out itself is held out by a hash, from its training split, which loses it."""
    assert hub_split(split, available) == expected
