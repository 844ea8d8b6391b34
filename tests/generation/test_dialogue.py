"""Talking with models at a terminal: what they are told, what they answer, and how it is shown."""

import io

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from moe2dense.__main__ import main
from moe2dense.errors import UserError
from moe2dense.generation.dialogue import Dialogue, spoken, talk
from moe2dense.generation.sampling import Sampling

GREEDY = Sampling(temperature=0.0)
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, max_position_embeddings=96, sliding_window=None,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


@torch.no_grad()
def greedy(model, ids, count):
    row = list(ids)
    for _ in range(count):
        row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
    return row[len(ids) :]


def test_an_answer_is_what_the_model_writes(model, tokenizer):
    prompt = tokenizer("The sea")["input_ids"]
    pieces = list(spoken(model, tokenizer, prompt, GREEDY, 9, ()))
    assert "".join(pieces) == tokenizer.decode(greedy(model, prompt, 9), skip_special_tokens=True)
    first = greedy(model, prompt, 1)[0]
    assert list(spoken(model, tokenizer, prompt, GREEDY, 9, {first})) == []
    drawn = ["".join(spoken(model, tokenizer, prompt, Sampling(1.5, seed=s), 9, ())) for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(UserError, match="no tokens"):
        list(spoken(model, tokenizer, [], GREEDY, 9, ()))


def test_a_character_is_shown_when_it_is_whole(model, tokenizer, monkeypatch):
    """Bytes of a character that is not finished yet wait for the rest."""
    ids = tokenizer("a é 🌊!", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr("moe2dense.generation.dialogue._ids", lambda *_: iter(ids))
    pieces = list(spoken(model, tokenizer, [1], GREEDY, 9, ()))
    assert "".join(pieces) == tokenizer.decode(ids) and "\ufffd" not in "".join(pieces)


def test_turns_are_told_by_the_template_or_as_running_text(tokenizer):
    dialogue = Dialogue(tokenizer)
    assert not dialogue.chats
    for turn in ("The sea", " was", " calm"):
        dialogue.say(turn)
    assert dialogue.prompt() == tokenizer("The sea was calm")["input_ids"]
    chatty = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    chatty.chat_template = TEMPLATE
    dialogue = Dialogue(chatty)
    dialogue.say("Hello?")
    dialogue.answered("Yes.")
    dialogue.say("Who?")
    assert chatty.decode(dialogue.prompt()).replace(" ", "") == "<user>Hello?<assistant>Yes.<user>Who?<assistant>"


def test_two_models_answer_the_same_words_in_dialogues_of_their_own(model, tokenizer):
    torch.manual_seed(1)
    other = MistralForCausalLM(model.config).eval()
    lines, shown = iter(["The sea was", " and then", None]), []
    talk(
        {"student": model, "teacher": other}, tokenizer, lambda: next(lines), lambda a: shown.append(dict(a)), GREEDY, 6, (),
        model.config.max_position_embeddings,
    )  # fmt: skip
    first = tokenizer("The sea was")["input_ids"]
    ends = [s for i, s in enumerate(shown) if i + 1 == len(shown) or len(shown[i + 1]["student"]) < len(s["student"])]
    assert [set(e) for e in ends] == [{"student", "teacher"}] * 2
    for name, one in (("student", model), ("teacher", other)):
        assert ends[0][name] == tokenizer.decode(greedy(one, first, 6), skip_special_tokens=True)


def test_old_turns_are_forgotten_and_long_ones_refused(model, tokenizer):
    lines = iter(["The sea was calm and grey. " * 3] * 6 + [None])
    talk({"student": model}, tokenizer, lambda: next(lines), lambda _: None, GREEDY, 8, (), 64)
    with pytest.raises(UserError, match="say less"):
        talk({"student": model}, tokenizer, lambda: "word " * 200, lambda _: None, GREEDY, 8, (), 64)


def test_chat_by_the_command_line(model, tokenizer, tiny, tmp_path, monkeypatch, capsys):
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    monkeypatch.setattr("sys.stdin", io.StringIO("The sea was\n\n"))
    assert not main(["chat", str(tmp_path / "m"), "--tokens", "5", "--temperature", "0", "--teacher", str(tiny)])
    out = " ".join(capsys.readouterr().out.split())
    assert "one running text" in out and "student" in out and "teacher" in out
    assert main(["chat", str(tmp_path / "m"), "--tokens", "0"]) == 2
