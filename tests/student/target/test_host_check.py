"""A host must compute what its teacher does outside the FFNs; a field that makes it differ is named before anything is built."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from moe2dense.config.schema import BuildConfig, RunConfig, TeacherConfig
from moe2dense.conversion.planning import make_plan
from moe2dense.errors import UserError
from moe2dense.families.cards import student_host, teacher_cards
from moe2dense.families.machines import Machine
from moe2dense.modeling.small_model import small_config
from moe2dense.student.target import host_check
from moe2dense.student.target.host_check import check_host
from tests.teacher.families import FAMILIES, make, tiny_sizes

CHECKPOINTS = [(card, row) for card in teacher_cards().values() for row in card.checkpoints[:1]]


@pytest.mark.parametrize(("card", "row"), CHECKPOINTS, ids=[card.model_type for card, _ in CHECKPOINTS])
def test_every_shipped_host_agrees_with_the_public_checkpoints_config(card, row):
    config = AutoConfig.for_model(card.model_type, **row.config)
    small = small_config(config, card)
    assert small.num_hidden_layers <= 8 and small.hidden_size <= 80 and type(small) is type(config)
    state = torch.get_rng_state()
    assert check_host(config, card, student_host(card.host)) == ""
    assert torch.equal(torch.get_rng_state(), state)


def tiny_config(family, **changes):
    return AutoConfig.for_model(family, **tiny_sizes(family, **changes))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_shipped_host_agrees_with_odd_configs(family):
    card = teacher_cards()[family]
    assert check_host(tiny_config(family), card, student_host(card.host)) == ""


MISTRAL = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
    "max_position_embeddings", "rms_norm_eps", "rope_parameters", "sliding_window", "head_dim", "tie_word_embeddings",
)  # fmt: skip


@pytest.mark.parametrize("lost", ["sliding_window", "rope_parameters", "rms_norm_eps"])
def test_a_field_that_the_host_does_not_take_over_is_named(lost):
    card = teacher_cards()["mixtral"]
    host = replace(student_host("mistral"), copy=tuple(n for n in MISTRAL if n != lost))
    assert check_host(tiny_config("mixtral"), card, replace(host, copy=MISTRAL)) == ""
    with pytest.raises(
        UserError, match=rf"on small models of both configs layer 0 .* config field at fault: {lost} \(teacher"
    ):
        check_host(tiny_config("mixtral"), card, host)


def test_the_kind_of_the_layer_that_differs_is_named():
    card = teacher_cards()["gpt_oss"]
    host = replace(student_host("gpt_oss"), set={**student_host("gpt_oss").set, "sliding_window": 4096})
    with pytest.raises(UserError, match=r"layer 0 \(sliding_attention\) .* sliding_window \(teacher 7, host 4096\)"):
        check_host(tiny_config("gpt_oss"), card, host)


def test_the_heads_scale_is_part_of_it():
    card = teacher_cards()["granitemoe"]
    host = replace(student_host("granite"), set={"logits_scaling": 1.0})
    with pytest.raises(
        UserError, match=r"its language-model head differs .* logits_scaling \(teacher 2\.0, host 1\.0\)"
    ):
        check_host(tiny_config("granitemoe"), card, host)


def test_a_plan_refuses_before_weights_are_read(tmp_path, monkeypatch):
    make("mixtral", tmp_path)
    settings = RunConfig(model=str(tmp_path), to="60%", teacher=TeacherConfig(memory="1GB"))
    machine = Machine("a machine", single=1e11, disk=1e9, memory=64e9)
    make_plan(settings, machine)
    other = replace(settings, build=BuildConfig(host="llama"))
    with pytest.raises(UserError, match=r"the Llama host computes something else .* layer 0 "):
        make_plan(other, machine)


def test_a_family_whose_sizes_cannot_be_cut_is_said_not_refused(monkeypatch):
    def fail(*_):
        raise RuntimeError("no small model")

    monkeypatch.setattr(host_check, "small_config", fail)
    host_check._check.cache_clear()
    card = teacher_cards()["mixtral"]
    assert "could not be tried out against the teacher's config (no small model)" in check_host(
        tiny_config("mixtral"), card, student_host("mistral")
    )
    host_check._check.cache_clear()
