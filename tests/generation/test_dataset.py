"""Datasets that a teacher writes: what is in them, that they go on where they stopped, and that nothing is lost."""

import dataclasses
import gzip
import json

import pytest

import moe2dense.generation.dataset as dataset
from moe2dense.__main__ import main
from moe2dense.config.schema import WriteConfig
from moe2dense.data.load import load_blocks
from moe2dense.errors import UserError
from moe2dense.generation.dataset import sizes, stop_ids, summary, write_text
from moe2dense.generation.streamed import Completion
from moe2dense.teacher.load import load_teacher

SMALL = WriteConfig(prompt_tokens=9, new_tokens=14, top_p=0.9, shard=16, min_tokens=2)


@pytest.fixture(scope="module")
def teacher(tiny):
    return load_teacher(tiny, memory="300MB")


def records(folder):
    lines = [
        line
        for p in sorted(folder.glob("train-*.gz"))
        for line in gzip.decompress(p.read_bytes()).decode().splitlines()
    ]
    return [json.loads(line) for line in lines]


def test_written_text_is_read_like_any_other(teacher, text, tokenizer, tmp_path):
    folder = write_text(teacher, tmp_path / "w", text, SMALL, 700, block=64)
    rows, manifest = records(folder), json.loads((folder / "writing.json").read_text())
    assert summary(folder)["tokens"] >= 700 and summary(folder)["texts"] == len(rows)
    assert manifest["settings"]["top_p"] == 0.9 and len(manifest["teacher"]) == 32
    assert all(r["prompt"] and r["completion"].strip() and r["nll"] > 0 for r in rows)
    blocks = load_blocks(folder, tokenizer, 64, "train")
    assert blocks.labels_mask is not None and blocks.document_ids is not None
    first = blocks.input_ids[0][blocks.labels_mask[0] & (blocks.document_ids[0] == 0)]
    together = tokenizer.decode(first[:-1])  # without the closing token
    assert any(r["completion"] == together or r["completion"].strip() == together.strip() for r in rows)


def test_so_many_prompts_are_continued_again(teacher, text, tmp_path):
    folder = write_text(teacher, tmp_path / "w", text, SMALL, 400, block=64, different=3)
    rows = records(folder)
    assert len({r["prompt"] for r in rows}) == 3 and len(rows) > 9
    assert len({r["completion"] for r in rows}) > 6  # with other random numbers


def test_prompt_can_be_learnt_too(teacher, text, tokenizer, tmp_path):
    folder = write_text(teacher, tmp_path / "w", text, dataclasses.replace(SMALL, learn_prompt=True), 300, block=64)
    blocks = load_blocks(folder, tokenizer, 64, "train")
    assert blocks.labels_mask is None and blocks.document_ids is None
    assert {"text", "nll", "number"} <= set(records(folder)[0])


def test_conversations_are_answered(teacher, tokenizer, tmp_path):
    tokenizer = __import__("copy").deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    source = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "Who is the king?"}, {"role": "assistant", "content": "old"}]
    source.write_text(
        "".join(json.dumps({"messages": [{**turns[0], "content": f"Who {i}?"}, turns[1]]}) + "\n" for i in range(60))
    )
    folder = write_text(teacher, tmp_path / "w", source, SMALL, 200, block=64, tokenizer=tokenizer)
    for row in records(folder):
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
        assert row["messages"][1]["content"] not in ("", "old")
    assert load_blocks(folder, tokenizer, 32, "train").labels_mask is not None


def test_a_stopped_writing_goes_on_as_if_it_had_not(teacher, text, tmp_path, monkeypatch):
    settings = dataclasses.replace(SMALL, duplicates=0.9, learn_prompt=True)
    whole = write_text(teacher, tmp_path / "a", text, settings, 900, block=64)
    real, calls = dataset.generate, []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(dataset, "generate", dies)
    with pytest.raises(KeyboardInterrupt):
        write_text(teacher, tmp_path / "b", text, settings, 900, block=64)
    assert len(records(tmp_path / "b")) > 0
    monkeypatch.setattr(dataset, "generate", real)
    again = write_text(teacher, tmp_path / "b", text, settings, 900, block=64)
    assert records(again) == records(whole)
    with pytest.raises(UserError, match="written with other settings"):
        write_text(teacher, again, text, dataclasses.replace(settings, top_p=0.5), 900, block=64)
    shard = next(again.glob("train-*.gz"))
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(UserError, match="damaged"):
        write_text(teacher, again, text, settings, 900, block=64)


def test_a_teacher_that_only_ends(teacher, text, tmp_path, monkeypatch):
    real, calls = dataset.generate, []

    def ends(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs) if len(calls) == 1 else [Completion(stopped=True) for _ in args[1]]

    monkeypatch.setattr(dataset, "generate", ends)
    with pytest.raises(UserError, match="only its end-of-text token after all 16 prompts.*kept in"):
        write_text(teacher, tmp_path / "w", text, SMALL, 900, block=64)
    assert records(tmp_path / "w")


