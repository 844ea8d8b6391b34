"""A wheel built from this checkout works outside it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: object, codes: tuple[int, ...] = (0,), **options) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert done.returncode in codes, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_an_installed_wheel_lists_teachers_and_converts(tmp_path, tiny, text):
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("moe2dense-*.whl")
    # the other packages come from this environment; moe2dense comes from the wheel, as the first of the path shows
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(site)}
    options = {"cwd": tmp_path, "env": environment}
    where = run(sys.executable, "-c", "import moe2dense; print(moe2dense.__file__)", **options)
    assert where.startswith(str(site))
    assert "mixtral" in run(sys.executable, "-m", "moe2dense", "list", "teachers", **options)
    command = ["convert", tiny, "--to", "3.2m", "--tokens", "20k", "--data", text, "--out", tmp_path / "out"]
    # 3: so little text may gain nothing beyond the build, whose student is then the one that is exported
    run(sys.executable, "-m", "moe2dense", *command, codes=(0, 3), **options)
    assert (tmp_path / "out" / "model" / "config.json").is_file() and (tmp_path / "out" / "report.html").is_file()
