"""A training that lost its machine goes on from the mirror of its folder as if it had not been stopped."""

import shutil

import fsspec
import pytest

from moe2dense.common.mirror import Mirror, fetch_mirror, newest_manifest
from moe2dense.common.object_store import ObjectStore
from moe2dense.distillation.api import distill
from tests.distillation.tiny_run import Stop, make_blocks, make_student, make_teacher, same, settings, weights


def test_training_goes_on_from_its_mirror_bit_by_bit(tmp_path):
    options = dict(valid=make_blocks(5, seed=9), config=settings(epochs=2.0), seed=3)
    teacher, straight = make_teacher(), make_student()
    distill(straight, teacher, make_blocks(), **options)
    store = ObjectStore("memory://training", "--mirror")
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()

    def stop(stage, done, total, **numbers):
        if stage == "distill" and done == 8:
            raise Stop

    with pytest.raises(Stop):
        distill(
            make_student(), teacher, make_blocks(), progress=stop, out=first, after_save=Mirror(store, first).update,
            **options,
        )  # fmt: skip
    shutil.rmtree(first)
    manifest = newest_manifest(store)
    assert any(name.startswith("checkpoints/step-0000") for name in manifest.files)
    fetch_mirror(store, manifest, second)
    student = make_student()
    distill(student, teacher, make_blocks(), resume=True, out=second, **options)
    assert same(weights(student), weights(straight))
    fsspec.filesystem("memory").rm("/training", recursive=True)
