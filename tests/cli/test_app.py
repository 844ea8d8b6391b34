"""The command line as users meet it: help without torch, frozen flags, one sentence and exit code 2 for bad input."""

import inspect
import json
import os
import subprocess
import sys
from importlib import import_module

import pytest

from moe2dense.__main__ import main
from moe2dense.cli.app import COMMANDS

FLAGS = {
    "convert": "attention allow-loss alpha baseline block chat-template config control data device dry-run dtype endpoint endpoint-k endpoint-model epochs experts gpu-memory init judge lora loss lr memory mirror ood out"
    " quantize report-to resume seed stack stages targets-disk teacher-card temperature to tokens valid",
    "plan": "attention block chat-template config control data device disk-speed epochs experts gpu-memory init json lora loss machine memory ood out speed stages targets-disk teacher-card to tokens valid",
    "list": "all json",
    "inspect": "block chat-template data gpu-memory json memory teacher-card tokens",
    "targets": "attention analyze block chat-template data device draws endpoint endpoint-kind endpoint-model endpoint-parallel endpoint-rate experts features format gpu-memory json k memory out seed teacher-card temperature"
    " token-weights tokens",
    "distill": "attention alpha block chat-template completions config cross-tokenizer data device endpoint endpoint-k endpoint-model epochs gpu-memory lora loss lr memory mirror out report-to resume seed targets targets-disk teacher"
    " teacher-card temperature tokens valid",
    "generate": "beams block config data device duplicates experts gpu-memory learn-prompt memory min-tokens new-tokens nll out prompt-tokens"
    " same-script seed teacher-card temperature tokens top-p",
    "eval": "attention allow-loss baseline block chat-template data device endpoint endpoint-model gpu-memory json judge limit memory out samples seed split stack tasks teacher teacher-card tokens",
    "report": "json",
    "export": "data device dtype format k max-kl out overwrite public push-to-hub quantize seed shard-size stack tokenizer tokens yes",
    "serve": "dry-run port stack",
    "chat": "device gpu-memory memory seed teacher teacher-card temperature tokens top-p",
    "doctor": "json",
}


def function(where):
    module, name = where.split(":")
    return getattr(import_module(module), name)


@pytest.mark.parametrize(("command", "where"), [(c, w) for c, w, _ in COMMANDS])
def test_flags_are_frozen(command, where):
    parameters = inspect.signature(function(where)).parameters.values()
    flags = {p.name.replace("_", "-") for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert flags == set(FLAGS[command].split())


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["list"], *([c, "--help"] for c, *_ in COMMANDS if c != "report")],
    ids=" ".join,
)
def test_help_does_not_load_torch(arguments):
    code = f"import sys; from moe2dense.__main__ import main; main({arguments!r}); assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"COLUMNS": "120"}
    )
    assert done.returncode == 0, done.stderr
    assert "moe2dense" in done.stdout or "0.1.0" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "mixtrall", "--to", "7b"], "no known name (did you mean 'mixtral'"),
        (["plan", "mixtral"], "--to is missing"),
        (["plan", "mixtral", "--to", "90b"], "not smaller than the teacher"),
        (["plan", "mixtral", "--to", "7b", "--config", "nowhere.toml"], "--config nowhere.toml cannot be read"),
        (["plan", "mixtral", "--to", "7b", "--memory", "lots"], "--memory must be a number such as 300MB"),
        (
            ["plan", "mixtral", "--to", "7b", "--memory", "2"],
            "--memory must be at least 16 MB; found '2' (did you mean 2GB?)",
        ),
        (["plan", "mixtral", "--to", "7b", "--memory", "3MB"], "--memory must be at least 16 MB; found '3MB'"),
        (
            ["plan", "mixtral", "--to", "7g"],
            "a share of the teacher such as 25%, a named target (mistral-7b) or the folder",
        ),
        (["plan", "mixtral", "--to", "7b", "--loss", "forward_kll"], "(did you mean 'forward_kl'?)"),
        (["plan", "mixtral", "--to", "7b", "--init", "walk"], "--init 'walk' was renamed; did you mean 'layerwise'?"),
        (["plan", "mixtral", "--to", "7b", "--device", "tpu"], "--device must be auto, cpu or cuda; found 'tpu'"),
        (["convert", "--to", "7b"], "TEACHER is missing"),
        (["convert", "--resume"], "TEACHER is missing"),
        (["convert", "--resume", "--out", "nowhere"], "nowhere holds no run"),
        (["plan", "mixtral", "--to", "7b", "--tokens", "many"], "--tokens must be a number"),
        (["plan", "mixtral", "--to", "7b", "--nonsense", "3"], "nonsense"),
        (["convert", "examples/tiny-mixtral", "--to", "3.2m", "--init", "magic"], "starts with no known method"),
        (["convert", "examples/tiny-mixtral", "--to", "3.2m", "--temperature", "0"], "--temperature must be above 0"),
        (["convert", "examples/tiny-mixtral", "--to", "3.2m", "--alpha", "2"], "--alpha must be between 0 and 1"),
        (
            ["convert", "examples/tiny-mixtral", "--to", "3.2m", "--block", "512"],
            "--block 512 is more than the teacher's 256",
        ),
        (
            ["distill", "examples/tiny-mixtral", "--data", "examples/text", "--out", "nowhere"],
            "either --teacher, or --targets",
        ),
        (["inspect", "nowhere"], "no folder, no hub id"),
        (["report", "nowhere"], "holds no report.json"),
        (["unknown"], "unknown"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, message, capsys, root, monkeypatch):
    monkeypatch.chdir(root)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1, error
    assert "Traceback" not in error


