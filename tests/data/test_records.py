"""Records: what lies in the file is read, what is skipped is counted with its first line, every format people have."""

import csv
import gzip
import json
import os
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from moe2dense.data.counts import TextCounts
from moe2dense.data.load import load_blocks
from moe2dense.data.records import passages
from moe2dense.errors import UserError

ROOT = Path(__file__).parents[2]
TOOLS = (
    "{% if tools %}TOOLS {{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{% for c in m.tool_calls or [] %}"
    "CALL {{ c.function | tojson }}{% endfor %}{{ m.content or '' }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "examples/tiny-mixtral")


def jsonl(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def texts(path, split="train", counts=None):
    return sorted(p["text"] for p in passages(path, split, 0, counts))


@pytest.mark.parametrize("ending", ["jsonl", "txt", "parquet", "jsonl.gz"])
def test_a_file_replaced_under_the_same_time_is_read_anew(tmp_path, ending):
    path = tmp_path / f"train.{ending}"
    for word in ("alpha", "bravo", "charlie"):  # the first two files are of one size
        rows = [{"text": f"{word} {i:03}"} for i in range(40)]
        if ending == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        elif ending == "txt":
            path.write_text("\n".join(r["text"] for r in rows))
        else:
            lines = "".join(json.dumps(r) + "\n" for r in rows)
            path.write_bytes(gzip.compress(lines.encode()) if ending.endswith("gz") else lines.encode())
        os.utime(path, (1, 1))
        assert texts(tmp_path) == [r["text"] for r in rows]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_no_argument_is_made_up(tmp_path, ending):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples/tiny-mixtral")
    tokenizer.chat_template = TOOLS
    arguments = [{"city": "Paris"}, {"date": "May"}, {"n": 3}]
    rows = [
        {
            "messages": [
                {"role": "user", "content": "q"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"type": "function", "function": {"name": "get", "arguments": a}}],
                },
                {"role": "tool", "content": "sunny"},
                {"role": "assistant", "content": "it is"},
            ],
            "tools": [{"type": "function", "function": {"name": "get"}}],
            "changing": i if ending == "parquet" else [i, {"x": i}][i % 2],
        }
        for i, a in enumerate(arguments)
    ]
    path = tmp_path / f"train.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        jsonl(path, rows)
    blocks = load_blocks(tmp_path, tokenizer, 8)
    text = tokenizer.decode(blocks.input_ids.flatten())
    whole = {tokenizer.apply_chat_template(r["messages"], tools=r["tools"], tokenize=False) for r in rows}
    assert "null" not in text and "None" not in text
    assert sum(rendered in text for rendered in whole) >= 2  # the last is cut at the end of the last block


def test_what_is_skipped_is_counted_with_its_first_line(tmp_path, tokenizer):
    good = [{"prompt": f"ask {i}", "completion": f" answer {i}"} for i in range(60)]
    null = [{"prompt": f"ask {i}", "completion": None} for i in range(200)]
    path = jsonl(tmp_path / "train.jsonl", [*good, *null, {"text": 5}])
    with path.open("a") as file:
        file.write("\n\n{broken\n")
    counts = TextCounts()
    blocks = load_blocks(tmp_path, tokenizer, 16, counts=counts)
    assert blocks.tokens and (counts.read, counts.used, counts.skipped) == (262, 60, 202)
    stated = counts.to_dict()
    assert stated["reasons"][0] == {"reason": "`completion` is null", "count": 200, "first": "train.jsonl line 61"}
    places = {r["first"]: r["reason"] for r in stated["reasons"]}
    assert (
        "must be a string" in places["train.jsonl line 261"]
        and "cannot be read as json" in places["train.jsonl line 264"]
    )
    assert (
        "60 of 262 records read are used; 202 skipped, first train.jsonl line 61: `completion` is null"
        in counts.sentence()
    )
    with pytest.warns(UserWarning, match="202 skipped"):
        load_blocks(tmp_path, tokenizer, 16)


def test_nothing_usable_names_the_fields(tmp_path, tokenizer):
    jsonl(tmp_path / "train.jsonl", [{"body": "x", "title": "y"}] * 3)
    with pytest.raises(UserError, match=r"0 of 3 records .*line 1: no `text` field .found body, title.*`messages`"):
        load_blocks(tmp_path, tokenizer, 16)


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize(
    ("record", "passage"),
    [
        ({"conversations": SHAREGPT}, {"messages": TURNS}),
        ({"conversations": SHAREGPT, "system": "s"}, {"messages": [{"role": "system", "content": "s"}, *TURNS]}),
        ({"conversations": TURNS}, {"messages": TURNS}),
        ({"messages": json.dumps(TURNS)}, {"messages": TURNS}),
        ({"prompt": "p", "response": "r"}, {"prompt": "p", "completion": "r"}),
        ({"prompt": "p", "completion": '{"name": "f"}'}, {"prompt": "p", "completion": '{"name": "f"}'}),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, {"messages": TURNS, "learn_from": 1}),
        ({"prompt": TURNS[:1], "completion": "b"}, {"messages": TURNS, "learn_from": 1}),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, {"prompt": "p", "completion": "c"}),
        ({"prompt": "a", "chosen": TURNS, "rejected": TURNS[:1]}, {"messages": TURNS}),
        ({"prompt": TURNS[:1], "chosen": TURNS[1:]}, {"messages": TURNS, "learn_from": 1}),
        ({"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1]}, {"messages": TURNS, "learn_from": 1}),
        ({"messages": None, "text": "t", "other": 1}, {"text": "t"}),
        ({"messages": TURNS, "tools": '[{"type": "function"}]'}, {"messages": TURNS, "tools": [{"type": "function"}]}),
        (
            {"conversations": [{"from": "function_call", "value": '{"name": "f", "arguments": {}}'}]},
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
                    }
                ]
            },
        ),
    ],
)
def test_every_shape_of_record(tmp_path, record, passage):
    jsonl(tmp_path / "train.jsonl", [record | {"domain": "d"}])
    assert list(passages(tmp_path, "train", 0)) == [passage | {"domain": "d"}]


