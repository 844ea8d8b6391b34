"""A walk that keeps its layers on disk: the same student, one layer in memory at a time."""

import sys
from pathlib import Path

import pytest
import torch

from moe2dense.cards import student_host
from moe2dense.config import WalkConfig
from moe2dense.data import Blocks
from moe2dense.geometry import teacher_geometry
from moe2dense.student import build
from moe2dense.student.build import build_student, build_to_folder
from moe2dense.student.footprint import polish_bytes
from moe2dense.student.host import count_parameters, dense_config, empty_model
from moe2dense.student.store import load_student
from moe2dense.student.target import Target
from moe2dense.teacher.load import load_teacher

sys.path.insert(0, str(Path(__file__).parent.parent / "teacher"))
from families import blocks, make

SHORT = WalkConfig(
    local_steps=8, local_batch=16, layer_steps=4, layer_batch=46, polish_epochs=1, polish_batch=46, hold_out=0.3
)


def target_for(teacher, width: int = 0) -> Target:
    card, config = student_host(teacher.card.host), teacher.config.get_text_config()
    shape = teacher_geometry(config, teacher.card)
    width = width or max(shape.expert_width + shape.shared_width, shape.dense_width)
    student = dense_config(config, card, width)
    return Target("test", "test", card, width, student, count_parameters(empty_model(student)), shape)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "phimoe", "deepseek_v3", "lfm2_moe"])
@pytest.mark.parametrize("room", [True, False])
def test_the_student_on_disk_is_the_one_in_memory(family, room, tmp_path, monkeypatch):
    model = make(family, tmp_path / "t")
    teacher, ids = load_teacher(tmp_path / "t", experts="streamed"), blocks(model)
    target = target_for(teacher)
    monkeypatch.setattr(teacher, "budget", polish_bytes(target.parameters) - (not room))
    want = build_student(teacher, target, Blocks(ids), config=SHORT, seed=2)
    folder = build_to_folder(
        teacher, target, Blocks(ids), tmp_path / "walk" / "student", tmp_path / "walk", config=SHORT, seed=2
    )
    got = load_student(folder)
    assert {n for n, _ in got.model.named_parameters()} == {n for n, _ in want.model.named_parameters()}
    for (name, a), b in zip(want.model.named_parameters(), got.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert got.method == "walk" and got.walk_tokens == want.walk_tokens and len(got.fate) == len(want.fate)
    keys = {k for record in got.history for k in record}
    assert ("polish_skipped" in keys) is not room and ("polish_kl_after" in keys) is room


def test_no_layer_stays_in_memory(tmp_path, monkeypatch):
    model = make("mixtral", tmp_path / "t")
    teacher, ids = load_teacher(tmp_path / "t", experts="streamed"), blocks(model)
    monkeypatch.setattr(teacher, "budget", 1000)
    models: list = []
    empty = build.empty_student
    monkeypatch.setattr(build, "empty_student", lambda target: models.append(empty(target)) or models[-1])
    real: list[set[str]] = []

    def look(*_: object, **__: object) -> None:
        real.append({n.split(".")[1] for n, p in models[0].named_parameters() if not p.is_meta})

    out = tmp_path / "walk"
    build_to_folder(teacher, target_for(teacher), Blocks(ids), out / "student", out, config=SHORT, progress=look)
    assert real == [{"norm"}] * 3
    assert all(p.is_meta for p in models[0].model.layers.parameters())
