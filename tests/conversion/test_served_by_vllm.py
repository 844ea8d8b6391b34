"""`convert --for vllm` and `eval --stack vllm` with a real vLLM: its command is named by MOE2DENSE_VLLM, of an environment of its own."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

import moe2dense as m2d
from moe2dense.__main__ import main
from tests.evaluation.choice_task import CHOICE

VLLM = os.environ.get("MOE2DENSE_VLLM", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not VLLM, reason="MOE2DENSE_VLLM names no vLLM"),
]
QUICK = """
control = false
[data]
eval_blocks = 8
[build]
min_tokens = 2048
local_steps = 8
heal_epochs = 1.0
[train]
tokens = 4096
eval_every = 1000
[evaluate]
samples = 0
skills = 0
"""
WORDS = ["sea", "man", "ship", "night", "house", "king"]


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    """A folder for PATH with vLLM in it; nothing of our own environment reaches it."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "vllm").write_text(f'#!/bin/sh\nunset PYTHONPATH\nexec {VLLM} "$@" --enforce-eager --dtype float32\n')
    (folder / "vllm").chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_NO_USAGE_STATS", "1")
        patch.setenv("TORCH_COMPILE_DISABLE", "1")
        yield folder


@pytest.fixture(scope="module")
def run(vllm, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert")
    (folder / "quick.toml").write_text(QUICK)
    return m2d.convert(str(tiny), to="3.2m", config=folder / "quick.toml", out=folder / "out", stack="vllm")


def test_the_export_is_tried_and_what_was_seen_is_said(run):
    check = json.loads((run.out / "report.json").read_text())["student"]["stack"]
    assert check["stack"] == "vllm" and not check["failure"] and not check["untried"] and check["version"]
    assert check["kl"] < 1e-3 and check["positions"] - 2 <= check["equal"] <= check["positions"] == 96
    assert f"Seen in vllm {check['version']}: KL" in (run.model / "README.md").read_text()


@pytest.fixture
def tasks(tmp_path) -> list[str]:
    sums = [{"question": f"What is {i} and {i}?", "answer": f"#### {2 * i}"} for i in range(10)]
    program = {
        "prompt": "def one():\n    return 1\n",
        "entry_point": "one",
        "test": "def check(f):\n    assert f() == 1",
    }
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(r) + "\n" for r in sums))
    (tmp_path / "programs.jsonl").write_text(json.dumps(program) + "\n")
    names = [str(tmp_path / "sums.jsonl"), str(tmp_path / "programs.jsonl")]
    if importlib.util.find_spec("lm_eval") is not None:
        rows = [
            {"question": f"The {a} saw the", "choices": [f" {b}" for b in WORDS], "label": i % 6}
            for i, a in enumerate(WORDS * 2)
        ]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (tmp_path / "choice.yaml").write_text(CHOICE.format(data=tmp_path / "rows.jsonl"))
        names.append(str(tmp_path / "choice.yaml"))
    return names


def test_tasks_answered_by_vllm_and_here_have_the_same_scores(run, tiny, text, tasks, tmp_path):
    scores = {}
    for where, flags in {"here": [], "vllm": ["--stack", "vllm"]}.items():
        out = tmp_path / where
        arguments = [
            "eval",
            str(run.out),
            "--teacher",
            str(tiny),
            "--data",
            str(text),
            "--tokens",
            "2k",
            "--tasks",
            ",".join(tasks),
        ]
        assert main([*arguments, "--limit", "4", "--out", str(out), *flags]) == 0
        scores[where] = json.loads((Path(out) / "eval.json").read_text())["tasks"]
    assert scores["here"].keys() == scores["vllm"].keys() >= {"sums", "programs"}
    for task, metrics in scores["here"].items():
        for metric, models in metrics.items():
            assert models.keys() == {"teacher", str(run.out)}
            assert scores["vllm"][task][metric] == pytest.approx(models), (task, metric)
