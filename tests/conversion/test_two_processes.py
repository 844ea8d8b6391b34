"""A conversion started by torchrun: two and four processes make the student of one, also when one of them is killed on the way.

In float64 (in_double.py): in float32 Adam and ill-conditioned solutions turn the last digit of a sum into the fourth of a weight, so that
a mistake of that size would not be seen.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from moe2dense.common.costs import Cost
from moe2dense.common.processes import alone, from_first, launched, world

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

# AdamW, since Muon iterates in bfloat16
SMALL = """
[data]
block = 128
eval_blocks = 8
[build]
min_tokens = 1024
local_steps = 8
layer_steps = 4
heal_epochs = 1.0
gram_tokens = 512
[train]
optimizer = "adamw"
tokens = 4096
batch = 512
save_every = 2
eval_every = 3
[evaluate]
samples = 2
prompt_tokens = 24
sample_tokens = 12
skills = 3
[export]
dtype = "float32"
"""


def command(processes: int, *arguments) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [
        sys.executable,
        *(launcher if processes > 1 else []),
        "-m",
        "tests.conversion.in_double",
        *map(str, arguments),
    ]


def run(processes: int, *arguments) -> str:
    done = subprocess.run(
        command(processes, *arguments),
        capture_output=True,
        text=True,
        timeout=800,
        env=os.environ | ENVIRONMENT,
        cwd=ROOT,
    )
    assert done.returncode in (0, 3), done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def same_weights(one: Path, other: Path) -> None:
    """Tensors differ by 1e-5 of their norm at most."""
    ours, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert (value - theirs[name]).norm() <= 1e-5 * value.norm(), name


def plain(value):
    """Return a report's numbers without what says how long something took."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in ("seconds", "tokens_per_second", "memory")}
    return [plain(v) for v in value] if isinstance(value, list) else value


def same_numbers(ours, others, where: str) -> None:
    """Compare what a report says: words and counts alike, numbers to 1e-5."""
    assert type(ours) is type(others), where
    if isinstance(ours, dict):
        assert ours.keys() == others.keys(), where
        for key, value in ours.items():
            same_numbers(value, others[key], f"{where}.{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(others), where
        for number, (value, other) in enumerate(zip(ours, others, strict=True)):
            same_numbers(value, other, f"{where}[{number}]")
    elif isinstance(ours, float):
        assert ours == pytest.approx(others, rel=1e-5, abs=1e-6, nan_ok=True), where
    else:
        assert ours == others, where


def arguments_of(tiny, out: Path, folder: Path, shard: bool = False) -> list[str]:
    settings = folder / "small.toml"
    settings.write_text(SMALL.replace("[train]", f"[train]\nshard = {str(shard).lower()}"))
    return ["convert", str(tiny), "--to", "3.2m", "--out", str(out), "--config", str(settings)]


@pytest.fixture(scope="module")
def one(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run(1, *arguments_of(tiny, folder / "out", folder))
    return folder / "out"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_convert_as_one(processes, tiny, one, tmp_path):
    shown = run(processes, *arguments_of(tiny, tmp_path / "out", tmp_path))
    assert shown.count("report.html") == 1, "every process says what is done"
    same_weights(tmp_path / "out/build/student", one / "build/student")
    same_weights(tmp_path / "out/model", one / "model")
    reports = [json.loads((folder / "report.json").read_text()) for folder in (tmp_path / "out", one)]
    for row, scores in reports[0]["rows"].items():
        for name in ("kl", "nll", "agreement"):
            assert scores[name]["value"] == pytest.approx(reports[1]["rows"][row][name]["value"], rel=1e-5, abs=1e-6), (
                row
            )
    for section in ("transfer", "samples", "skills", "train_scores", "history", "build"):
        same_numbers(*(plain(report[section]) for report in reports), section)
    records = [json.loads((folder / "run.json").read_text()) for folder in (tmp_path / "out", one)]
    assert set(records[0]["stages"]) == set(records[1]["stages"])
    costs = [{stage: Cost.from_dict(entry) for stage, entry in record["cost"].items()} for record in records]
    assert costs[0].keys() == costs[1].keys()
    for stage, cost in costs[0].items():
        once = sum(costs[1][stage].flops.values())
        again = 0.15 if stage in ("samples", "skills") else 0.01  # every process looks texts up in the head
        assert 0.99 * once <= sum(cost.flops.values()) <= (1.01 + again * (processes - 1)) * once, stage
        assert costs[1][stage].disk <= cost.disk <= processes * costs[1][stage].disk, stage
        if stage != "export":  # the first process's alone
            assert len(cost.memory_of_each) == processes and cost.memory == max(cost.memory_of_each), stage


@pytest.mark.slow
def test_sharded_training_is_exported(tiny, one, tmp_path):
    run(2, *arguments_of(tiny, tmp_path / "out", tmp_path, shard=True), "--no-control")
    same_weights(tmp_path / "out/model", one / "model")


@pytest.mark.slow
def test_a_killed_process_stops_the_others_and_the_run_goes_on(tiny, one, tmp_path):
    out = tmp_path / "out"
    arguments = arguments_of(tiny, out, tmp_path)
    process = subprocess.Popen(command(2, *arguments), env=os.environ | ENVIRONMENT, cwd=ROOT, stderr=subprocess.PIPE)
    clock = time.monotonic()
    while not list(out.glob("checkpoints/step-*")) and process.poll() is None and time.monotonic() - clock < 600:
        time.sleep(0.1)
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
    assert workers, "the second process is at work"
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.send_signal(signal.SIGKILL)
    assert process.wait(120) != 0
    assert not (out / "model").exists()
    run(2, *arguments, "--resume")
    same_weights(out / "model", one / "model")
    shutil.rmtree(out)


def test_alone_a_process_knows_no_others(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launched() == (1, 4) and world() == (0, 1)
    with alone():
        assert launched() == (0, 1)
        assert from_first(lambda: 7) == 7
    assert launched() == (1, 4)
