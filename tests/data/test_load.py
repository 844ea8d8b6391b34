import gzip
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from moe2dense.data.blocks import Blocks, join_blocks
from moe2dense.data.load import load_blocks
from moe2dense.data.options import TextOptions
from moe2dense.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "examples/tiny-mixtral")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def rows(n, start=0):
    return [
        {"text": f"Passage {i}: " + "the sea is wide " * (3 + i % 5), "domain": "ab"[i % 2]}
        for i in range(start, start + n)
    ]


def jsonl(path, records):
    opened = gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w")  # noqa: SIM115
    with opened as f:
        f.writelines(json.dumps(r) + "\n" for r in records)
    return path


def write(folder, ending):
    import datasets

    path, data = folder / f"train.{ending}", datasets.Dataset.from_list(rows(40))
    if ending == "parquet":
        data.to_parquet(path)
    elif ending == "arrow":
        data.save_to_disk(folder / "saved")
        (folder / "saved" / "data-00000-of-00001.arrow").rename(path)
    elif ending == "json":
        path.write_text(json.dumps(rows(40)))
    else:
        jsonl(path, rows(40))


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json", "parquet", "arrow"])
def test_every_format_gives_the_same_blocks(tmp_path, tokenizer, ending):
    (tmp_path / "x").mkdir(), (tmp_path / "y").mkdir()
    write(tmp_path / "x", ending)
    jsonl(tmp_path / "y" / "train.jsonl", rows(40))
    found, expected = load_blocks(tmp_path / "x", tokenizer, 16), load_blocks(tmp_path / "y", tokenizer, 16)
    assert torch.equal(found.input_ids, expected.input_ids) and found.domains == expected.domains
    assert set(found.domains) == {"a", "b"}


def test_blocks_hold_every_token_of_every_passage_once(tmp_path, tokenizer):
    path = jsonl(tmp_path / "train.jsonl", rows(30))
    blocks = load_blocks(path.parent, tokenizer, 7, seed=3)
    stream = blocks.input_ids.flatten().tolist()
    texts = tokenizer.decode(stream).split(tokenizer.eos_token)
    assert len(set(texts[:-1])) == len(texts[:-1]) == 29 + (stream[-1] == tokenizer.eos_token_id)
    assert {t.strip() for t in texts[:-1]} <= {tokenizer.bos_token + r["text"].strip() for r in rows(30)}
    total = sum(len(tokenizer(r["text"])["input_ids"]) + 1 for r in rows(30))
    assert blocks.tokens == total // 7 * 7


def test_order_follows_the_seed_and_tokens_limit_is_a_prefix(tmp_path, tokenizer):
    jsonl(tmp_path / "train.jsonl", rows(200))
    whole, again, other = (load_blocks(tmp_path, tokenizer, 16, seed=s) for s in (0, 0, 1))
    assert torch.equal(whole.input_ids, again.input_ids) and not torch.equal(whole.input_ids, other.input_ids)
    part = load_blocks(tmp_path, tokenizer, 16, tokens=100)
    assert len(part) == 6 and torch.equal(part.input_ids, whole.input_ids[:6]) and part.keys() == whole.keys()[:6]


def test_single_file_is_split_by_passage_without_overlap(tmp_path, tokenizer):
    path = jsonl(tmp_path / "corpus.jsonl", rows(600))
    parts = {}
    for split in ("train", "valid", "test"):
        text = tokenizer.decode(load_blocks(path, tokenizer, 8, split).input_ids.flatten())
        parts[split] = {t.strip() for t in text.split(tokenizer.eos_token)[:-1]}
    assert parts["train"].isdisjoint(parts["valid"] | parts["test"]) and parts["valid"].isdisjoint(parts["test"])
    assert 500 < len(parts["train"]) < 575 and 15 < len(parts["valid"]) < 50
    with pytest.raises(UserError, match="no ood split"):
        load_blocks(path, tokenizer, 8, "ood")


def test_folder_uses_its_own_files(tmp_path, tokenizer):
    jsonl(tmp_path / "train.jsonl", rows(20))
    jsonl(tmp_path / "validation.jsonl", rows(20, 100))
    text = tokenizer.decode(load_blocks(tmp_path, tokenizer, 8, "valid").input_ids.flatten())
    assert "Passage 10" in text and "Passage 5" not in text
    with pytest.raises(UserError, match="no test file"):
        load_blocks(tmp_path, tokenizer, 8, "test")


