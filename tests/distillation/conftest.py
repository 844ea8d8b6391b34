"""The teacher of training's tests, and a run of it that nothing interrupts."""

import pytest

from moe2dense.distillation.api import distill
from tests.distillation.tiny_run import make_blocks, make_student, make_teacher, settings, weights


@pytest.fixture(scope="module")
def teacher():
    return make_teacher()


@pytest.fixture(scope="module")
def straight(teacher, tmp_path_factory):
    """A whole run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("straight")
    student = make_student()
    result = distill(
        student, teacher, make_blocks(), valid=make_blocks(5, seed=9), config=settings(epochs=2.0), seed=3, out=folder
    )
    return folder, weights(student), result
