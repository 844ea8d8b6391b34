"""The check of a machine's GPU runs, at a small size, on the pretended one."""

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.device.pretend import PretendedCuda

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"


@pytest.fixture
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_row_is_measured(gpu_check, tmp_path, monkeypatch, mostly_there):
    monkeypatch.setattr(gpu_check, "BLOCKS", 4)
    monkeypatch.setattr(gpu_check, "BLOCK", 64)
    monkeypatch.setattr(gpu_check, "VOCABULARY", 512)
    with PretendedCuda() as counts:
        rows = gpu_check.check(tmp_path, 0.01, torch.device("cuda", 0))
    names = [row[0] for row in rows]
    assert names[:2] == ["teacher, streamed", "teacher, grouped_mm"] and names[-1] == "build, whole"
    assert sum(name.startswith("build, layer") for name in names) == gpu_check.LAYERS
    mostly_there(counts)
