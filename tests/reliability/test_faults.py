"""benchmarks/faults.py in small: damaged inputs, and conversions that are killed, starved of disk and started twice."""

import os
import random
import subprocess
import sys

import pytest


def faults(root, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(root / "benchmarks/faults.py"), *arguments], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def mutations(monkeypatch, root):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    import fault_inputs

    return fault_inputs


def test_mutations_change_a_file_and_repeat(mutations, tmp_path):
    """The same seed damages a file in the same way, and hardly ever not at all."""
    texts = {
        "a.json": b'{"a": [1, {"b": "c"}], "d": null}',
        "a.toml": b'[x]\na = 1\nb = "c"\n',
        "a.jsonl": b'{"text": "a"}\n' * 40,
        "a.txt": b"some text",
    }
    for name, text in texts.items():
        results = []
        for seed in range(16):
            both = []
            for _ in range(2):
                path = tmp_path / name
                path.write_bytes(text)
                mutations.damage(path, random.Random(seed))
                both.append(path.read_bytes() if path.is_file() else None)
                path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
            assert both[0] == both[1]
            results.append(both[0])
        assert sum(r != text for r in results) > 9, name


@pytest.mark.slow
def test_damaged_inputs_end_in_success_or_one_sentence(root):
    assert "| all | 63 |" in faults(root, "fuzz", "--count", "63", "--seed", "1")


@pytest.mark.slow
def test_killed_conversions_resume_to_the_same_weights(root):
    assert "| all | 6 | 6 | 0 | 0 |" in faults(root, "kills", "--count", "6", "--seed", "2")


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small tmpfs")
def test_a_full_disk_a_read_only_folder_a_cut_shard_and_two_runs(root):
    assert "| NO |" not in faults(root, "places", "--shares", "0.3", "0.7")
