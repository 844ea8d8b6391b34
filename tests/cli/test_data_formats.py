"""Every form of text that people have, through the command line: what is rendered, and what of it is learnt."""

import csv
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe2dense.__main__ import main

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %} CALL {{ c.function.name }}{% endfor %}</s>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
QUESTION, ANSWER = "what stands by the river", "a stone house with a red door"
TURNS = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
PARTS = [TURNS[0] | {"content": [{"type": "text", "text": QUESTION}]}, TURNS[1]]
SHAREGPT = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
RECORDS = {
    "messages": {"messages": TURNS},
    "parts of content": {"messages": PARTS},
    "ShareGPT": {"conversations": SHAREGPT},
    "prompt and response": {"prompt": QUESTION + " ", "response": ANSWER},
    "prompt and completion": {"prompt": QUESTION + " ", "completion": ANSWER},
    "chosen": {"prompt": QUESTION, "chosen": TURNS, "rejected": [TURNS[0], TURNS[1] | {"content": "nothing"}]},
    "chosen answer": {"prompt": QUESTION + " ", "chosen": ANSWER, "rejected": "nothing"},
}
PLAIN = {"text": f"{QUESTION} {ANSWER}"}


def lines(records):
    return "".join(json.dumps(r) + "\n" for r in records)


def write(folder, ending, records):
    """Records as the valid split of a folder, in one of the formats."""
    path = folder / f"valid.{ending}"
    if ending in ("jsonl", "ndjson"):
        path.write_text(lines(records))
    elif ending == "jsonl.gz":
        path.write_bytes(gzip.compress(lines(records).encode()))
    elif ending == "jsonl.zst":
        with pa.output_stream(str(path), compression="zstd") as out:
            out.write(lines(records).encode())
    elif ending == "json":
        path.write_text(json.dumps(records))
    elif ending == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    elif ending == "txt":
        path.write_text("\n".join(r["text"] for r in records) + "\n")
    elif ending == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:  # a cloned dataset repository
        (folder / "data").mkdir()
        (folder / "README.md").write_text("a card")
        pq.write_table(pa.Table.from_pylist(records), folder / "data" / "validation-00000-of-00001.parquet")


def inspected(tiny, folder, capsys):
    """(learnt text, the other text) of the sample that `inspect --data` renders."""
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)
    arguments = ["--tokens", "64", "--block", "64", "--memory", "300MB", "--chat-template", str(template), "--json"]
    assert main(["inspect", str(tiny), "--data", str(folder), *arguments]) == 0
    sample = json.loads(capsys.readouterr().out)["sample"]
    assert sample, "a sample is rendered"
    return tuple(" ".join(text for text, learnt in sample if learnt is kind) for kind in (True, False))


@pytest.mark.parametrize("name", RECORDS)
def test_records(name, tiny, tmp_path, capsys):
    write(tmp_path, "jsonl", [RECORDS[name]] * 8)
    learnt, other = inspected(tiny, tmp_path, capsys)
    assert ANSWER in learnt and QUESTION in other
    assert QUESTION not in learnt and "nothing" not in learnt + other


@pytest.mark.parametrize(
    "ending", ["jsonl", "ndjson", "jsonl.gz", "jsonl.zst", "json", "csv", "txt", "parquet", "clone"]
)
def test_files(ending, tiny, tmp_path, capsys):
    write(tmp_path, ending, [PLAIN | {"id": i} for i in range(8)])
    learnt, _ = inspected(tiny, tmp_path, capsys)
    assert f"{QUESTION} {ANSWER}" in learnt


def test_unknown_columns_of_changing_type_are_left_alone(tiny, tmp_path, capsys):
    changing = [1, "two", {"x": [3]}, [4, {"y": None}], None, True, 7.5, "eight"]
    write(tmp_path, "jsonl", [{"messages": TURNS, "meta": value, str(i): value} for i, value in enumerate(changing)])
    learnt, other = inspected(tiny, tmp_path, capsys)
    assert ANSWER in learnt and QUESTION in other and "two" not in learnt + other


def test_the_sample_marks_what_is_learnt_in_text_too(tiny, tmp_path, capsys):
    write(tmp_path, "jsonl", [{"messages": TURNS}] * 8)
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    arguments = ["--tokens", "64", "--block", "64", "--memory", "300MB", "--chat-template", str(template)]
    assert main(["inspect", str(tiny), "--data", str(tmp_path), *arguments]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "what is learnt is marked" in shown and f"⟦{ANSWER}" in shown and f"⟦{QUESTION}" not in shown
