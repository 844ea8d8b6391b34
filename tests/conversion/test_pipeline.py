"""The whole conversion through the public entry, on the trained example teacher with a tiny budget."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe2dense as m2d
from moe2dense.__main__ import main

QUICK = """
[data]
eval_blocks = 8
[build]
min_tokens = 2048
local_steps = 8
layer_steps = 4
heal_epochs = 1.0
gram_tokens = 512
[train]
tokens = 8192
batch = 1024
save_every = 2
eval_every = 3
[export]
dtype = "float32"
"""


def quick(folder: Path, extra: str = "") -> Path:
    path = folder / "quick.toml"
    path.write_text(QUICK + extra)
    return path


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert")
    out = folder / "out"
    report = f'[evaluate]\nallow_loss = ["children"]\nbaseline = ["{tiny}"]\n'
    return m2d.convert(str(tiny), to="3.2m", out=out, config=quick(folder, report))


def test_everything_is_there(done):
    names = {p.name for p in done.out.iterdir()}
    assert {
        "moe2dense.toml",
        "run.json",
        "metrics.jsonl",
        "build",
        "checkpoints",
        "report.html",
        "report.json",
        "model",
    } <= names
    assert not [n for n in names if n.endswith(".tmp") or n == ".lock"]
    record = json.loads((done.out / "run.json").read_text())
    assert {"build", "train-student", "train-control", "export"} <= set(record["stages"])
    cost = record["cost"]
    assert {"build", "targets", "train-student", "evaluate", "transfer", "skills", "export"} <= set(cost)
    assert all(cost[stage]["flops"]["cpu"] > 1e9 for stage in ("build", "targets", "train-student", "evaluate"))
    checkpoint = 13_000_000
    assert cost["build"]["disk"] > checkpoint and cost["train-student"]["memory"] > cost["train-student"]["began"] > 0
    assert set(json.loads((done.out / "report.json").read_text())["run"]["cost"]) >= {"build", "targets", "evaluate"}


def test_the_model_is_dense_and_equals_the_trained_student(done):
    model = AutoModelForCausalLM.from_pretrained(done.model, dtype=torch.float32)
    assert type(model).__name__ == "MistralForCausalLM"
    assert model.num_parameters() == 3_196_608
    trained = m2d.load_student(done.out / "checkpoints" / "final").model
    ids = torch.randint(0, 4096, (3, 61), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (model(ids).logits - trained(ids).logits).abs().max()
    assert difference <= 1e-4
    assert not [n for n in load_file(done.model / "model.safetensors") if "expert" in n or "gate.weight" in n]


def test_the_report_says_what_is_exported_what_is_resampled_and_which_skills_are_kept(done, tiny, text, capsys):
    report = json.loads((done.out / "report.json").read_text())
    choice, rows = report["choice"], report["rows"]
    assert choice["exported"] == done.exported != "built" and done.gained and done.exit_code == 0
    assert rows["student"]["kl"]["value"] == pytest.approx(choice["kl"][done.exported], rel=1e-5)
    assert rows["student"]["kl"]["value"] < rows["before"]["kl"]["value"]
    assert [r["layer"] for r in report["build"] if "layer" in r] == [0, 1, 2, 3]
    assert rows["student"]["unit"] in ("works", "passages") and 4 <= rows["student"]["clusters"] <= 8
    assert rows["student"]["rare_by"] == "the training text"
    skills = {row["name"]: row for row in report["skills"]["skills"]}
    assert {"arithmetic", "copying", "induction", "brackets", "facts", "code"} == set(skills)
    assert set(skills["facts"]["scores"]) == {"teacher", "student", "before", "control"}
    assert "heal_kl_after" in (done.out / "control" / "build" / "student" / "student.json").read_text()
    base = ["--teacher", str(tiny), "--data", str(text), "--tokens", "1k"]
    capsys.readouterr()
    assert main(["eval", str(done.model), *base, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"]["teacher"]["rare_by"] == "the training text"


def test_it_writes_text(done):
    tokenizer = AutoTokenizer.from_pretrained(done.model)
    model = AutoModelForCausalLM.from_pretrained(done.model)
    prompt = tokenizer("The captain", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    ids = prompt["input_ids"]
    for _ in range(8):  # without a cache, and without generation defaults
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(written, ids[:, : written.shape[1]]) and written.shape[1] > prompt["input_ids"].shape[1]


def test_the_table_makes_sense(done):
    rows = json.loads((done.out / "report.json").read_text())["rows"]
    assert rows["teacher"]["kl"]["value"] == pytest.approx(0, abs=1e-5)
    assert rows["student"]["kl"]["value"] < rows["control"]["kl"]["value"]
    assert rows["student"]["teacher_nll"]["value"] == pytest.approx(rows["teacher"]["nll"]["value"], abs=1e-4)
    assert rows["student"]["kl"]["value"] < rows["before"]["kl"]["value"]


def test_what_may_be_lost_is_apart_and_a_baseline_has_a_row(done):
    report = json.loads((done.out / "report.json").read_text())
    rows, apart = report["rows"], report["apart"]
    assert rows["tiny-mixtral"]["kl"]["value"] == pytest.approx(0, abs=1e-4)  # the teacher as its own baseline
    tokens = [apart["held_out"][part]["student"]["tokens"] for part in ("kept", "lost")]
    assert sum(tokens) == rows["student"]["tokens"] and min(tokens) > 0
    assert set(apart["held_out"]["lost"]["student"]["by_domain"]) == {"children"}
    assert set(apart["held_out"]["kept"]) == set(rows), "every row is told apart"
    assert apart["ood"] is None and report["retention"]["kept"] != report["retention"]["overall"]
    page = (done.out / "report.html").read_text()
    assert "without children" in page and "may be lost" in page


def test_texts_side_by_side_and_hashes(done):
    report = json.loads((done.out / "report.json").read_text())
    samples = report["samples"]
    assert len(samples["rows"]) == 4 and all(r["student"] and r["teacher"] for r in samples["rows"])
    assert samples["scores"]["student"]["teacher"] > 0
    assert (done.out / "samples.csv").read_text().count("prompt") == 1
    assert "student" in (done.out / "samples-key.csv").read_text()
    hashes = report["run"]["hashes"]
    assert hashes["model.safetensors"] == hashlib.sha256((done.model / "model.safetensors").read_bytes()).hexdigest()
    assert {"teacher (sampled)", "train text", "valid text", "ood text"} <= set(hashes)
    assert all(h in (done.out / "report.html").read_text() for h in hashes.values())


def test_the_report_and_the_card_speak_of_this_run(done):
    page = (done.out / "report.html").read_text()
    assert "tiny-mixtral" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    card = (done.model / "README.md").read_text()
    assert "KL from the teacher" in card
    assert "layerwise" in card


def test_inspect_eval_and_report_read_the_run(done, tiny, text, capsys):
    assert main(["inspect", str(done.out)]) == 0
    assert main(["report", str(done.out)]) == 0
    assert main(["report", str(done.out), str(done.out)]) == 0
    capsys.readouterr()
    assert main(["eval", str(done.model), "--teacher", str(tiny), "--data", str(text), "--tokens", "1k", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"][str(done.model)]["kl"]["value"] > 0
    assert main(["eval", str(done.model), "--teacher", str(tiny), "--data", str(text), "--tokens", "1k"]) == 0
    shown = capsys.readouterr().out
    assert "KL by domain" in shown
    assert "±" in shown


def test_eval_with_what_may_be_lost_a_judge_and_samples(done, tiny, text, tmp_path, capsys):
    base = ["eval", str(done.model), "--teacher", str(tiny), "--data", str(text), "--tokens", "8k"]
    assert main([*base, "--judge", str(tiny)]) == 2
    assert "teacher's own weights" in capsys.readouterr().err
    assert main([*base, "--allow-loss", "dramma"]) == 2
    error = capsys.readouterr().err
    assert "did you mean 'drama'" in error and "fiction" in error and error.count("\n") == 1
    judge = tmp_path / "judge"
    shutil.copytree(done.model, judge)
    state = load_file(judge / "model.safetensors")
    save_file({k: v + 0.01 for k, v in state.items()}, judge / "model.safetensors", {"format": "pt"})
    more = ["--allow-loss", "drama", "--samples", "2", "--judge", str(judge), "--out", str(tmp_path / "eval")]
    assert main([*base, *more]) == 0
    shown = capsys.readouterr().out
    assert "drama alone: may be lost" in shown and "by judge" in shown
    found = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert found["samples"]["scores"]["student"]["judge"] > 0 and len(found["samples"]["rows"]) == 2
    assert (tmp_path / "eval" / "samples.csv").is_file()


def test_export_again(done, tmp_path, capsys):
    assert main(["export", str(done.out), "--out", str(tmp_path / "again"), "--dtype", "bfloat16"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").dtype == torch.bfloat16


def test_a_quantised_export_is_a_row_of_the_report(tiny, tmp_path):
    pytest.importorskip("compressed_tensors")
    config = quick(tmp_path).rename(tmp_path / "int8.toml")
    config.write_text(config.read_text().replace('dtype = "float32"', 'quantize = "int8"'))
    result = m2d.convert(
        str(tiny), to="3.2m", out=tmp_path / "out", config=config, tokens=0, init="select", control=False
    )
    rows = json.loads((result.out / "report.json").read_text())["rows"]
    assert rows["student, int8"]["kl"]["value"] == pytest.approx(rows["student"]["kl"]["value"], rel=0.05)
    assert "int8" in (result.out / "report.html").read_text()
    assert "student, int8" in (result.model / "README.md").read_text()


def test_targets_then_distill_without_the_teacher(done, tiny, text, tmp_path, capsys):
    store = tmp_path / "targets"
    assert (
        main(["targets", str(tiny), "--data", str(text), "--out", str(store), "--tokens", "4k", "--format", "sampled"])
        == 0
    )
    arguments = [
        "distill",
        str(done.model),
        "--data",
        str(text),
        "--targets",
        str(store),
        "--out",
        str(tmp_path / "more"),
        "--tokens",
        "4k",
    ]
    assert main(arguments) == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "more" / "model")


def test_a_finished_run_is_not_overwritten(done, tiny, capsys):
    config = str(done.out.parent / "quick.toml")
    assert main(["convert", str(tiny), "--to", "3.2m", "--out", str(done.out), "--config", config]) == 2
    assert "--resume, or choose another --out" in capsys.readouterr().err
    assert main(["convert", str(tiny), "--to", "3.2m", "--out", str(done.out), "--config", config, "--resume"]) == 0
    assert (
        main(
            ["convert", str(tiny), "--to", "3.2m", "--out", str(done.out), "--config", config, "--resume", "--lr", "9"]
        )
        == 2
    )
    assert "settings differ" in capsys.readouterr().err
    assert main(["convert", "--out", str(done.out), "--resume"]) == 0  # its folder says the rest
    assert "report.html" in capsys.readouterr().out
    again = ["convert", "--config", str(done.out / "moe2dense.toml"), "--out", str(done.out.parent / "again")]
    assert main([*again, "--dry-run"]) == 0 and "tiny-mixtral" in capsys.readouterr().out


def test_build_only(tiny, tmp_path):
    result = m2d.convert(
        str(tiny), to="40%", out=tmp_path / "out", config=quick(tmp_path), tokens=0, init="select", control=False
    )
    assert AutoModelForCausalLM.from_pretrained(result.model).num_parameters() == 2_606_784


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda d: None, ["--data", "nowhere.jsonl"], "does not exist"),
        (lambda d: (d / "t.jsonl").write_text(""), ["--data", "t.jsonl"], "t.jsonl"),
        (lambda d: (d / "t.jsonl").write_text('{"words": "a"}\n'), ["--data", "t.jsonl"], "text"),
        (lambda d: (d / "t.txt").write_text("too short"), ["--data", "t.txt"], "block"),
    ],
)
def test_bad_data_is_one_sentence_and_leaves_nothing_whole(
    tiny, tmp_path, monkeypatch, capsys, make, arguments, message
):
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    assert main(["convert", str(tiny), "--to", "3.2m", "--out", "out", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize(("file", "message"), [("tokenizer.json", "tokenizer"), ("model.safetensors", "safetensors")])
def test_missing_files_of_the_teacher(tiny, text, tmp_path, capsys, file, message):
    copy = tmp_path / "teacher"
    copy.mkdir()
    for path in tiny.iterdir():
        left_out = (file, "moe2dense.toml", "tokenizer_config.json" if file == "tokenizer.json" else "")
        if path.name not in left_out:
            (copy / path.name).write_bytes(path.read_bytes())
    assert main(["convert", str(copy), "--to", "3.2m", "--data", str(text), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def start(tiny, folder, *more):
    command = [sys.executable, "-m", "moe2dense", "convert", str(tiny), "--to", "3.2m", "--out", str(folder / "out")]
    command += ["--config", str(folder / "quick.toml"), "--no-control", *more]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def finish(process) -> None:
    _, error = process.communicate()
    assert process.returncode == 0, error


def kill_when(process, ready) -> bool:
    """Send SIGKILL once `ready()`; False when the process ended first."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return False
        if ready():
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.01)
    raise AssertionError("nothing to kill")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "out" / "model" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["build", "training"])
def test_killed_and_resumed_gives_the_same_weights(tiny, tmp_path, stage):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        quick(folder)
    finish(start(tiny, whole))
    signs = {
        "build": lambda: len(list((killed / "out" / "build").glob("*.safetensors"))) >= 2,
        "training": lambda: len(list((killed / "out" / "checkpoints").glob("*"))) >= 1,
    }
    assert kill_when(start(tiny, killed), signs[stage]), "the run ended before it could be killed"
    assert not (killed / "out" / "model").exists()
    finish(start(tiny, killed, "--resume"))
    expected, found = weights(whole), weights(killed)
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name


def test_targets_that_have_no_room_are_refused_before_the_build(tiny, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(m2d.UserError, match="--targets-disk 5 kB holds less than one step's targets"):
        m2d.convert(str(tiny), to="3.2m", out=out, config=quick(tmp_path), targets_disk="5kB")
    assert not out.exists()