def compressed(path, data, kind):
    with pa.output_stream(str(path), compression=kind) as out:
        out.write(data)


@pytest.mark.parametrize("ending", ["ndjson", "jsonl.zst", "csv", "csv.gz", "tsv", "json", "txt", "txt.zst"])
def test_every_ending(tmp_path, ending):
    rows = [{"id": i, "text": f'line {i}, "quoted", tab\tand naïve'} for i in range(20)]
    path, plain = tmp_path / f"train.{ending}", tmp_path / "plain"
    if ending.split(".")[0] in ("csv", "tsv"):
        with plain.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["id", "text"], delimiter="\t" if ending == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif ending == "json":
        plain.write_text(json.dumps({"version": 1, "data": rows}))
    elif ending.startswith("txt"):
        plain.write_text("\n".join(r["text"] for r in rows) + "\n")
    else:
        jsonl(plain, rows)
    kind = {"zst": "zstd", "gz": "gzip"}.get(ending.rpartition(".")[2])
    shutil.copy(plain, path) if kind is None else compressed(path, plain.read_bytes(), kind)
    counts = TextCounts()
    assert texts(tmp_path, counts=counts) == sorted(r["text"] for r in rows)
    assert ("a document a line" in counts.sentence()) == ending.startswith("txt")


def test_a_cloned_dataset(tmp_path, tokenizer):
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("a card")
    for i in range(2):
        rows = pa.Table.from_pylist([{"text": f"part {i} row {j}"} for j in range(5)])
        pq.write_table(rows, tmp_path / "data" / f"train-0000{i}-of-00002.parquet")
    assert len(texts(tmp_path)) == 10
    with pytest.raises(UserError, match="no valid file .found train-00000"):
        texts(tmp_path, "valid")
    (tmp_path / "data/validation-00000-of-00001.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="git lfs pull"):
        texts(tmp_path, "valid")


def test_large_parquet_goes_through_a_file(tmp_path, monkeypatch):
    rows = [{"text": f"row {i}", "messages": [{"role": "user", "extra": None}]} for i in range(500)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet", row_group_size=64)
    monkeypatch.setattr("moe2dense.data.readers._IN_MEMORY", 0)
    mapped = list(passages(tmp_path, "train", 3))
    monkeypatch.undo()
    assert len(mapped) == 500 and mapped == list(passages(tmp_path, "train", 3))


def test_lines_are_found_across_the_pieces_of_a_file(tmp_path, monkeypatch):
    rows = [{"text": "x" * (i % 37) + str(i)} for i in range(300)]
    path = tmp_path / "train.jsonl"
    path.write_bytes("\r\n".join(json.dumps(r) for r in rows).encode("utf-8-sig"))
    for size in (7, 64, 2**24):
        monkeypatch.setattr("moe2dense.data.readers._CHUNK", size)
        assert texts(tmp_path) == sorted(r["text"] for r in rows)


def _plain(text):
    """What a .txt file is by its definition: paragraphs gathered into passages, or the lines of a file without blank lines."""
    paragraphs = [p for p in text.split("\n\n") if p]
    if len(paragraphs) < 2:
        return [line for line in text.splitlines() if line.strip()]
    passages, part = [], []
    for paragraph in paragraphs:
        part.append(paragraph)
        if sum(map(len, part)) >= 40:
            passages.append("\n\n".join(part))
            part = []
    return [*passages, "\n\n".join(part)] if part else passages


@pytest.mark.parametrize("in_memory", [0, 2**26])
def test_txt_of_any_line_ends_is_read_in_pieces(tmp_path, monkeypatch, in_memory):
    monkeypatch.setattr("moe2dense.data.readers._IN_MEMORY", in_memory)
    monkeypatch.setattr("moe2dense.data.readers._PASSAGE", 40)
    monkeypatch.setattr("moe2dense.data.readers._CHUNK", 5)
    monkeypatch.setattr("moe2dense.data.readers._ROWS", 3)
    draw = random.Random(0)
    for blank in (True, False):
        for _ in range(30):
            pieces = ["a word ", "\n", "\r\n", "naïve", "\u2028", " "] + ["\n\n", "\r\n\r\n", "\n\n\n"] * blank
            raw = "x" + "".join(draw.choice(pieces) for _ in range(draw.randint(1, 60)))
            path = tmp_path / "train.txt"
            path.write_bytes(raw.encode())
            expected = _plain(raw.replace("\r\n", "\n"))
            assert texts(tmp_path) == sorted(t for t in expected if t.strip()), raw