def test_plain_text_keeps_paragraphs_together(tmp_path, tokenizer):
    text = "\n\n".join(f"Paragraph {i} " + "of words " * 40 for i in range(60))
    (tmp_path / "train.txt").write_text(text)
    blocks = load_blocks(tmp_path, tokenizer, 32)
    ends = int((blocks.input_ids == tokenizer.eos_token_id).sum())
    assert 5 <= ends < 20 and "\n\nParagraph" in tokenizer.decode(blocks.input_ids.flatten())


def test_document_masks(tmp_path, tokenizer):
    jsonl(tmp_path / "train.jsonl", rows(30))
    assert load_blocks(tmp_path, tokenizer, 32).document_ids is None
    blocks = load_blocks(tmp_path, tokenizer, 32, document_masks="on")
    ends = blocks.input_ids == tokenizer.eos_token_id
    expected = torch.cat([torch.zeros(len(blocks), 1), ends[:, :-1].cumsum(1)], dim=1)
    assert torch.equal(blocks.document_ids.long(), expected.long())
    labels = blocks.labels()
    assert bool((labels[:, :-1][ends[:, :-1]] == -100).all()) and bool((labels[:, -1] == -100).all())
    kept = labels != -100
    assert torch.equal(labels[:, :-1][kept[:, :-1]], blocks.input_ids[:, 1:][kept[:, :-1]])
    assert int(kept.sum()) == int((~ends[:, :-1]).sum())


PROMPT = "{% if add_generation_prompt %}<assistant>{% endif %}"
TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}" + PROMPT
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}\n"
    "{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}" + PROMPT
)


@pytest.mark.parametrize("template", [TURNS, MARKED])
def test_chat_loss_is_on_the_assistants_words(tmp_path, template):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples/tiny-mixtral")
    tokenizer.chat_template = template
    talk = [
        {"role": "user", "content": "Where is the sea?"},
        {"role": "assistant", "content": "Beyond the hill."},
        {"role": "user", "content": "And the moon?"},
        {"role": "assistant", "content": "Above it."},
    ]
    jsonl(tmp_path / "train.jsonl", [{"messages": talk}] * 6)
    blocks = load_blocks(tmp_path, tokenizer, 24)
    assert blocks.document_ids is not None
    learnt = tokenizer.decode(blocks.input_ids[blocks.labels_mask])
    assert "Beyond the hill." in learnt and "Above it." in learnt and "moon" not in learnt and "<user>" not in learnt
    labels = blocks.labels()
    assert "Where" not in tokenizer.decode(labels[labels != -100])
    assert torch.equal(blocks.loss_mask(), labels != -100) and bool(blocks.loss_mask().any())


