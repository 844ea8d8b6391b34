"""--for: a host that the stack does not serve is replaced by one that computes the same, or refused with the reason."""

from dataclasses import replace

import pytest

from moe2dense.config.schema import BuildConfig, ExportConfig, RunConfig
from moe2dense.conversion.for_stack import for_stack
from moe2dense.errors import UserError
from moe2dense.families.cards import student_cards


@pytest.fixture
def settings(tiny):
    return RunConfig(model=str(tiny), to="3.2m", export=ExportConfig(stack="vllm"))


def say(monkeypatch, stack, **hosts):
    """Let the cards say something else of some hosts; `others` is what all the rest say."""
    others = hosts.pop("others", None)
    for name, card in student_cards().items():
        if not card.host and (said := hosts.get(name, others)):
            monkeypatch.setitem(card.loads, stack, said)


def test_a_host_that_is_served_stays(settings, monkeypatch):
    say(monkeypatch, "vllm", mistral="seen")
    assert for_stack(settings) == (settings, "")
    plain = replace(settings, export=ExportConfig())
    assert for_stack(plain) == (plain, "")


def test_a_host_that_computes_the_same_takes_its_place(settings, monkeypatch):
    say(monkeypatch, "vllm", mistral="no: it is tired", llama="seen", others="no: nor these")
    changed, note = for_stack(settings)
    assert changed.build.host == "llama" and "it is tired" in note and "Llama host, which computes the same" in note


def test_a_host_that_computes_something_else_does_not(settings, monkeypatch):
    say(monkeypatch, "vllm", mistral="no: it is tired", olmo2="seen", others="no: nor these")
    with pytest.raises(UserError, match="--for vllm: a student of the Mistral host is not served there .it is tired."):
        for_stack(settings)


def test_a_host_that_was_asked_for_is_not_replaced(settings, monkeypatch):
    say(monkeypatch, "vllm", mistral="no: it is tired", llama="seen")
    with pytest.raises(UserError, match="it is tired"):
        for_stack(replace(settings, build=BuildConfig(host="mistral")))


def test_llama_cpp_gets_a_gguf_file_and_others_refuse_one(settings, monkeypatch):
    say(monkeypatch, "llama_cpp", mistral="seen")
    assert for_stack(replace(settings, export=ExportConfig(stack="llama.cpp")))[0].export.format == "gguf"
    with pytest.raises(UserError, match="reads no GGUF"):
        for_stack(replace(settings, export=ExportConfig(stack="vllm", format="gguf")))
