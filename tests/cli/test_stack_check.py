"""`export --for`: the export is tried in the stack that is installed, and what is wrong there is said."""

import io

import pytest
import torch
from rich.console import Console

from moe2dense.cli.actions import stack_check
from moe2dense.errors import UserError
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


def tried(model, tmp_path, stack=VLLM):
    out = io.StringIO()
    stack_check.check_in_stack(model, tmp_path, stack, (), Console(file=out, width=200))
    return out.getvalue()


def test_a_stack_that_computes_the_same_is_seen(program, model, tokenizer, tmp_path, monkeypatch):
    program("exec sleep 60")
    with TeacherServer(model, tokenizer) as server:
        monkeypatch.setattr(stack_check, "free_port", lambda: server.server.server_port)
        assert "seen in vllm 0.32.0: KL" in tried(model, tmp_path)


def test_a_stack_that_computes_something_else_is_refused(program, model, tokenizer, tmp_path, monkeypatch):
    program("exec sleep 60")
    other = tiny("mistral", seed=5, vocab_size=97)
    with torch.no_grad():
        other.lm_head.weight.mul_(5)
    with TeacherServer(other, tokenizer) as server:
        monkeypatch.setattr(stack_check, "free_port", lambda: server.server.server_port)
        with pytest.raises(UserError, match="computes something else .KL"):
            tried(model, tmp_path)


def test_a_stack_that_does_not_start_says_why(program, model, tmp_path):
    program("echo no such layer; exit 1")
    with pytest.raises(UserError, match="does not start on the export .no such layer."):
        tried(model, tmp_path)


def test_what_is_not_installed_is_not_tried(model, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "nowhere" / "python"))
    assert "not tried in vllm: it is not installed; pip install" in tried(model, tmp_path)
    assert "not tried in mlx: it gives no log-probabilities" in tried(model, tmp_path, STACKS["mlx"])
