"""Chats: rendered as transformers renders them, learnt as a reference written by hand says."""

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from moe2dense.data.chat.conversation import conversation_of
from moe2dense.data.chat.samples import chat_samples
from moe2dense.data.chat.template import ChatTemplate
from moe2dense.data.counts import Unusable
from moe2dense.data.load import load_blocks
from moe2dense.data.options import TextOptions
from moe2dense.errors import UserError

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from chat_templates import FAMILIES  # noqa: E402
from chats import check, tokenizer_for  # noqa: E402

END = "{% if add_generation_prompt %}<assistant>{% endif %}"
PRINTS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}" + END
JOINS = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</s>' }}{% endfor %}" + END
PARTS = "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{{ p.text }}{% endfor %}</s>{% endfor %}" + END
CALLS = (
    "{% for m in messages %}<{{ m.role }}>{% for c in m.tool_calls or [] %}{{ HOW }}{% endfor %}{{ m.content }}"
    "</s>{% endfor %}" + END
)


def tokenizer_with(template):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples/tiny-mixtral")
    tokenizer.chat_template = template
    return tokenizer


def learnt_texts(samples, tokenizer):
    return [tokenizer.decode([i for i, learnt in zip(s.ids, s.learnt, strict=True) if learnt]).strip() for s in samples]


def samples_of(messages, tokenizer, learn="all", longest=None, **more):
    return chat_samples(conversation_of({"messages": messages} | more), ChatTemplate(tokenizer), learn, longest)


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize("name", FAMILIES)
def test_families_render_and_learn_as_the_reference_does(name):
    row = check(FAMILIES[name], 6, seed=1)
    assert (row.refused, row.rendered_differs, row.learnt_differs) == (0, 0, 0)
    assert row.answers >= 6 and row.samples >= 6


@pytest.mark.parametrize("template", [PRINTS, JOINS, PARTS], ids=["prints", "joins", "parts"])
def test_parts_and_strings_are_rendered_as_their_text(template):
    tokenizer = tokenizer_with(template)
    text = [{"type": "text", "text": "hi "}, {"type": "text", "text": "there"}]
    for content in (text, "hi there"):
        (sample,) = samples_of(
            [{"role": "user", "content": content}, {"role": "assistant", "content": content}], tokenizer
        )
        assert tokenizer.decode(sample.ids) == "<user>hi there</s><assistant>hi there</s>"
        assert learnt_texts([sample], tokenizer) == ["hi there</s>"]


@pytest.mark.parametrize(
    ("how", "expected"),
    [("c.function.arguments | tojson", '{"a": null, "b": 1}'), ("c.function.arguments + ';'", '{"a": null, "b": 1};')],
)
@pytest.mark.parametrize("given", [{"a": None, "b": 1}, '{"a": null, "b": 1}'])
def test_arguments_come_in_the_form_that_the_template_takes(how, expected, given):
    tokenizer = tokenizer_with(CALLS.replace("HOW", how))
    call = {"type": "function", "function": {"name": "f", "arguments": given}}
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    (sample,) = samples_of(talk, tokenizer)
    assert learnt_texts([sample], tokenizer) == [f"{expected}</s>"]


def test_marks_of_the_template_are_transformers_own():
    marked = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}" + END
    )
    tokenizer, talk = tokenizer_with(marked), turns("one", "two words", "three", "four")
    out = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
    (sample,) = samples_of(talk, tokenizer)
    assert sample.ids == out["input_ids"] and sample.learnt == [bool(m) for m in out["assistant_masks"]]
    (last,) = samples_of(talk, tokenizer, "last")
    assert learnt_texts([last], tokenizer) == ["four"]


