"""A training that lost its machine goes on from the mirror of its folder as if it had not been stopped."""

import shutil
import threading

import pytest
import torch

from moe2dense.common.mirror import Mirror, fetch_mirror, newest_manifest
from moe2dense.common.object_store import ObjectStore
from moe2dense.distillation.api import distill
from moe2dense.distillation.checkpoints import on_cpu
from tests.distillation.test_sharded_checkpoints import contents, train
from tests.distillation.tiny_run import Stop, make_blocks, make_student, same, settings, weights

PATIENCE = 60


pytestmark = pytest.mark.usefixtures("memory_store")


@pytest.fixture
def store():
    return ObjectStore("memory://training", "--mirror")


def options():
    return dict(valid=make_blocks(5, seed=9), config=settings(epochs=2.0), seed=3)


def stop_at(step):
    def stop(stage, done, total, **numbers):
        if stage == "distill" and done == step:
            raise Stop

    return stop


def mirrored(store, folder):
    """What copies a new folder to the store."""
    folder.mkdir()
    return Mirror(store, folder).update


def goes_on_elsewhere(store, folder, teacher, expected):
    """Fetch the mirror into a new folder, train on, and compare every bit."""
    fetch_mirror(store, newest_manifest(store), folder)
    student = make_student()
    distill(student, teacher, make_blocks(), resume=True, out=folder, **options())
    assert same(weights(student), expected)


@pytest.mark.parametrize("device", ["cpu", "as on a GPU"])
def test_training_goes_on_from_its_mirror_bit_by_bit(straight, teacher, tmp_path, store, monkeypatch, device):
    if device != "cpu":
        own = on_cpu
        monkeypatch.setattr("moe2dense.distillation.trainer.written_behind", lambda device: True)
        for module in ("trainer", "checkpoints"):
            monkeypatch.setattr(
                f"moe2dense.distillation.{module}.on_cpu", lambda *a: {k: v.clone() for k, v in own(*a).items()}
            )
    first = tmp_path / "first"
    copy = mirrored(store, first)
    with pytest.raises(Stop):
        distill(
            make_student(), teacher, make_blocks(), progress=stop_at(8), out=first, after_save=copy, **options()
        )  # fmt: skip
    shutil.rmtree(first)
    assert any(name.startswith("checkpoints/step-000008/") for name in newest_manifest(store).files)
    goes_on_elsewhere(store, tmp_path / "second", teacher, straight[1])


def test_training_goes_on_while_a_checkpoint_is_copied(straight, teacher, tmp_path, store, monkeypatch):
    """The copy of step 3 ends only after step 4 has begun to train, and is of step 3; the checkpoint of step 4 waits for it."""
    trained, write, waited = threading.Event(), ObjectStore.write, []

    def late(self, name, data):
        if newest_manifest(self) is not None and not trained.is_set():
            waited.append(trained.wait(PATIENCE))
        write(self, name, data)

    def progress(stage, done, total, **numbers):
        if stage == "distill" and done == 5:
            trained.set()
        if stage == "distill" and done == 7:
            raise Stop

    monkeypatch.setattr(ObjectStore, "write", late)
    first = tmp_path / "first"
    student, copy = make_student(), mirrored(store, first)
    config = settings(epochs=2.0, save_every=3, eval_every=100)
    kwargs = dict(options(), config=config)
    with pytest.raises(Stop):
        distill(student, teacher, make_blocks(), progress=progress, out=first, after_save=copy, **kwargs)
    assert waited == [True]
    names = {name.split("/")[1] for name in newest_manifest(store).files if name.startswith("checkpoints/")}
    assert "step-000006" in names
    fetch_mirror(store, newest_manifest(store), tmp_path / "second")
    resumed, whole = make_student(), make_student()
    distill(resumed, teacher, make_blocks(), resume=True, out=tmp_path / "second", **kwargs)
    distill(whole, teacher, make_blocks(), **kwargs)
    assert same(weights(resumed), weights(whole))


def test_an_error_of_the_copy_stops_the_run(teacher, tmp_path):
    """What may go wrong is for `after_save` to decide: an error that it lets through is not lost in its thread."""

    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        distill(make_student(), teacher, make_blocks(), out=tmp_path, after_save=fail, **options())


@pytest.mark.slow
def test_two_processes_that_each_write_a_part_go_on_from_the_mirror(tmp_path):
    """The first process copies what both wrote. The folder is lost; two new processes go on to the bits of a run that was not stopped."""
    store, first, second = ObjectStore(f"file://{tmp_path}/store", "--mirror"), tmp_path / "first", tmp_path / "second"
    first.mkdir()
    assert train(tmp_path / "straight") == [0, 0]
    assert train(first, stop="mirror", argument=store.url) == [3, 3]
    shutil.rmtree(first)
    manifest = newest_manifest(store)
    assert sum(name.startswith("checkpoints/step-000004/weights/") for name in manifest.files) == 2
    fetch_mirror(store, manifest, second)
    assert train(second, resume=True) == [0, 0]
    for ours, expected in zip(contents(second)[:2], contents(tmp_path / "straight")[:2], strict=True):
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[name], expected[name]) for name in ours)
