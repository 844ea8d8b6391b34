import json

import pytest

from moe2dense.common.files import atomic_write
from moe2dense.config.schema import RunConfig
from moe2dense.config.toml import merge_flags
from moe2dense.conversion.run import check_out, open_run
from moe2dense.errors import UserError


def test_stages_are_remembered(tmp_path):
    config = RunConfig(model="m", to="7b", out=str(tmp_path / "out"))
    with open_run(config.out, config) as run:
        assert run.finished("build") is None
        run.finish("build", tokens=3)
    with open_run(config.out, config, resume=True) as run:
        assert run.finished("build")["tokens"] == 3
    assert json.loads((tmp_path / "out" / "run.json").read_text())["stages"]["build"]["tokens"] == 3


def test_an_existing_folder_is_refused_with_both_remedies(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="--resume, or choose another --out"), open_run(tmp_path, RunConfig()):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_empty_folder_is_used(tmp_path):
    with open_run(tmp_path, RunConfig()):
        assert (tmp_path / "moe2dense.toml").is_file()


def test_nothing_to_resume(tmp_path):
    with pytest.raises(UserError, match="holds no run"), open_run(tmp_path / "out", RunConfig(), resume=True):
        pass


def test_changed_settings_are_shown(tmp_path):
    config = RunConfig(out=str(tmp_path / "out"))
    with open_run(config.out, config):
        pass
    changed = merge_flags(config, {"train.lr": 0.5})
    with (
        pytest.raises(UserError, match=r"settings differ.*train\.lr: .* -> 0\.5"),
        open_run(config.out, changed, resume=True),
    ):
        pass
    with open_run(config.out, merge_flags(config, {"teacher.memory": "1GB"}), resume=True):
        pass  # does not change the result


def test_a_run_goes_on_with_the_teacher_and_the_texts_it_began_with(tmp_path):
    config = RunConfig(out=str(tmp_path / "out"))
    with open_run(config.out, config) as run:
        run.check_inputs(teacher="a", training_text="b")
    with open_run(config.out, config, resume=True) as run:
        run.check_inputs(teacher="a", training_text="b", out_of_distribution_text="c")
        with pytest.raises(UserError, match="the training text changed since the run in .* began; put it back"):
            run.check_inputs(teacher="a", training_text="d")
        with pytest.raises(UserError, match="the teacher changed"):
            run.check_inputs(teacher="e", training_text="b")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["inputs"]["teacher"] == "a"


def test_one_run_at_a_time(tmp_path):
    config = RunConfig(out=str(tmp_path / "out"))
    with (
        open_run(config.out, config),
        pytest.raises(UserError, match="in use by another run"),
        open_run(config.out, config, resume=True),
    ):
        pass


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    atomic_write(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="the disk is full"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(UserError, match="cannot be created"), open_run(tmp_path / "f" / "out", RunConfig()):
        pass


def test_a_run_refused_before_anything_was_done_leaves_its_folder_free(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="typo"), open_run(out, RunConfig()):
        raise UserError("--data typo")
    with pytest.raises(UserError, match="later"), open_run(out, RunConfig()) as run:  # the same folder again
        run.finish("build")
        raise UserError("later")
    with pytest.raises(UserError, match="--resume, or choose another --out"), open_run(out, RunConfig()):
        pass


def test_a_refused_run_leaves_no_folder(tmp_path):
    out = tmp_path / "new" / "out"
    with pytest.raises(UserError, match="typo"), open_run(out, RunConfig()):
        raise UserError("--data typo")
    assert not out.exists()
    kept = tmp_path / "mine"
    kept.mkdir()
    with pytest.raises(UserError, match="typo"), open_run(kept, RunConfig()):
        raise UserError("--data typo")
    assert kept.is_dir() and not list(kept.iterdir())  # a folder of the user's stays


def test_places_are_checked_without_making_anything(tmp_path):
    check_out(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be created"):
        check_out(tmp_path / "file" / "out")
    with pytest.raises(UserError, match="holds no run"):
        check_out(tmp_path / "a", resume=True)
