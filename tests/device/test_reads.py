"""How often a build reads the teacher: each expert once, whatever looks at the layer."""

import pytest

from moe2dense.student.build.api import build_student
from moe2dense.teacher.experts import LayerExperts
from moe2dense.teacher.load import load_teacher
from tests.device.runs import states_rest
from tests.device.test_library import SHORT, text
from tests.student.build.test_build import target_for
from tests.teacher.families import make


def expert_bytes(teacher) -> int:
    """The stored bytes of all experts."""
    layers = [layer.experts for layer in teacher.layers if layer.experts is not None]
    return sum(experts.nbytes(e) for experts in layers for e in range(len(experts)))


@pytest.mark.parametrize("init", ["select+refit", "obs+refit", "concat"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_a_build_reads_each_expert_once(family, init, tmp_path, monkeypatch):
    """For its forward pass, the neurons' energies, and the neurons that are chosen."""
    make(family, tmp_path)
    with states_rest("ram"):
        teacher, read, plain = load_teacher(tmp_path), [], LayerExperts.read

    def counted(self, expert, buffer=None):
        read.append(self.nbytes(expert))
        return plain(self, expert, buffer)

    monkeypatch.setattr(LayerExperts, "read", counted)
    build_student(teacher, target_for(teacher, 24), text(), init=init, config=SHORT)
    assert sum(read) <= 1.02 * expert_bytes(teacher)


def test_without_room_they_are_read_again_and_the_student_is_the_same(tmp_path, monkeypatch):
    make("mixtral", tmp_path)
    built = []
    for room in (10**9, 0):
        with states_rest("ram"):
            teacher = load_teacher(tmp_path)
        monkeypatch.setattr(teacher, "ram", room)
        teacher.checkpoint.bytes_read = 0
        student = build_student(teacher, target_for(teacher, 24), text(), init="obs+refit", config=SHORT)
        built.append((student, teacher.checkpoint.bytes_read))
    (once, few), (again, many) = built
    assert many > few + expert_bytes(teacher)
    assert all((a == b).all() for a, b in zip(once.model.parameters(), again.model.parameters(), strict=True))
