"""The end-to-end fit's hints: the teacher's states that the student follows on the way."""

import dataclasses

import pytest
import torch

from moe2dense.config.schema import BuildConfig
from moe2dense.data.blocks import Blocks
from moe2dense.data.load import load_blocks
from moe2dense.student.build import api as build
from moe2dense.student.build.api import build_student
from moe2dense.student.build.heal import hint_loss
from moe2dense.student.footprint import hint_layers
from moe2dense.teacher.load import load_teacher

# N blocks, S block length, H hidden
SHORT = BuildConfig(
    local_steps=8, local_batch=16, layer_steps=4, layer_batch=46, heal_epochs=2, heal_batch=46, hold_out=0.3
)


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5, 7, 32, 61])
def test_hinted_layers_fit_and_are_spread(layers):
    for room in range(70):
        chosen = list(hint_layers(layers, 10, 10 * room + 9))
        assert len(chosen) <= room and all(0 <= i < layers - 1 for i in chosen)
        gaps = {b - a for a, b in zip([-1, *chosen], [*chosen, layers - 1], strict=True)}
        assert room == 0 or max(gaps) <= -(-layers // (min(room, layers - 1) + 1))
    assert list(hint_layers(layers, 10, 10 * layers)) == list(range(layers - 1))


def test_hint_loss_counts_every_real_token_of_every_layer_alike():
    generator = torch.Generator().manual_seed(0)
    states = {f"hidden-{i}": torch.randn(3 * 5, 7, generator=generator, dtype=torch.float64) for i in (0, 2)}
    hints = {name: torch.randn(6, 5, 7, generator=generator, dtype=torch.float64) for name in states}
    pick, real = torch.tensor([4, 0, 5]), torch.rand(6, 5, generator=generator) < 0.6
    want = []
    for name, goal in hints.items():
        for row, block in enumerate(pick.tolist()):
            for token in range(5):
                if real[block, token]:
                    got, teacher_states = states[name][row * 5 + token], goal[block, token]
                    error = float((got - teacher_states).pow(2).sum() / teacher_states.pow(2).sum())
                    want.append(2 * (1 + error) ** 0.5 - 2)
    assert float(hint_loss(states, hints, pick, real)) == pytest.approx(sum(want) / len(want), rel=1e-6)
    nothing = torch.zeros(6, 5, dtype=torch.bool)
    assert float(hint_loss(states, hints, pick, nothing)) == 0


@pytest.mark.parametrize("to", ["50%", "25%"])
def test_hints_are_the_teachers_states(to, root, monkeypatch):
    """Also where channels are pruned: the hints are the kept channels of the teacher's layer."""
    teacher = load_teacher(root / "examples" / "tiny-mixtral")
    ids = torch.randint(5, 4000, (9, 23), generator=torch.Generator().manual_seed(1))
    seen: dict[str, torch.Tensor] = {}
    inner = build.heal

    def watch(*args):
        seen.update(args[3])
        return inner(*args)

    monkeypatch.setattr(build, "heal", watch)
    with_hints = build_student(teacher, to, Blocks(ids), config=SHORT, seed=1)
    width = with_hints.model.config.hidden_size
    for layer_pass in teacher.stream(ids, None, None, observers=[]):
        if (goal := seen.get(f"hidden-{layer_pass.index}")) is not None:
            teacher_states = layer_pass.hidden_out.to(torch.bfloat16)
            assert goal.shape[-1] == width and goal.dtype == torch.bfloat16
            columns = {tuple(c.tolist()) for c in teacher_states[0].T}
            assert {tuple(c.tolist()) for c in goal[0].T} <= columns
    assert sorted(seen) == ["hidden-0", "hidden-1", "hidden-2"]
    seen.clear()
    build_student(teacher, to, Blocks(ids), config=dataclasses.replace(SHORT, heal_hints=0.0), seed=1)
    assert not seen


def test_hints_bring_the_students_states_closer(root):
    """States of text the student was not fitted to, against the teacher's, after fits with and without hints."""
    teacher = load_teacher(root / "examples" / "tiny-mixtral")
    text = load_blocks(str(root / "examples" / "text"), teacher.tokenizer(), 128, "train", tokens=20 * 128)
    other = load_blocks(str(root / "examples" / "text"), teacher.tokenizer(), 128, "valid", tokens=8 * 128).input_ids
    teacher_states = {
        layer_pass.index: layer_pass.hidden_out.clone()
        for layer_pass in teacher.stream(other, None, None, observers=[])
    }
    missed = {}
    for weight in (0.0, 10.0):
        config = dataclasses.replace(SHORT, heal_hints=weight, heal_epochs=3, heal_batch=256)
        student = build_student(teacher, "50%", text, init="concat+heal", config=config, seed=1)
        assert student.history[-1]["heal_best_step"] > 0
        with torch.no_grad():
            states = student.model(input_ids=other, output_hidden_states=True).hidden_states
        missed[weight] = sum(float((states[i + 1] - teacher_states[i]).pow(2).mean()) for i in range(3))
    assert missed[10.0] < missed[0.0]