def test_a_teacher_whose_every_word_ends_the_text(teacher, text, tmp_path, monkeypatch, capsys):
    """Decoded for real: any token closes the text."""
    monkeypatch.setattr(dataset, "stop_ids", lambda *_: list(range(teacher.config.vocab_size)))
    with pytest.raises(UserError, match="only its end-of-text token after all 16 prompts"):
        write_text(teacher, tmp_path / "w", text, SMALL, 900, block=64)
    assert json.loads((tmp_path / "w" / "writing.json").read_text())["shards"] == []
    call = ["generate", str(teacher.path), "--data", str(text), "--out", str(tmp_path / "c"), "--tokens", "200"]
    assert main([*call, "--block", "64", "--memory", "300MB"]) == 2
    said = capsys.readouterr().err
    assert said.count("error:") == 1 and "only its end-of-text token" in said and "Traceback" not in said


def test_filters_that_keep_nothing(teacher, text, tmp_path):
    with pytest.raises(UserError, match="kept 0 of 16 written texts .* by nll"):
        write_text(teacher, tmp_path / "w", text, dataclasses.replace(SMALL, nll="100:200"), 900, block=64)


def test_stop_ids_are_the_checkpoints(teacher, tokenizer):
    assert stop_ids(teacher, tokenizer) == [2]


def test_greedy_text_ends_with_its_prompts(teacher, tmp_path):
    source = tmp_path / "p.jsonl"
    source.write_text(
        "".join(json.dumps({"prompt": f"The king of {n}"}) + "\n" for n in ("France", "Spain", "the old hills")) * 9
    )
    folder = write_text(
        teacher,
        tmp_path / "w",
        source,
        dataclasses.replace(SMALL, temperature=0.0, top_p=1.0, min_tokens=1),
        10**6,
        block=64,
    )
    assert 0 < len(records(folder)) <= 27


def test_command(tiny, text, tmp_path, capsys):
    out = tmp_path / "w"
    call = ["generate", str(tiny), "--data", str(text), "--out", str(out), "--tokens", "300", "--prompt-tokens", "8"]
    assert main([*call, "--new-tokens", "12", "--temperature", "0.8"]) == 0
    assert "texts of" in capsys.readouterr().out
    assert main([*call[:-1], "300"]) == 2
    assert "leaves nothing to write" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    assert main(["generate", str(tiny), "--data", str(text), "--out", str(tmp_path / "full")]) == 2
    assert "holds no writing.json" in capsys.readouterr().err


def test_prompts_of_a_mixture_come_in_proportion(tokenizer, tmp_path):
    from itertools import islice

    from moe2dense.generation.prompts import read_prompts

    for name in "ab":
        rows = [{"prompt": f"{name} question {i}"} for i in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    mixture = f"{tmp_path / 'a.jsonl'}=0.75,{tmp_path / 'b.jsonl'}=0.25"
    prompts = [p.text[0] for p in islice(read_prompts(mixture, tokenizer, "train", 0, 8, 8), 40)]
    assert (prompts.count("a"), prompts.count("b")) == (30, 10)
    assert prompts[:8].count("b") in (1, 2)


def test_beginnings_of_passages(tokenizer, tmp_path):
    from moe2dense.generation.prompts import read_prompts

    words = " ".join(f"word{i}" for i in range(50))
    (tmp_path / "t.jsonl").write_text(
        json.dumps({"text": words, "domain": "x"}) + "\n" + json.dumps({"text": " "}) + "\n"
    )
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    prompts = [p for split in ("train", "valid", "test") for p in _prompts(tmp_path / "t.jsonl", tokenizer, split)]
    assert [p.ids for p in prompts] == [
        [tokenizer.bos_token_id, *ids[a : a + 6]] for a in range(0, len(ids), 20) if len(ids) - a >= 4
    ]
    assert prompts[0].domain == "x" and words.startswith(prompts[0].text)
    (tmp_path / "u.jsonl").write_text(json.dumps({"text": " "}) + "\n")
    with pytest.raises(UserError, match="no text to continue"):
        list(read_prompts(tmp_path / "u.jsonl", tokenizer, "train", 0, 6, 20))


def _prompts(path, tokenizer, split):
    from moe2dense.generation.prompts import read_prompts

    try:
        return list(read_prompts(path, tokenizer, split, 0, 6, 20))
    except UserError:  # a single file is split by a hash of its passages
        return []


def test_what_stands_before_a_prompt_takes_its_place_from_what_is_written():
    """A BOS before 32 prompt tokens of a block of 256 leaves 223 new ones, not one more than the teacher has positions."""
    assert sizes(WriteConfig(prompt_tokens=32), 256, 256, prefix=1) == (32, 223)
    assert sizes(WriteConfig(prompt_tokens=32, new_tokens=7), 256, 256, prefix=1) == (32, 7)
    with pytest.raises(UserError, match="leaves nothing to write"):
        sizes(WriteConfig(prompt_tokens=31), 256, 32, prefix=1)
