"""A folder appears whole or not at all."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from moe2dense.common.files import atomic_write, whole_file, whole_folder
from moe2dense.errors import UserError
from moe2dense.exporting.api import export
from tests.exporting.conftest import tiny


def test_success_leaves_only_the_folder(tmp_path):
    with whole_folder(tmp_path / "a" / "m") as partial:
        (partial / "x").write_text("1")
        assert not (tmp_path / "a" / "m").exists()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["m"]
    assert (tmp_path / "a/m/x").read_text() == "1"


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt()])
def test_an_error_or_an_interrupt_leaves_nothing(error, tmp_path):
    with pytest.raises(type(error)), whole_folder(tmp_path / "m") as partial:
        (partial / "config.json").write_text("{}")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_and_replaced_only_when_asked(tmp_path):
    out = tmp_path / "m"
    out.mkdir()
    (out / "old").write_text("precious")
    with pytest.raises(UserError, match="already exists; choose another --out"), whole_folder(out):
        pass
    with pytest.raises(RuntimeError), whole_folder(out, overwrite=True) as partial:
        (partial / "new").write_text("1")
        raise RuntimeError
    assert (out / "old").read_text() == "precious"
    with whole_folder(out, overwrite=True) as partial:
        (partial / "new").write_text("1")
    assert [p.name for p in out.iterdir()] == ["new"] and [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    ("number", "text"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "read-only"), (errno.EDQUOT, "quota")]
)
def test_errors_of_the_place_are_one_sentence(number, text, tmp_path):
    with pytest.raises(UserError, match=f"out: .*m cannot be written: .*{text}"), whole_folder(tmp_path / "m"):
        raise OSError(number, os.strerror(number))
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_of_the_folder(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(UserError, match="a part of the path is a file"):
        export(tiny("mistral"), tmp_path / "f" / "m")


LIMITED = """
import resource, signal, sys
sys.path.insert(0, {tests!r})
from tests.exporting.conftest import tiny
from moe2dense.errors import UserError
from moe2dense.exporting import export
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = tiny("mistral")
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    export(model, sys.argv[1])
except UserError as error:
    print(error)
"""


def run(code, *arguments, **options):
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    code = code.format(tests=root)
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True, cwd=root, **options
    )


def test_a_real_write_that_fails_half_way(tmp_path):
    out, _ = run(LIMITED, tmp_path / "m").communicate(timeout=60)
    assert "cannot be written: a file would be larger than this place allows" in out
    assert list(tmp_path.iterdir()) == []


def test_a_real_full_disk(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs privileges")
    try:
        with pytest.raises(UserError, match="cannot be written: the disk is full"):
            export(tiny("mistral", vocab_size=900), tmp_path / "m")
        assert list(tmp_path.iterdir()) == []
        subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
        with pytest.raises(UserError, match="cannot be written: the file system is read-only"):
            export(tiny("mistral"), tmp_path / "m")
    finally:
        subprocess.run(["umount", tmp_path], check=True)


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from tests.exporting.conftest import tiny
from moe2dense.exporting import api as checkpoint, export
slow = checkpoint.hf.check_model
def check(*a, **k):
    print("written", flush=True)
    time.sleep(60)
checkpoint.hf.check_model = check
export(tiny("mistral"), sys.argv[1])
"""


def test_a_killed_export_leaves_nothing_that_looks_whole_and_the_next_one_cleans_up(tmp_path):
    process = run(KILLED, tmp_path / "m")
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    left = [p.name for p in tmp_path.iterdir()]
    assert len(left) == 1 and left[0].startswith(".m.partial-")
    time.sleep(0.1)
    export(tiny("mistral"), tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "f.json"
    with pytest.raises(KeyboardInterrupt), whole_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert list(path.parent.iterdir()) == []
    atomic_write(path, "old")
    with pytest.raises(UserError, match="f.json cannot be written: the disk is full"), whole_file(path) as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["f.json"]
    atomic_write(path, b"new")
    assert path.read_text() == "new"