def test_chat_without_template_is_refused(tmp_path, tokenizer):
    jsonl(tmp_path / "train.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}])
    with pytest.raises(UserError, match="chat template"):
        load_blocks(tmp_path, tokenizer, 8)


def test_mixture_follows_weights(tmp_path, tokenizer):
    a = jsonl(tmp_path / "a.jsonl", [{"text": "alpha beta gamma " * 30, "domain": "a"}] * 40)
    b = jsonl(tmp_path / "b.jsonl", [{"text": "one two three " * 30, "domain": "b"}] * 40)
    (tmp_path / "fa").mkdir(), (tmp_path / "fb").mkdir()
    a.rename(tmp_path / "fa/train.jsonl"), b.rename(tmp_path / "fb/train.jsonl")
    mixture = {str(tmp_path / "fa"): 0.7, str(tmp_path / "fb"): 0.3}
    blocks = load_blocks(mixture, tokenizer, 16, tokens=1600)
    assert blocks.domains.count("a") == 70 and blocks.domains.count("b") == 30
    assert blocks.domains[:70] != ["a"] * 70
    text = ",".join(f"{path}={weight}" for path, weight in mixture.items())
    assert torch.equal(load_blocks(text, tokenizer, 16, tokens=1600).input_ids, blocks.input_ids)
    for wrong in ("a=0.5,b", "a=0,b=1", "a=0.5,a=0.5"):
        with pytest.raises(UserError, match="data mixture"):
            load_blocks(wrong, tokenizer, 16, tokens=1600)
    with pytest.raises(UserError, match="share of the mixture"):
        load_blocks(mixture, tokenizer, 16, tokens=10**6)


def test_slicing_and_joining_keep_everything_aligned():
    ids = torch.arange(24).view(6, 4)
    blocks = Blocks(ids, list("abcdef"), attention_mask=ids % 5 != 0)
    part = blocks[[4, 1]]
    assert part.domains == ["e", "b"] and torch.equal(part.attention_mask, part.input_ids % 5 != 0)
    assert part.tokens == 7 and part.keys() == [blocks.keys()[4], blocks.keys()[1]]
    joined = join_blocks([blocks[:2], Blocks(ids[2:])])
    assert torch.equal(joined.input_ids, ids) and joined.tokens == 6 + 16
    assert blocks[:1].keys() != Blocks(ids[:1]).keys()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "does not exist"),
        ("empty.jsonl", "", "is empty"),
        ("blank.jsonl", '{"text": "  "}\n' * 50, "has no text"),
        ("fields.jsonl", '{"body": "x", "title": "y"}\n', "no `text` field .found body, title"),
        ("broken.jsonl", '{"text": "x"\n', "cannot be read as json"),
        ("numbers.jsonl", '{"text": 5}\n' * 50, "must be a string"),
        ("short.jsonl", '{"text": "a few words"}\n', "fewer than one block|has no text"),
        ("notes.pdf", "x", "unknown ending"),
    ],
)
def test_bad_sources_are_one_sentence(tmp_path, tokenizer, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_blocks(tmp_path / name, tokenizer, 256)


def test_hub_out_of_reach_says_how_to_pass_data(tokenizer, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot be read from the hub.*--data"):
        load_blocks("nobody/no-such-corpus", tokenizer, 16, tokens=100)


def test_a_file_for_one_purpose_is_used_whole(text, tokenizer):
    whole = load_blocks(text / "ood.jsonl", tokenizer, 64, "all")
    parts = [load_blocks(text / "ood.jsonl", tokenizer, 64, split) for split in ("train", "valid")]
    assert len(whole) > sum(len(p) for p in parts) - 3
    assert set(whole.domains) == {"history"}
    with pytest.raises(UserError, match="needs a single file"):
        load_blocks(text, tokenizer, 64, "all")


def test_the_tokens_of_tool_calls_are_marked_in_the_blocks(tmp_path, tokenizer):
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% for c in m.tool_calls or [] %} CALL {{ c.function.name }}{% endfor %}"
        "</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "I look", "tool_calls": [call]}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for _ in range(20)))
    blocks = load_blocks(tmp_path, tokenizer, 32, options=TextOptions(chat_template=str(template)))
    assert blocks.calls_mask is not None
    called = tokenizer.decode(blocks.input_ids[0][blocks.calls_mask[0]])
    assert "CALL weather" in called and "look" not in called and "user" not in called
    plain = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "I look"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"messages": plain}) + "\n" for _ in range(20)))
    assert load_blocks(tmp_path, tokenizer, 32, options=TextOptions(chat_template=str(template))).calls_mask is None


def test_whole_chats_begin_in_a_block_that_holds_them(tmp_path, tokenizer):
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    generator = torch.Generator().manual_seed(torch.seed() % 2**32)
    sizes = torch.randint(1, 20, (60,), generator=generator).tolist()
    rows = [
        {"messages": [{"role": "user", "content": f"number {i}"}, {"role": "assistant", "content": "word " * size}]}
        for i, size in enumerate(sizes)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    block = 64
    cut, whole = (
        load_blocks(tmp_path, tokenizer, block, options=TextOptions(chat_template=str(template), fit=fit))
        for fit in ("cut", "whole")
    )
    assert cut.attention_mask is None and whole.attention_mask is not None and whole.labels_mask is not None
    assert whole.document_ids is not None and len(whole) >= len(cut)
    real = whole.attention_mask
    assert not whole.labels_mask[~real].any() and (whole.labels()[:, :-1][~real[:, 1:]] == -100).all()
    for row in range(len(whole)):
        text = tokenizer.decode(whole.input_ids[row][real[row]])
        assert text.lstrip().startswith("<user>") and text.rstrip().endswith("</s>")
    lengths = real.sum(1)
    for row in range(len(whole) - 1):  # nothing that would have fitted was put off
        first = int((whole.document_ids[row + 1] == whole.document_ids[row + 1, 0]).logical_and(real[row + 1]).sum())
        assert lengths[row] + first > block
    packed = whole.input_ids[real].tolist()
    assert (
        packed == cut.input_ids.flatten().tolist()[: len(packed)]
        or packed[: cut.input_ids.numel()] == cut.input_ids.flatten().tolist()
    )


def test_a_fit_that_is_not_known_is_refused():
    with pytest.raises(UserError, match="data.fit must be one of cut, whole; found 'some'"):
        TextOptions(fit="some")
