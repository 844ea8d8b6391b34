"""The heal within little memory: by the rungs of training's ladder, with the same student where nothing is saved."""

import pytest
import torch

from moe2dense.config.schema import BuildConfig
from moe2dense.data.blocks import Blocks
from moe2dense.student.build import api as build
from moe2dense.student.build.api import build_student
from moe2dense.student.build.heal_memory import (
    heal_bytes,
    heal_changes,
    heal_choices,
    heal_settings,
    least_heal_bytes,
)
from moe2dense.teacher.load import load_teacher
from tests.student.build.test_memory import target_for
from tests.teacher.families import make

HEAL = BuildConfig(heal_epochs=5, heal_batch=96, heal_lr=2e-3, hold_out=0.3)


@pytest.fixture(scope="module")
def teacher_and_text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    make("mixtral", folder, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    text = torch.randint(3, 101, (20, 16), generator=torch.Generator().manual_seed(1))
    return load_teacher(folder), Blocks(text)


def healed(teacher, text, way, monkeypatch):
    monkeypatch.setattr(build, "heal_settings", lambda *_: way)
    return build_student(teacher, target_for(teacher, 64), text, init="random+heal", config=HEAL, seed=1)


def choices(teacher, text, on_gpu=False):
    return heal_choices(HEAL, target_for(teacher, 64), text.input_ids.shape[1], on_gpu)


def test_each_way_takes_less_than_those_before_it(teacher_and_text):
    teacher, text = teacher_and_text
    target, block = target_for(teacher, 64), text.input_ids.shape[1]
    ways = choices(teacher, text)
    needs = [need for _, need in ways]
    assert needs == sorted(needs, reverse=True) and len(needs) > 4
    for way, need in ways:
        assert heal_settings(HEAL, target, block, need, False) == way
        assert heal_bytes(way, target, block, on_gpu=True) < need  # the best values rest in main memory
    assert heal_settings(HEAL, target, block, least_heal_bytes(HEAL, target, block, False) - 1, False) is None
    assert not heal_changes(ways[0][0]) and heal_changes(ways[-1][0])["weights"] == "bfloat16"


def test_computing_activations_again_changes_nothing(teacher_and_text, monkeypatch):
    teacher, text = teacher_and_text
    plain, again = (healed(teacher, text, choices(teacher, text)[i][0], monkeypatch) for i in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), again.model.parameters(), strict=True))
    assert again.history[-1].pop("heal_memory") == "activations are computed again in the backward pass"
    assert again.history[-1]["heal_best_step"] == plain.history[-1]["heal_best_step"] > 0
    assert again.model.training == plain.model.training


@pytest.mark.parametrize("number", [3, 5, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4))])
def test_what_holds_less_heals_nearly_as_far(number, teacher_and_text, monkeypatch):
    teacher, text = teacher_and_text
    torch.manual_seed(7)
    before = torch.get_rng_state()
    ways = choices(teacher, text)
    plain = healed(teacher, text, ways[0][0], monkeypatch).history[-1]
    one, other = (healed(teacher, text, ways[number][0], monkeypatch) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    record = one.history[-1]
    gain = plain["heal_kl_before"] - plain["heal_kl_after"]
    assert gain > 0 and record["heal_kl_before"] == pytest.approx(plain["heal_kl_before"], rel=0.05)
    assert record["heal_kl_before"] - record["heal_kl_after"] > 0.5 * gain
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))
    assert all(t.dtype == torch.float32 for t in (*one.model.parameters(), *one.model.buffers()))


def test_a_build_says_how_its_heal_was_made_to_fit(teacher_and_text, monkeypatch):
    teacher, text = teacher_and_text
    target = target_for(teacher, 64)
    need = choices(teacher, text)[3][1]
    monkeypatch.setattr(teacher, "budget", need)
    record = build_student(teacher, target, text, init="select+heal", config=HEAL).history[-1]
    assert "AdamW's moments rest in eight bits" in record["heal_memory"] and "heal_kl_after" in record
    monkeypatch.setattr(teacher, "budget", 1000)
    record = build_student(teacher, target, text, init="select+heal", config=HEAL).history[-1]
    assert "takes at least" in record["heal_skipped"]
