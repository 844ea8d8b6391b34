"""Programs that a model wrote: what passes, what does not, and what they cannot do."""

import socket

import pytest

from moe2dense.evaluation import sandbox
from moe2dense.evaluation.sandbox import Limits, run_program

QUICK = Limits(seconds=1, memory="300MB")


def test_a_program_passes_if_it_comes_to_its_end():
    assert run_program("import math, json, re, collections\nprint('x' * 10)\nassert math.gcd(6, 4) == 2").passed
    failed = run_program("assert 1 + 1 == 3, 'no'")
    assert not failed.passed and failed.reason == "AssertionError: no"
    assert "SyntaxError" in run_program("def f(:").reason


@pytest.mark.parametrize("program", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"])
def test_ending_early_is_no_pass(program):
    assert not run_program(program + "\nassert False").passed


def test_time_and_memory_are_limited():
    assert "CPU" in run_program("while True: pass", QUICK).reason
    assert "MemoryError" in run_program("x = bytearray(10**9)", QUICK).reason


def test_a_program_that_sleeps_is_killed(monkeypatch):
    monkeypatch.setattr(sandbox, "_GRACE", 0.0)
    assert "not done within 1 s" in run_program("import time; time.sleep(30)", QUICK).reason


@pytest.mark.parametrize(
    "program",
    [
        "open('{path}', 'w').write('x')",
        "import os; os.open('{path}', os.O_CREAT | os.O_WRONLY)",
        "import pathlib; pathlib.Path('{path}').write_text('x')",
        "import os; os.remove('{old}')",
        "import os; os.rename('{old}', '{path}')",
        "import shutil; shutil.rmtree('{folder}')",
        "import os; os.system('touch {path}')",
        "import subprocess; subprocess.run(['touch', '{path}'])",
        "import os; os.fork()",
        "import ctypes; ctypes.CDLL(None).unlink(b'{old}')",
        "import os; os.kill(os.getppid(), 9)",
    ],
)
def test_files_and_processes_are_left_alone(program, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("mine")
    outcome = run_program(program.format(path=new, old=old, folder=tmp_path))
    assert not outcome.passed and "PermissionError" in outcome.reason
    assert old.read_text() == "mine" and not new.exists()


def test_there_is_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}))"
        assert not run_program(program).passed
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert run_program("import os; assert 'OPENAI_API_KEY' not in os.environ").passed
