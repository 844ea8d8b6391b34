"""Texts side by side, their scores against brute force, the judge that must not be the teacher, and the blind sheet."""

import csv
import io
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe2dense.config.schema import EvaluateConfig
from moe2dense.data.blocks import Blocks
from moe2dense.data.load import load_blocks
from moe2dense.errors import UserError
from moe2dense.evaluation.judge import Judge, check_judge
from moe2dense.evaluation.sample_texts import choose_prompts, teacher_tokens
from moe2dense.evaluation.samples import distinct_bigrams, side_by_side
from moe2dense.reporting.rating_sheet import rating_sheet, write_sheet
from moe2dense.teacher.load import load_teacher
from moe2dense.weights.fingerprint import checkpoint_fingerprint, text_hash, weight_hashes


@pytest.fixture(scope="module")
def whole(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    model.set_experts_implementation("eager")
    return model.eval()


@pytest.fixture(scope="module")
def held(text, tokenizer):
    return load_blocks(text, tokenizer, 48, "valid", tokens=48 * 40)


def nll_of(model, prompt, ids):
    """Mean nats per token of `ids` after `prompt`, in float64."""
    with torch.no_grad():
        logp = model(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
    return -sum(float(logp[len(prompt) - 1 + i, t]) for i, t in enumerate(ids)) / len(ids)


def test_texts_and_scores_are_transformers_own(tiny, whole, held, tokenizer):
    student = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.no_grad():
        student.model.embed_tokens.weight.add_(torch.randn(student.model.embed_tokens.weight.shape) * 0.3)
    options = EvaluateConfig(samples=3, prompt_tokens=20, sample_tokens=9)
    samples = side_by_side(student, load_teacher(tiny), held, options, tokenizer=tokenizer, seed=4)
    rows, prompt, new = choose_prompts(held, 3, 20, 9, seed=4)
    assert (prompt, new) == (20, 9) == (samples["prompt_tokens"], samples["tokens"]) and "from memory" in samples["how"]
    texts = {"teacher": [], "student": [], "text": []}
    for row, shown in zip(rows, samples["rows"], strict=True):
        ids = held.input_ids[row, :20]
        for writer, model in (("teacher", whole), ("student", student.eval())):
            mask = torch.ones(1, 20, dtype=torch.int64)
            out = model.generate(ids[None], attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0)
            texts[writer].append([t for t in out[0, 20:].tolist() if t != tokenizer.eos_token_id])
            assert shown[writer] == tokenizer.decode(out[0], skip_special_tokens=True)[len(tokenizer.decode(ids)) :]
        texts["text"].append(held.input_ids[row, 20:29].tolist())
        assert shown["prompt"] == tokenizer.decode(ids) and shown["domain"] == held.domains[row]
    prompts = [held.input_ids[row, :20].tolist() for row in rows]
    for writer, written in texts.items():
        for reader, model in (("teacher", whole), ("student", student)):
            total = sum(nll_of(model, p, ids) * len(ids) for p, ids in zip(prompts, written, strict=True))
            expected = total / sum(map(len, written))
            assert samples["scores"][writer][reader] == pytest.approx(expected, rel=1e-4), (writer, reader)
    assert samples["scores"]["teacher"]["teacher"] < samples["scores"]["text"]["teacher"]
    assert side_by_side(student, None, held, EvaluateConfig(samples=0), tokenizer=tokenizer) is None


def test_drawn_texts_follow_the_seed(tiny, whole, held, tokenizer):
    options = EvaluateConfig(samples=2, prompt_tokens=8, sample_tokens=12, sample_temperature=1.0)
    teacher = load_teacher(tiny)
    one, two, other = (side_by_side(whole, teacher, held, options, tokenizer=tokenizer, seed=s) for s in (1, 1, 2))
    assert one == two and one["rows"] != other["rows"]
    # the same model from the same random numbers writes the same text, streamed or not
    assert [r["student"] for r in one["rows"]] == [r["teacher"] for r in one["rows"]]


def test_prompts_are_spread_over_domains_and_lie_within_one_document():
    ids = torch.zeros(6, 20, dtype=torch.int64)
    documents, mask = torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool)
    documents[0, 5:], mask[1, 8:] = 1, False
    blocks = Blocks(ids, ["a", "a", "a", "a", "a", "b"], attention_mask=mask, document_ids=documents)
    rows, prompt, new = choose_prompts(blocks, 2, 6, 6)
    assert (prompt, new) == (6, 6) and sorted(blocks.domains[r] for r in rows) == ["a", "b"]
    rows, prompt, new = choose_prompts(blocks, 9, 30, 30)
    assert (prompt, new) == (10, 10) and set(rows) == {2, 3, 4, 5}


class Streamed:
    """A teacher that does not fit in memory."""

    resident = False

    class checkpoint:
        nbytes = 2_000_000_000


def test_a_teacher_on_disk_writes_within_its_limit_and_says_so(tiny, whole, held, tokenizer, monkeypatch):
    assert teacher_tokens(Streamed, 32, "100GB")[0] == 32
    count, how = teacher_tokens(Streamed, 32, "20GB")
    assert count == 10 and "10 tokens" in how
    count, how = teacher_tokens(Streamed, 32, "10GB")
    assert count == 0 and "wrote nothing" in how and "10GB" in how
    monkeypatch.setattr("moe2dense.evaluation.samples.teacher_tokens", lambda *_: (0, "Nothing."))
    options = EvaluateConfig(samples=2, prompt_tokens=8, sample_tokens=6)
    samples = side_by_side(whole, load_teacher(tiny), held, options, tokenizer=tokenizer)
    assert "teacher" not in samples["scores"] and samples["rows"][0]["teacher"] is None and samples["tokens"] == 6
    assert set(next(csv.DictReader(io.StringIO(rating_sheet(samples)[1]))).values()) >= {"student", "text"}


def test_distinct_bigrams():
    assert distinct_bigrams([[1, 2, 1, 2, 1], [3, 4]]) == pytest.approx(3 / 5)
    assert distinct_bigrams([[1], []]) is None


def copy_of(tiny, folder, change=None, dtype=None):
    """The teacher's checkpoint elsewhere: in two shards, perhaps in another dtype or with a tensor changed."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, folder / name)
    state = {k: v.to(dtype or v.dtype).clone() for k, v in load_file(tiny / "model.safetensors").items()}
    if change:
        state[change] += 0.5
    names = sorted(state)
    where = {}
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({n: state[n] for n in part}, folder / f"model-{i}.safetensors")
        where |= dict.fromkeys(part, f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def test_the_teacher_is_known_again_however_it_is_stored(tiny, tmp_path):
    same = copy_of(tiny, tmp_path / "same")
    wide = copy_of(tiny, tmp_path / "wide", dtype=torch.float32)
    other = copy_of(tiny, tmp_path / "other", change="model.layers.2.self_attn.q_proj.weight")
    assert checkpoint_fingerprint(tiny) == checkpoint_fingerprint(same) == checkpoint_fingerprint(wide)
    assert checkpoint_fingerprint(tiny) != checkpoint_fingerprint(other)
    for folder in (same, wide):
        with pytest.raises(UserError, match="teacher's own weights"):
            check_judge(str(folder), tiny)
    check_judge(str(other), tiny)
    with pytest.raises(UserError, match="student's own weights"):
        check_judge(str(other), tiny, other)
    with pytest.raises(UserError, match="no checkpoint"):
        check_judge(str(tmp_path), tiny)


def test_the_judge_scores_bytes_with_its_own_tokens(tiny, whole, tokenizer, tmp_path):
    prompts, texts = ["The captain of the", "It was", "Nothing"], [" ship — sailed", " late and dark", ""]
    nats = Judge(tiny).nats_per_byte(prompts, texts)
    total = 0.0
    for prompt, text in zip(prompts, texts, strict=True):
        ids, before = tokenizer(prompt + text)["input_ids"], len(tokenizer(prompt)["input_ids"])
        if text:
            total += nll_of(whole, ids[:before], ids[before:]) * (len(ids) - before)
    assert nats == pytest.approx(total / sum(len(t.encode()) for t in texts), rel=1e-4)
    assert Judge(tiny).nats_per_byte(["a"], [""]) is None


def made_up(count=8):
    rows = [
        {"domain": "d", "prompt": f"prompt {i}", "student": f"one {i}", "teacher": f"two {i}", "text": f"three {i}"}
        for i in range(count)
    ]
    return {"rows": rows}


def test_the_sheet_is_blind_and_its_key_opens_it(tmp_path):
    samples = made_up()
    sheet, key = rating_sheet(samples, seed=3)
    assert "student" not in sheet and "teacher" not in sheet and "three" not in sheet
    rows, answers = (list(csv.DictReader(io.StringIO(t))) for t in (sheet, key))
    assert [r["prompt"] for r in rows] != [r["prompt"] for r in samples["rows"]]
    by_prompt = {r["prompt"]: r for r in samples["rows"]}
    for row, answer in zip(rows, answers, strict=True):
        assert row["id"] == answer["id"] and row["better"] == ""
        assert {answer["A"], answer["B"]} == {"student", "teacher"}
        for side in "AB":
            assert row[side] == by_prompt[row["prompt"]][answer[side]]
    assert sum(a["A"] == "student" for a in answers) == 4
    assert (sheet, key) == rating_sheet(samples, seed=3) != rating_sheet(samples, seed=4)
    assert [p.name for p in write_sheet(samples, tmp_path)] == ["samples.csv", "samples-key.csv"]


def test_hashes_follow_contents(tmp_path):
    a = Blocks(torch.arange(12).view(2, 6))
    b = Blocks(torch.arange(12).view(2, 6).flip(0))
    assert text_hash(a) == text_hash(a[:]) != text_hash(b)
    (tmp_path / "m.safetensors").write_bytes(b"abc")
    (tmp_path / "config.json").write_text("{}")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert weight_hashes(tmp_path.iterdir()) == {"m.safetensors": known}
