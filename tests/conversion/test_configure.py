"""Settings from a finished run's file, and those that --resume finds in the run's folder."""

import dataclasses

import pytest

from moe2dense.config.schema import RunConfig
from moe2dense.config.toml import merge_flags, write_config
from moe2dense.conversion.configure import configure, resumed_settings, texts_of_folder
from moe2dense.conversion.run import open_run
from moe2dense.errors import UserError
from moe2dense.families.resolve import resolve_teacher


@pytest.fixture
def stored(tiny, tmp_path):
    """The settings of a run in tmp_path/out."""
    settings = configure(str(tiny), "3.2m", None, {"train.lr": 0.01, "out": str(tmp_path / "out")})
    with open_run(settings.out, settings):
        pass
    return settings


def test_a_finished_runs_file_needs_no_teacher(tiny, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text(write_config(configure(str(tiny), "3.2m", None, {"train.lr": 0.01})))
    settings = configure(config=file)
    assert (settings.model, settings.to, settings.train.lr) == (str(tiny), "3.2m", 0.01)
    assert configure(config=file, options={"to": "40%"}).to == "40%"  # what is typed goes first
    with pytest.raises(UserError, match="TEACHER is missing"):
        configure(to="7b")


def test_resuming_needs_the_folder_alone(stored):
    assert resumed_settings(options={"out": stored.out}) == stored
    free = resumed_settings(options={"out": stored.out, "teacher.memory": "1GB"})
    assert free == dataclasses.replace(stored, teacher=dataclasses.replace(stored.teacher, memory="1GB"))


def test_resuming_with_the_same_flags(stored, tiny, monkeypatch):
    same = {"out": stored.out, "model": str(tiny), "to": "3.2m", "train.lr": 0.01}
    assert resumed_settings(options=same) == stored
    monkeypatch.chdir(tiny.parent)
    assert resumed_settings(options=same | {"model": tiny.name}) == stored  # the same folder, written otherwise


def test_resuming_with_other_flags_names_the_difference(stored):
    with pytest.raises(UserError, match=r"settings differ .*train\.lr: 0\.01 -> 0\.5; .*leave them out"):
        resumed_settings(options={"out": stored.out, "train.lr": 0.5, "train.temperature": 1})


def test_a_moved_run_is_resumed_where_it_is(stored, tmp_path):
    (tmp_path / "out").rename(tmp_path / "moved")
    assert resumed_settings(options={"out": str(tmp_path / "moved")}).out == str(tmp_path / "moved")


def test_stages_are_resumed_as_they_were_typed(tiny, tmp_path):
    typed = {"stages": "47%", "to": "40%", "out": str(tmp_path / "out")}
    settings = configure(str(tiny), None, None, typed)
    with open_run(settings.out, settings):
        pass
    assert resumed_settings(options=typed | {"model": str(tiny)}) == settings


def test_nothing_to_resume(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        resumed_settings(options={"out": str(tmp_path)})


def test_texts_that_the_teachers_folder_names(tiny):
    teacher = resolve_teacher(str(tiny))
    assert texts_of_folder(configure(str(tiny), "3.2m"), teacher) == ("path", "ood")
    assert texts_of_folder(configure(str(tiny), "3.2m", None, {"data.path": "own.txt"}), teacher) == ("ood",)
    assert texts_of_folder(merge_flags(RunConfig(), {"data.ood": "x"}), teacher) == ()
