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

from moe2dense.common.processes import alone, from_first, launched, world
from tests.conversion.test_pipeline import quick

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


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


def arguments_of(tiny, out: Path, folder: Path) -> list[str]:
    settings = quick(folder, "[evaluate]\nsamples = 0\nskills = 0\n")
    settings.write_text(
        settings.read_text().replace("[train]", '[train]\noptimizer = "adamw"')
    )  # Muon iterates in bfloat16
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
    stages = [set(json.loads((folder / "run.json").read_text())["stages"]) for folder in (tmp_path / "out", one)]
    assert stages[0] == stages[1]


@pytest.mark.slow
def test_sharded_training_is_exported(tiny, one, tmp_path):
    arguments = arguments_of(tiny, tmp_path / "out", tmp_path)
    (tmp_path / "quick.toml").write_text(
        (tmp_path / "quick.toml").read_text().replace("[train]", "[train]\nshard = true")
    )
    run(2, *arguments, "--no-control")
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
