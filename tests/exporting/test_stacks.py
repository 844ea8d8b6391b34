"""Which stack serves a student, with which flags, and what is said where none does."""

import json
import sys

import pytest

from moe2dense.__main__ import main
from moe2dense.errors import UserError
from moe2dense.exporting.stacks import STACKS, check_stack, host_of, refusal, served_model, stack_for
from moe2dense.families.cards import StudentCard, student_cards


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Pretend that some programs are installed; each writes what it was called with."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere" / "python"))

    def install(name):
        (folder / name).write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\n')
        (folder / name).chmod(0o755)

    return install


def checkpoint(folder, kind="mistral"):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    return folder


def test_the_first_stack_that_is_installed_is_taken(programs, tmp_path):
    model = checkpoint(tmp_path / "m")
    with pytest.raises(UserError, match="nothing that serves .* is installed.*vllm: pip install"):
        stack_for(model)
    programs("transformers")
    assert stack_for(model)[0].name == "transformers"
    programs("vllm")
    assert stack_for(model)[0].name == "vllm"
    assert stack_for(model, "transformers")[0].name == "transformers"
    with pytest.raises(UserError, match="mlx is not installed"):
        stack_for(model, "mlx")[0].start(model, 1)
    with pytest.raises(UserError, match="serves a GGUF file"):
        stack_for(model, "llama.cpp")
    with pytest.raises(UserError, match="must be one of"):
        stack_for(model, "ollama")


def test_a_stack_that_does_not_serve_a_host_is_refused_with_its_reason():
    card = StudentCard(
        "x", "X", model_type="x", loads={"vllm": "no: it lacks a field", "mlx": "seen", "llama_cpp": "no: no name"}
    )
    assert refusal(card, STACKS["vllm"]) == "it lacks a field" and not refusal(card, STACKS["mlx"])
    with pytest.raises(UserError, match="the X host is not served there .it lacks a field.; take mlx or transformers"):
        check_stack(card, STACKS["vllm"])


def test_hosts_are_told_by_their_config(tmp_path):
    for name, card in student_cards().items():
        if not card.host and card.model_type == name:
            assert host_of(checkpoint(tmp_path / name, name)).name == name
    assert host_of(checkpoint(tmp_path / "other", "bloom")).loads == {}


def test_what_is_served_of_a_folder(tmp_path):
    run = tmp_path / "run"
    checkpoint(run / "model")
    assert served_model(run) == run / "model"
    gguf = tmp_path / "gguf"
    gguf.mkdir()
    with pytest.raises(UserError, match="neither config.json nor a GGUF"):
        served_model(gguf)
    (gguf / "a.gguf").write_bytes(b"")
    assert served_model(gguf) == gguf / "a.gguf" == served_model(gguf / "a.gguf")
    (gguf / "b.gguf").write_bytes(b"")
    with pytest.raises(UserError, match="2 GGUF files"):
        served_model(gguf)


def test_serve_runs_the_command_that_it_prints(programs, tmp_path, capfd):
    programs("vllm")
    model = checkpoint(tmp_path / "run" / "model")
    assert not main(["serve", str(tmp_path / "run"), "--dry-run", "--port", "8123"])
    printed = capfd.readouterr().out.split("\n")[0]
    assert printed.endswith(f"vllm serve {model} --port 8123") and not (tmp_path / "called").exists()
    assert not main(["serve", str(tmp_path / "run")])
    assert (tmp_path / "called").read_text().split() == ["serve", str(model), "--port", "8000"]
    assert main(["serve", str(tmp_path / "run"), "--port", "0"]) == 2
