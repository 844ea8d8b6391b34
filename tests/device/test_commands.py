"""Every command that computes, typed as at a terminal, on a pretended GPU."""

import json
import shutil

import pytest

from moe2dense.cli.app import app
from tests.device.pretend import PretendedCuda
from tests.device.runs import TEXT, convert, make_teacher

QUICK = """
[build]
local_steps = 1
heal_epochs = 0.5
[evaluate]
samples = 0
[data]
eval_blocks = 1
"""
ON_IT = ("--device", "cuda", "--gpu-memory", "200MB")


def run_command(*words):
    """Run a command on a pretended GPU; return what was counted."""
    with PretendedCuda() as counts:
        app([str(word) for word in words], result_action="return_value", exit_on_error=False)
    return counts


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_teacher("mixtral", tmp_path_factory.mktemp("teacher") / "teacher")


@pytest.fixture(scope="module")
def run(teacher, tmp_path_factory):
    """The folder of a conversion that ran there."""
    result, _ = convert(teacher, tmp_path_factory.mktemp("run"), "gpu", more=QUICK, tokens="2k", init="select")
    return result.model.parent


def test_inspect_routes_there(teacher, capsys, mostly_there):
    mostly_there(run_command("inspect", teacher, "--data", TEXT, "--tokens", "1k", "--block", "128", "--json"))
    shown = json.loads(capsys.readouterr().out)
    assert shown["routing"]


def test_plan_is_for_it_and_computes_nothing(teacher, capsys):
    counts = run_command("plan", teacher, "--to", "95%", "--machine", "1xh100", "--json", "--data", TEXT)
    assert json.loads(capsys.readouterr().out)["placement"]["device"] == "cuda" and counts.on("cuda") == 0


@pytest.mark.parametrize("more", [("--out", "OUT"), ("--analyze",)], ids=["stored", "analyze"])
def test_targets_are_answered_there(more, teacher, tmp_path, mostly_there):
    more = [tmp_path / "store" if word == "OUT" else word for word in more]
    mostly_there(run_command("targets", teacher, "--data", TEXT, "--tokens", "1k", "--block", "128", *more, *ON_IT))


def test_text_is_written_there(teacher, tmp_path, mostly_there):
    (tmp_path / "few.toml").write_text("[write]\nshard = 8\nmin_tokens = 1\n")
    options = (
        "--tokens",
        "100",
        "--prompt-tokens",
        "8",
        "--new-tokens",
        "4",
        "--block",
        "32",
        "--config",
        tmp_path / "few.toml",
    )
    mostly_there(run_command("generate", teacher, "--data", TEXT, "--out", tmp_path / "written", *options, *ON_IT))
    assert any((tmp_path / "written").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("source", ["teacher", "targets"])
def test_distill_trains_there(source, run, teacher, tmp_path, mostly_there):
    text = ("--data", TEXT, "--tokens", "4k", "--block", "128")
    given = ("--teacher", teacher)
    if source == "targets":
        run_command("targets", teacher, *text, "--out", tmp_path / "store", *ON_IT)
        given = ("--targets", tmp_path / "store")
    mostly_there(run_command("distill", run, "--out", tmp_path / "more", *text, *given, "--epochs", 1, "--lr", 1e-3))
    assert (tmp_path / "more" / "model" / "config.json").is_file()


@pytest.mark.slow
def test_eval_scores_there(run, teacher, tmp_path, mostly_there):
    text = ("--data", TEXT, "--tokens", "1k", "--block", "128", "--samples", 1)
    mostly_there(run_command("eval", run, "--teacher", teacher, *text, "--out", tmp_path / "eval", *ON_IT))
    assert (tmp_path / "eval" / "eval.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--format", "gguf")], ids=str)
def test_export_beside_it(more, run, tmp_path):
    run_command("export", run, "--out", tmp_path / "model", *more)
    assert any((tmp_path / "model").iterdir())


@pytest.mark.slow
def test_export_calibrates_there(run, tmp_path, mostly_there):
    more = ("--quantize", "int8", "--data", TEXT)
    mostly_there(run_command("export", run, "--out", tmp_path / "model", *more))
    assert any((tmp_path / "model").iterdir())


@pytest.mark.slow
def test_report_beside_it(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink()
    run_command("report", tmp_path / "run")
    assert (tmp_path / "run" / "report.html").is_file()