def test_which_turns_are_learnt():
    tokenizer = tokenizer_for(FAMILIES["qwen3"])
    talk = turns("q", "a one", "r", "b two")
    talk[1]["reasoning_content"], talk[3]["reasoning_content"] = "why a", "why b"
    assert learnt_texts(samples_of(talk, tokenizer), tokenizer) == [
        "<think>\nwhy a\n</think>\n\na one<|im_end|>",
        "<think>\nwhy b\n</think>\n\nb two<|im_end|>",
    ]
    assert learnt_texts(samples_of(talk, tokenizer, "no-reasoning"), tokenizer) == [
        "a one<|im_end|>",
        "b two<|im_end|>",
    ]
    assert learnt_texts(samples_of(talk, tokenizer, "last"), tokenizer) == [
        "<think>\nwhy b\n</think>\n\nb two<|im_end|>"
    ]
    assert learnt_texts(samples_of(talk, tokenizer, learn_from=2), tokenizer) == [
        "<think>\nwhy b\n</think>\n\nb two<|im_end|>"
    ]
    tags = [*turns("q"), {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nso"}]
    assert learnt_texts(samples_of(tags, tokenizer, "no-reasoning"), tokenizer) == ["so<|im_end|>"]
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    asks = [*turns("q"), {"role": "assistant", "content": "", "reasoning_content": "why", "tool_calls": [call]}]
    (text,) = learnt_texts(samples_of(asks, tokenizer, "no-reasoning"), tokenizer)
    assert text.startswith("<tool_call>") and "why" not in text and "think" not in text


@pytest.mark.parametrize(
    "end, closing_is_learnt", [("<|im_end|>", False), ("<|im_end|>\n", False), ("", True), ("\n", True), ("</s>", True)]
)
def test_nothing_is_learnt_after_the_end_of_a_turn(tmp_path, end, closing_is_learnt):
    """Where the template ends a turn by a token of its own, the end-of-text token that parts documents is not the model's to write."""
    tokenizer = tokenizer_with("{% for m in messages %}<{{ m.role }}>{{ m.content }}" + end + "{% endfor %}" + END)
    if "<|im_end|>" in end:
        tokenizer.add_special_tokens({"additional_special_tokens": [end.strip()]})
    rows = [{"messages": turns("how are you", f"well {i}")} for i in range(40)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    blocks = load_blocks(str(tmp_path), tokenizer, 64, "train")
    closing = blocks.input_ids == tokenizer.eos_token_id
    assert closing.sum() > 10
    assert bool(blocks.labels_mask[closing].any()) == closing_is_learnt
    if "<|im_end|>" in end:
        assert blocks.labels_mask[blocks.input_ids == tokenizer.convert_tokens_to_ids(end.strip())].any()


def test_long_conversations_are_cut_between_exchanges():
    tokenizer = tokenizer_with(PRINTS)
    talk = [{"role": "system", "content": "be kind"}, *turns(*(f"turn {i} of many words" for i in range(12)))]
    whole = samples_of(talk, tokenizer)
    assert len(whole) == 1
    longest = len(whole[0].ids) // 3
    pieces = samples_of(talk, tokenizer, longest=longest)
    texts = [tokenizer.decode(s.ids) for s in pieces]
    assert len(pieces) > 2 and all(len(s.ids) <= longest for s in pieces)
    assert all(t.startswith("<system>be kind</s><user>") and t.endswith("</s>") for t in texts)
    seen = [i for t in texts for i in range(12) if f"turn {i} of" in t]
    assert seen == list(range(12))
    (last,) = samples_of(talk, tokenizer, "last", longest=longest)
    assert learnt_texts([last], tokenizer) == ["turn 11 of many words</s>"]


def test_the_date_is_the_runs(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text(
        "{{ strftime_now('%d %b %Y') }}|{% set f = \"%Y\" %}{{ strftime_now(f) }}\n  {% if true %}x{% endif %}" + JOINS
    )
    tokenizer = tokenizer_with(None)
    template = ChatTemplate(tokenizer, TextOptions(chat_template=str(file), date="2031-01-02"))
    shown = template.render(conversation_of({"messages": turns("q", "a")}))
    assert shown == "02 Jan 2031|2031\nx<user>q</s><assistant>a</s>"
    with pytest.raises(UserError, match="data.date must be a day"):
        ChatTemplate(tokenizer, TextOptions(chat_template=str(file), date="tomorrow")).render(
            conversation_of({"messages": turns("q")})
        )
    with pytest.raises(UserError, match="--chat-template"):
        ChatTemplate(tokenizer, TextOptions(chat_template=str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "user", "content": "q"}], "no assistant's turn"),
        ([{"role": "user"}, {"role": "assistant", "content": "a"}], "message 1 has neither `content`"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "part of type 'image'"),
        ([{"role": "user", "content": 5}], "content of message 1 is int"),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "refuses it .no chats today"),
    ],
)
def test_what_cannot_be_learnt_says_why(messages, reason):
    template = "{{ raise_exception('no chats today') }}" if "refuses" in reason else PRINTS
    with pytest.raises(Unusable, match=reason):
        samples_of(messages, tokenizer_with(template))


def test_tool_calls_are_told_from_the_other_words():
    tokenizer = tokenizer_for(FAMILIES["qwen3"])
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    asks = {
        "role": "assistant",
        "content": "let me look",
        "reasoning_content": "they want weather",
        "tool_calls": [call],
    }
    talk = [*turns("q"), asks, {"role": "tool", "content": "rain"}, {"role": "assistant", "content": "it rains"}]
    for shape in (talk, [*talk[:1], {k: v for k, v in asks.items() if k != "reasoning_content"}, *talk[2:]]):
        samples = samples_of(shape, tokenizer)
        called = "".join(
            tokenizer.decode([i for i, c in zip(s.ids, s.calls, strict=True) if c]) for s in samples if any(s.calls)
        )
        assert (
            called.strip().startswith("<tool_call>") and '"Oslo"' in called and called.rstrip().endswith("<|im_end|>")
        )
        assert "let me look" not in called and "they want" not in called and "it rains" not in called
        assert all(learnt for s in samples for learnt, c in zip(s.learnt, s.calls, strict=True) if c)
    plain = samples_of(turns("q", "a"), tokenizer)
    assert not any(plain[0].calls)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if "tools" in family.features])
def test_every_template_shows_where_its_calls_begin(name):
    """The call's name and arguments are among the tokens, what was said before it is not."""
    family = FAMILIES[name]
    tokenizer = tokenizer_for(family)
    call = {"type": "function", "id": "call12345", "function": {"name": "zebrafinch", "arguments": {"quagga": 7}}}
    tool = {
        "type": "function",
        "function": {"name": "zebrafinch", "description": "d", "parameters": {"type": "object", "properties": {}}},
    }
    talk = [*turns("q"), {"role": "assistant", "content": "", "tool_calls": [call]}]
    samples = samples_of(talk, tokenizer, tools=[tool])
    (sample,) = [s for s in samples if any(s.calls)]
    called = tokenizer.decode([i for i, c in zip(sample.ids, sample.calls, strict=True) if c])
    assert "zebrafinch" in called and "quagga" in called and "7" in called
