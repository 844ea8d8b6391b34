"""Grafts onto a pretrained dense sibling: kept where they bring it closer to the teacher, undone where they do not."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe2dense.config.schema import BuildConfig
from moe2dense.data.blocks import Blocks
from moe2dense.errors import UserError
from moe2dense.families.cards import student_host
from moe2dense.student.build.api import build_student
from moe2dense.student.build.layer import choose_held_out
from moe2dense.student.target.dense_config import dense_config
from moe2dense.teacher.load import load_teacher
from tests.student.build.test_build import kl, target_for
from tests.teacher.families import blocks, make

CONFIG = BuildConfig(local_steps=20, local_batch=64, hold_out=0.25, graft=True)


def test_a_broken_layer_is_replaced_and_good_ones_stay(tmp_path):
    """The sibling computes what the teacher does (all experts chosen alike, all neurons kept) but for its second layer's FFN."""
    model = make("mixtral", tmp_path / "t", num_experts_per_tok=5)
    for layer in model.model.layers:
        layer.mlp.gate.weight.zero_()
    model.save_pretrained(tmp_path / "u")
    teacher, ids = load_teacher(tmp_path / "u", experts="streamed"), blocks(model, n=8, s=32)
    mask = torch.ones_like(ids)
    mask[2, 20:] = 0
    data = Blocks(ids, attention_mask=mask)
    whole = build_student(teacher, target_for(teacher, 65), Blocks(ids), init="select").model
    with torch.no_grad():
        whole.model.layers[1].mlp.down_proj.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    whole.save_pretrained(tmp_path / "sibling")
    plain = build_student(teacher, str(tmp_path / "sibling"), data)
    student = build_student(teacher, str(tmp_path / "sibling"), data, init="obs+refit+local", config=CONFIG)
    assert student.method == "checkpoint+graft" and student.build_tokens == data.tokens
    assert student.history[1]["grafted"] and student.history[1]["kl_grafted"] < 0.05 * student.history[1]["kl_own"]
    for index, (record, provenance) in enumerate(zip(student.history, student.provenance, strict=True)):
        assert (provenance is not None) is record["grafted"]
        same = torch.equal(
            student.model.model.layers[index].mlp.down_proj.weight, plain.model.model.layers[index].mlp.down_proj.weight
        )
        assert same is not record["grafted"]
    held_out = choose_held_out(8, 0.25, 0)
    with torch.no_grad():
        want, before, after = (
            m(ids[held_out], attention_mask=mask[held_out]).logits[mask[held_out].bool()]
            for m in (model, plain.model, student.model)
        )
    assert kl(want, before) == pytest.approx(student.history[0]["kl_own"], rel=1e-3)
    assert kl(want, after) < 0.05 * kl(want, before)


def test_grafts_that_hurt_are_undone(tmp_path):
    """A sibling that is the teacher itself in dense form cannot be bettered by random neurons."""
    model = make("mixtral", tmp_path / "t", num_experts_per_tok=5)
    for layer in model.model.layers:
        layer.mlp.gate.weight.zero_()
    model.save_pretrained(tmp_path / "u")
    teacher, data = load_teacher(tmp_path / "u", experts="streamed"), Blocks(blocks(model, n=4, s=16))
    build_student(teacher, target_for(teacher, 65), data, init="select").model.save_pretrained(tmp_path / "sibling")
    plain = build_student(teacher, str(tmp_path / "sibling"), data)
    student = build_student(teacher, str(tmp_path / "sibling"), data, init="random", config=CONFIG)
    assert not any(r["grafted"] for r in student.history) and student.provenance == [None] * 3
    for (name, a), b in zip(plain.model.named_parameters(), student.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_what_cannot_be_grafted_is_refused(tmp_path):
    make("mixtral", tmp_path / "t")
    teacher = load_teacher(tmp_path / "t", experts="streamed")
    config = dense_config(teacher.config, student_host("mistral"), 16, num_hidden_layers=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "short")
    with pytest.raises(UserError, match="num_hidden_layers 3; .* has 2; leave build.graft off"):
        build_student(teacher, str(tmp_path / "short"), Blocks(torch.full((3, 8), 5)), config=CONFIG)
    config = dense_config(teacher.config, student_host("mistral"), 16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "one")
    with pytest.raises(UserError, match="at least two"):
        build_student(teacher, str(tmp_path / "one"), Blocks(torch.full((1, 8), 5)), config=CONFIG)
