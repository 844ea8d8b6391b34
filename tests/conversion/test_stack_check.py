"""`convert --for` and `export --for`: the export is tried in the stack that is installed, and what is wrong there is said."""

import os
import time
from pathlib import Path

import pytest
import torch

from moe2dense.conversion.stack_check import StackCheck, check_in_stack
from moe2dense.errors import UserError
from moe2dense.exporting import running
from moe2dense.exporting.stacks import STACKS
from tests.distillation.targets.fake_server import TeacherServer
from tests.exporting.conftest import tiny

VLLM = STACKS["vllm"]


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A program called vllm that runs a given line."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr("sys.executable", str(tmp_path / "nowhere" / "python"))

    def install(line):
        (folder / "vllm").write_text(f"#!/bin/sh\n{line}\n")
        (folder / "vllm").chmod(0o755)

    return install


@pytest.fixture(scope="module")
def model():
    return tiny("mistral", vocab_size=97)


@pytest.fixture
def served(program, monkeypatch, tokenizer):
    """A program that only sleeps, with a server of a model on the port that it was given."""

    def serve(model):
        program("exec sleep 60")
        server = TeacherServer(model, tokenizer)
        monkeypatch.setattr(running, "free_port", lambda: server.server.server_port)
        return server

    return serve


def test_a_stack_that_computes_the_same_is_seen(served, model, tmp_path):
    with served(model):
        check = check_in_stack(model, tmp_path, VLLM, ())
    assert check.version == "0.32.0" and check.kl < 1e-6 and check.equal == check.positions == 96
    assert "Seen in vllm 0.32.0: KL" in check.sentence() and "at 96 of 96 positions" in check.sentence()
    assert StackCheck(**check.to_dict()) == check


def test_a_stack_that_computes_something_else_fails(served, model, tmp_path):
    other = tiny("mistral", seed=5, vocab_size=97)
    with torch.no_grad():
        other.lm_head.weight.mul_(5)
    with served(other):
        check = check_in_stack(model, tmp_path, VLLM, ())
    assert "computes something else (KL" in check.failure and check.equal < check.positions


def test_a_stack_that_does_not_start_says_why(program, model, tmp_path):
    program("echo no such layer; exit 1")
    assert "vllm does not start (no such layer)" in check_in_stack(model, tmp_path, VLLM, ()).sentence()


def test_a_stack_that_never_answers_is_ended_with_all_its_processes(program, tmp_path):
    program(f"sleep 60 & echo $! > {tmp_path}/child; wait")

    def ready(url):
        raise UserError("not there")

    with pytest.raises(UserError, match="does not start within 1 s"), running.running(VLLM, tmp_path, (), ready, 1.0):
        pass
    child = int((tmp_path / "child").read_text())
    with pytest.raises(ProcessLookupError):
        while True:  # its parent is gone, so whoever is first in this container reaps it
            if Path(f"/proc/{child}/stat").exists() and Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
                raise ProcessLookupError
            os.kill(child, 0)
            time.sleep(0.01)


def test_what_is_not_installed_is_not_tried(model, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "nowhere" / "python"))
    assert "Not tried in vllm: it is not installed here (pip" in check_in_stack(model, tmp_path, VLLM, ()).sentence()
    mlx = check_in_stack(model, tmp_path, STACKS["mlx"], ())
    assert "gives no log-probabilities" in mlx.untried
    assert "read the export back" in check_in_stack(model, tmp_path, STACKS["transformers"], ()).untried
