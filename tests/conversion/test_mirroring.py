"""A run goes on from its mirror on a machine that has never seen it, bit by bit, and no fault of the mirror stops it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import moe2dense as m2d
from moe2dense.common.mirror import Mirror, newest_manifest
from moe2dense.common.object_store import ObjectStore
from moe2dense.config.schema import RunConfig
from moe2dense.conversion.mirroring import check_mirror, copying, fetch_run, mirrored
from moe2dense.conversion.run import open_run
from moe2dense.distillation.targets.write import write_targets
from moe2dense.distillation.trainer import Trainer
from moe2dense.errors import UserError
from tests.conversion.test_pipeline import quick
from tests.distillation.targets.test_store import make_blocks, make_teacher

URL = "memory://runs/one"


pytestmark = pytest.mark.usefixtures("memory_store")


def config_of(out, url=URL):
    return RunConfig(model="m", to="7b", out=str(out), mirror=url)


def run_stages(config, *stages, resume=False, console=None):
    with open_run(config.out, config, resume) as run, mirrored(run, config, console or Console(quiet=True)):
        for stage in stages:
            (run.folder / f"{stage}.bin").write_text(stage)
            run.finish(stage)


def stages_there(store):
    manifest = newest_manifest(store)
    return set() if manifest is None else {name for name in manifest.files if name.endswith(".bin")}


def test_a_run_is_copied_after_every_stage(tmp_path):
    config, store = config_of(tmp_path / "out"), ObjectStore(URL, "--mirror")
    check_mirror(URL, Path(config.out), resume=False)
    with open_run(config.out, config) as run, mirrored(run, config, Console(quiet=True)):
        for i, stage in enumerate(("build", "targets")):
            assert len(stages_there(store)) == i
            (run.folder / f"{stage}.bin").write_text(stage)
            run.finish(stage)
            assert len(stages_there(store)) == i + 1
        (run.folder / "last.bin").write_text("after the last stage")
    assert "last.bin" in stages_there(store)
    with pytest.raises(UserError, match=f"--mirror {URL} holds a run; continue it with --resume"):
        check_mirror(URL, tmp_path / "other", resume=False)


def test_a_run_is_fetched_where_it_is_not_or_is_older(tmp_path):
    first, second = config_of(tmp_path / "first"), config_of(tmp_path / "second")
    run_stages(first, "build")
    options = {"out": second.out, "mirror": URL}
    fetch_run(None, options, Console(quiet=True))
    check_mirror(URL, Path(second.out), resume=True)
    run_stages(second, "targets", resume=True)
    assert {p.name for p in (tmp_path / "second").glob("*.bin")} == {"build.bin", "targets.bin"}
    with pytest.raises(UserError, match=r"is newer than .*first"):
        check_mirror(URL, Path(first.out), resume=True)
    fetch_run(None, {"out": first.out}, Console(quiet=True))  # older: the mirror of its own settings is fetched
    assert set(json.loads((tmp_path / "first" / "run.json").read_text())["stages"]) == {"build", "targets"}
    (tmp_path / "first" / "more.bin").write_text("not yet copied")
    fetch_run(None, {"out": first.out}, Console(quiet=True))
    assert (tmp_path / "first" / "more.bin").is_file()


def test_a_mirror_that_fails_stops_no_run_and_is_tried_again(tmp_path, monkeypatch, capsys):
    config, store = config_of(tmp_path / "out"), ObjectStore(URL, "--mirror")
    run_stages(config, "build")
    broken = monkeypatch.context()
    with broken as patch:

        def fail(*_, **__):
            raise OSError("connection reset")

        patch.setattr(Mirror, "update", lambda self: self.store._try(fail))
        run_stages(config, "targets", resume=True, console=Console(width=400))
    said = capsys.readouterr().out
    assert "could not be brought up to date" in said and "after 4 tries (OSError: connection reset)" in said
    assert said.strip().splitlines()[-1].startswith("warning: the mirror is not complete")
    assert stages_there(store) == {"build.bin"}
    run_stages(config, "report", resume=True, console=Console(width=400))
    assert capsys.readouterr().out == "" and stages_there(store) == {"build.bin", "targets.bin", "report.bin"}


def test_what_cannot_be_fetched_is_said(tmp_path):
    quiet = Console(quiet=True)
    with pytest.raises(UserError, match=f"--resume: --mirror {URL} holds no run, nor does"):
        fetch_run(None, {"out": str(tmp_path / "out"), "mirror": URL}, quiet)
    run_stages(config_of(tmp_path / "out"), "build")
    other = config_of(tmp_path / "other", url="")
    run_stages(other, "build")
    with pytest.raises(UserError, match="--out .*other is not the run that --mirror"):
        fetch_run(None, {"out": other.out, "mirror": URL}, quiet)
    with pytest.raises(UserError, match="lie one inside the other"):
        check_mirror(f"file://{tmp_path}/out/mirror", tmp_path / "out", resume=False)


def test_a_folder_in_use_is_not_replaced(tmp_path):
    first, second = config_of(tmp_path / "first"), config_of(tmp_path / "second")
    run_stages(first, "build")
    fetch_run(None, {"out": second.out, "mirror": URL}, Console(quiet=True))
    run_stages(first, "targets", resume=True)
    with (
        open_run(second.out, second, resume=True),
        pytest.raises(UserError, match="in use by another run"),
    ):
        fetch_run(None, {"out": second.out}, Console(quiet=True))


def test_targets_that_are_half_written_go_on_elsewhere(tmp_path, monkeypatch):
    """Not one shard is written twice, and the store is that of writing in one go."""
    monkeypatch.setattr("moe2dense.distillation.targets.write._RESIDENT_BLOCKS", 4)
    teacher, blocks, asked = make_teacher(), make_blocks(11), []
    write_targets(teacher, blocks, tmp_path / "whole")
    first, second = config_of(tmp_path / "first"), config_of(tmp_path / "second")

    def progress(stage, done, total, **_):
        asked.append(done)

    def lost(stage, done, total, **_):
        if done == 8:
            raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        open_run(first.out, first) as run,
        mirrored(run, first, Console(quiet=True)),
    ):
        copied = copying(lambda *_, **__: None, run.after_change, every=0.0)
        write_targets(
            teacher, blocks, run.folder / "targets", progress=lambda *a, **k: (copied(*a, **k), lost(*a, **k))
        )
    shutil.rmtree(first.out)
    fetch_run(None, {"out": second.out, "mirror": URL}, Console(quiet=True))
    write_targets(teacher, blocks, tmp_path / "second" / "targets", progress=progress)
    assert asked == [11]
    whole, resumed = (
        {p.name: p.read_bytes() for p in f.glob("*")} for f in (tmp_path / "whole", tmp_path / "second" / "targets")
    )
    assert whole == resumed


def test_progress_copies_only_now_and_then_and_alone(monkeypatch):
    said, copies = [], []
    report = copying(lambda *a, **k: said.append((a, k)), lambda: copies.append(1), every=1000.0)
    report("targets", 1, 2, tokens=3)
    assert said == [(("targets", 1, 2), {"tokens": 3})] and not copies
    assert copying(report, None) is report
    monkeypatch.setattr("moe2dense.conversion.mirroring.world", lambda: (0, 2))
    assert copying(report, lambda: None) is report


@pytest.mark.slow
def test_a_run_goes_on_from_its_mirror_bit_by_bit(tiny, tmp_path, monkeypatch):
    config = quick(tmp_path)
    whole = m2d.convert(str(tiny), to="3.2m", out=tmp_path / "whole", config=config)
    after_step = Trainer._after_step

    def stop(self, *args, **kwargs):
        after_step(self, *args, **kwargs)
        if self.step == 5:  # one step after a checkpoint
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_after_step", stop)
        with pytest.raises(KeyboardInterrupt):
            m2d.convert(str(tiny), to="3.2m", out=tmp_path / "stopped", config=config, mirror=URL)
    manifest = newest_manifest(ObjectStore(URL, "--mirror"))
    assert any(name.startswith("checkpoints/step-000004/") for name in manifest.files)
    shutil.rmtree(tmp_path / "stopped")  # that machine is gone
    resumed = m2d.convert(out=tmp_path / "elsewhere", mirror=URL, resume=True)
    expected, there = (load_file(r.model / "model.safetensors") for r in (whole, resumed))
    assert expected.keys() == there.keys()
    assert all(torch.equal(expected[name], there[name]) for name in expected)
    names = set(newest_manifest(ObjectStore(URL, "--mirror")).files)
    assert {"model/model.safetensors", "report.json", "report.html"} <= names