def test_unknown_toml_key(tmp_path, capsys):
    (tmp_path / "c.toml").write_text("[train]\nlearnrate = 1\n")
    assert main(["plan", "mixtral", "--to", "7b", "--config", str(tmp_path / "c.toml")]) == 2
    assert "unknown key 'train.learnrate'" in capsys.readouterr().err


def test_plan_mixtral_to_7b(capsys):
    assert main(["plan", "mixtral", "--to", "7b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["student"]["parameters"] == 7_241_732_096
    assert found["shape"]["parameters"] == 46_702_792_704
    assert found["student"]["host"] == "mistral"


def test_dry_run_writes_nothing(tmp_path, tiny, capsys):
    out = tmp_path / "out"
    assert main(["convert", str(tiny), "--to", "3.2m", "--out", str(out), "--dry-run"]) == 0
    assert not out.exists()
    assert "width 512 (2 experts)" in capsys.readouterr().out


def test_list_and_doctor(capsys):
    assert main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"mixtral"} <= {t["family"] for t in found["teachers"]}
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"]
    assert set(found["experts"]) == {"streamed", "grouped_mm", "megablocks"}


def test_doctor_shows_remedies_whole(capsys):
    assert main(["doctor"]) == 0
    shown = "".join(capsys.readouterr().out.split())
    assert "moe2dense[" in shown or "notinstalled" not in shown


def test_module_entry_point(root):
    done = subprocess.run([sys.executable, "-m", "moe2dense", "--version"], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "0.1.0"


def test_ctrl_c_says_how_to_resume(monkeypatch, capsys, tiny, tmp_path):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("moe2dense.conversion.pipeline.run_conversion", stopped)
    arguments = ["convert", str(tiny), "--to", "3.2m", "--out", str(tmp_path / "out")]
    assert main(arguments) == 130
    assert f"continue with: moe2dense {' '.join(arguments)} --resume" in capsys.readouterr().err


def test_inspect_shows_shape_and_routing(tiny, text, capsys):
    assert main(["inspect", str(tiny), "--data", str(text), "--tokens", "1k"]) == 0
    shown = capsys.readouterr().out
    assert "8 of width 256, top-2" in shown
    assert "in effective use" in " ".join(shown.split())
    assert main(["inspect", str(tiny), "--data", str(text), "--tokens", "1k", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["routing"]["layers"]) == found["shape"]["num_hidden_layers"] == 4


def test_inspect_marks_dense_layers(capsys):
    from rich.console import Console

    from moe2dense.cli.actions.inspect import print_routing

    sparse = {"layer": 1, "sparse": True, "effective_experts": 2.0, "gini": 0.0, "dead": [], "load": [1.0, 1.0]}
    routing = {"tokens": 9, "layers": [{"layer": 0, "sparse": False}, sparse], "prediction": "even"}
    print_routing(routing, Console(width=100))
    assert "dense" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.jsonl"], "data 'nowhere.jsonl' does not exist"),
        (["--data", "words.jsonl"], "data 'words.jsonl' (train) has no text"),
        (["--ood", "nowhere.jsonl"], "--ood: data 'nowhere.jsonl' does not exist"),
        (["--data", "small.txt"], "pass --valid with text of its own to hold out"),
        (["--device", "cuda"], "no CUDA device"),
        (["--out", "full"], "continue it with --resume, or choose another --out"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_data_out_and_device_are_checked_before_the_plan(tiny, tmp_path, monkeypatch, capsys, arguments, message, more):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "words.jsonl").write_text('{"words": "a"}\n')
    (tmp_path / "small.txt").write_text("\n\n".join(f"A line of text, number {i}." for i in range(60)))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    out = [] if "--out" in arguments else ["--out", "out"]
    assert main(["convert", str(tiny), "--to", "3.2m", *out, *arguments, *more]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1
    assert shown.out == "" and sorted(tmp_path.rglob("*")) == before  # no plan, no folder


def plan_text(capsys, *arguments):
    assert main(["plan", *arguments, "--speed", "100t", "--disk-speed", "2GB"]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_a_plan_says_for_which_machine_and_what_its_words_mean(capsys, tiny):
    text = plan_text(capsys, "mixtral", "--to", "7b")
    assert "Times are for the machine of --speed" in text and "2 GB/s from disk (assumed)" in text
    assert "start: moe2dense convert mixtral --to 7b" in text
    assert "--memory limits what of the teacher is held at once, not the student's training" in text
    assert all(f" {word} " in text for word in ("build", "targets", "distill", "evaluate", "read", "host"))
    assert "0.00017% of the teacher's training compute" in text and "e-0" not in text
    assert "(--tokens 14.4b or more)" in text
    own = plan_text(capsys, str(tiny), "--to", "3.2m")
    assert "ood.jsonl (named by the teacher's folder)" in own


def test_a_plan_warns_of_what_is_asked_for(capsys):
    adapters = plan_text(capsys, "mixtral", "--to", "7b", "--lora", "64", "--memory", "8GB")
    assert "--lora 64 trains adapters instead" not in adapters
    build = plan_text(capsys, "mixtral", "--to", "7b", "--tokens", "0")
    assert (
        "nothing is trained after it" in build
        and "training all weights" not in build
        and "93.4 GB a token" not in build
    )
    small = plan_text(capsys, "deepseek-v3", "--to", "7b")
    assert "too small to be sensible" in small and "-0." not in small and " 0% of the expert" not in small


def test_inspect_of_an_unfinished_run(tmp_path, capsys):
    (tmp_path / "moe2dense.toml").write_text("")
    assert main(["inspect", str(tmp_path)]) == 2
    assert f"{tmp_path} is an unfinished run" in capsys.readouterr().err
