"""What models multiply, against torch's own counter of the operations they make."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe2dense.distillation.optimizers import layer_matrices
from moe2dense.losses.distillation import distillation_loss
from moe2dense.losses.teacher_rows import HiddenRows
from moe2dense.modeling.empty import empty_model
from moe2dense.modeling.forward import final_hidden
from moe2dense.modeling.head import Head, model_head
from moe2dense.modeling.products import body_products
from moe2dense.optimizers.muon import Muon
from tests.flop_counting import counted

SIZES = dict(vocab_size=211, num_hidden_layers=3, num_attention_heads=4, hidden_size=64, intermediate_size=144)
MLA = dict(kv_lora_rank=24, q_lora_rank=20, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10, head_dim=8)
HOSTS = {
    "mistral": dict(num_key_value_heads=2, sliding_window=None),
    "qwen3": dict(num_key_value_heads=2, head_dim=24),
    "olmo2": dict(num_key_value_heads=4),
    "deepseek_v3": dict(num_key_value_heads=4, first_k_dense_replace=3, n_routed_experts=4, n_group=1, topk_group=1)
    | MLA,
}


def config_of(name):
    return AutoConfig.for_model(name, **SIZES | HOSTS[name] | {"pad_token_id": 0})


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("training", [False, True])
def test_a_pass_of_a_dense_model_costs_what_torch_counts(name, training):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(name)).requires_grad_(training)
    ids = torch.randint(0, 211, (3, 48))
    with counted() as flops:
        hidden = final_hidden(model, {"input_ids": ids})
        if training:
            hidden.square().sum().backward()
    # where keys and values differ in width a CPU has no fused attention, whose backward pass computes the scores again
    assert flops.ours == pytest.approx(flops.torch, rel=0.05 if training and name == "deepseek_v3" else 0.015)


@pytest.mark.parametrize("name", HOSTS)
def test_a_step_of_muon_costs_what_its_layers_say(name):
    model = AutoModelForCausalLM.from_config(config_of(name))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with counted() as flops:
        Muon(layer_matrices(model), lr=1e-3).step()
    assert flops.torch == body_products(empty_model(config_of(name))).orthogonal > 0


def test_a_step_with_its_loss_costs_what_torch_counts():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of("mistral"))
    ids, answers = torch.randint(0, 211, (2, 40)), torch.randn(80, 64)
    with counted() as flops:
        hidden = final_hidden(model, {"input_ids": ids}).flatten(0, 1)
        rows = HiddenRows(answers, Head(torch.randn(211, 64)))
        distillation_loss(hidden, model_head(model), rows).total.backward()
    assert flops.ours == pytest.approx(flops.torch, rel=0.015)


def test_frozen_weights_and_recomputed_activations_are_counted_as_such():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of("mistral"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name or "embed" in name)
    model.train()
    model.gradient_checkpointing_enable()
    ids = torch.randint(0, 211, (2, 40))
    with counted() as flops:
        final_hidden(model, {"input_ids": ids}).square().sum().backward()
    assert flops.ours == pytest.approx(flops.torch, rel=0.015)


def test_an_empty_model_has_the_same_products():
    config = config_of("qwen3")
    full = body_products(AutoModelForCausalLM.from_config(config))
    assert body_products(empty_model(config)) == full
