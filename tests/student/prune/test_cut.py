"""Students with fewer channels or layers than the teacher."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe2dense.config.schema import BuildConfig
from moe2dense.data.blocks import Blocks
from moe2dense.families.cards import student_host
from moe2dense.modeling.shape import teacher_geometry
from moe2dense.student.build.api import build_student
from moe2dense.student.prune.cut import alternate_layers, best_layers, importance
from moe2dense.student.target.dense_config import dense_config
from moe2dense.student.target.resolve import Target, resolve_target
from moe2dense.teacher.load import load_teacher
from tests.teacher.families import blocks, make

SHORT = BuildConfig(
    local_steps=10, local_batch=32, layer_steps=4, layer_batch=46, heal_epochs=1, heal_batch=46, hold_out=0.3
)


def target_for(teacher, width: int, **geometry) -> Target:
    card = student_host(teacher.card.host)
    config = dense_config(teacher.config, card, width, **geometry)
    return Target("test", "test", card, width, config, 0, teacher_geometry(teacher.config, teacher.card), geometry)


def test_scores_are_what_they_say(tmp_path):
    model = make("mixtral", tmp_path)
    ids = blocks(model)
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    states = model.model(ids, output_hidden_states=True).hidden_states
    scores = importance(load_teacher(tmp_path, experts="streamed"), Blocks(ids))
    torch.testing.assert_close(scores.channels, sum(x.abs().double().mean((0, 1)) for x in seen), rtol=1e-4, atol=1e-5)
    turned = 1 - torch.cosine_similarity(states[0], states[1], dim=-1).mean()
    assert scores.influence[0] == pytest.approx(float(turned), rel=1e-3) and len(scores.influence) == 3


def test_which_layers_stay():
    assert best_layers([0.1, 0.5, 0.2, 0.9, 0.3, 0.0], 4) == [0, 1, 3, 5]
    assert best_layers([0.1, 0.5, 0.2], 3) == [0, 1, 2] and best_layers([0.1, 0.5], 1) == [0]
    assert alternate_layers(12, 6) == [0, 2, 4, 7, 9, 11] and alternate_layers(5, 1) == [0]


def test_dropping_channels_that_carry_nothing_is_exact(tmp_path):
    """Eight channels stay zero throughout; without them, and with all neurons of uniformly routed experts, nothing changes."""
    model = make(
        "mixtral", tmp_path / "t", num_experts_per_tok=5, rms_norm_eps=1e-9
    )  # epsilon does not scale with channels
    dead = torch.tensor([0, 3, 4, 9, 13, 17, 20, 23])
    for layer in model.model.layers:
        layer.mlp.gate.weight.zero_()
        layer.self_attn.o_proj.weight[dead] = 0
        layer.mlp.experts.down_proj[:, dead] = 0
    model.model.embed_tokens.weight[:, dead] = 0
    model.save_pretrained(tmp_path / "d")
    teacher, ids = load_teacher(tmp_path / "d", experts="streamed"), blocks(model)
    student = build_student(teacher, target_for(teacher, 65, hidden_size=16), Blocks(ids), init="select")
    assert student.model.config.hidden_size == 16 and student.model.lm_head.weight.shape == (101, 16)
    torch.testing.assert_close(student.model(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "granitemoe"])
def test_pruned_students_of_several_families_reload(family, tmp_path):
    model = make(family, tmp_path / "t")
    teacher, ids = load_teacher(tmp_path / "t", experts="streamed"), blocks(model)
    changes = {"hidden_size": 16, "num_hidden_layers": 2}
    shape = teacher_geometry(teacher.config, teacher.card)
    width = max(shape.expert_width + shape.shared_width, shape.dense_width)
    student = build_student(teacher, target_for(teacher, width, **changes), Blocks(ids), init="layerwise", config=SHORT)
    assert len(student.provenance) == 2 == len(student.model.model.layers)
    student.model.save_pretrained(tmp_path / "s")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "s", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, student.model(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_quarter_of_the_tiny_teacher(tiny):
    teacher = load_teacher(tiny)
    target = resolve_target("25%", teacher.config, teacher.card)
    assert target.geometry == {"hidden_size": 128} and target.parameters <= 0.25 * 6_742_464
    ids = torch.randint(3, 4096, (8, 64), generator=torch.Generator().manual_seed(0))
    build = dataclasses.replace(SHORT, layer_steps=20, local_steps=50, heal_epochs=0)
    want = teacher.run(ids).logits.log_softmax(-1)
    divergences = {}
    for init in ("random", "obs+refit+local+layer"):
        student = build_student(teacher, target, Blocks(ids), init=init, config=build)
        with torch.no_grad():
            got = student.model(ids).logits.log_softmax(-1)
        divergences[init] = float((want.exp() * (want - got)).sum(-1).mean())
    assert divergences["obs+refit+local+layer"] < 0.8 * divergences["random"], divergences
