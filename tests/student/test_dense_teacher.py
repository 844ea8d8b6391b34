"""A dense teacher: its FFN counts as one expert, and students are built from it as from an MoE."""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from moe2dense.config.schema import BuildConfig
from moe2dense.data.blocks import Blocks
from moe2dense.errors import UserError
from moe2dense.student.build.api import build_student
from moe2dense.student.dense_teacher import OneExpert, dense_geometry, single_expert
from moe2dense.teacher.load import load_teacher
from moe2dense.teacher.routing import RoutingStats

SIZES = dict(
    vocab_size=67, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=128, max_position_embeddings=64, tie_word_embeddings=False,
)  # fmt: skip
FAMILIES = {"mistral": (MistralConfig, MistralForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}


def dense(kind, folder, live=None):
    """A dense model on disk; only the FFN neurons `live` write anything."""
    config, model = FAMILIES[kind]
    torch.manual_seed(3)
    dense_model = model(config(**SIZES)).eval()
    if live is not None:
        with torch.no_grad():
            for layer in dense_model.model.layers:
                dead = torch.ones(128, dtype=torch.bool)
                dead[live] = False
                layer.mlp.down_proj.weight[:, dead] = 0
    dense_model.save_pretrained(folder)
    return dense_model


def blocks(n=6, s=17):
    return Blocks(torch.randint(0, 67, (n, s), generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("init", ["select", "obs+refit"])
def test_the_neurons_that_write_are_kept(tmp_path, kind, init):
    live = torch.randperm(128, generator=torch.Generator().manual_seed(1))[:61].sort().values
    model = dense(kind, tmp_path, live)
    size = sum(p.numel() for p in model.parameters()) - 3 * 3 * 32 * 64  # 64 of 128 neurons
    student = build_student(load_teacher(tmp_path), str(size), blocks(), init, config=BuildConfig(ridge=1e-9))
    assert type(student.model) is type(model) and student.model.config.intermediate_size == 64
    for provenance in student.provenance:
        assert set(live.tolist()) <= set(provenance.source_neuron.tolist()) and set(
            provenance.source_expert.tolist()
        ) <= {0, -2}
        assert provenance.energy_kept == pytest.approx(provenance.energy_total)
    ids = blocks(3, 11).input_ids
    with torch.no_grad():
        torch.testing.assert_close(student.model(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_statistics_are_those_of_one_expert_that_takes_every_token(tmp_path):
    model, routing = dense("mistral", tmp_path), RoutingStats(neurons=True)
    text = blocks()
    mask = torch.ones_like(text.input_ids)
    mask[2, 9:] = 0
    inputs = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(text.input_ids, attention_mask=mask)
    for layer_pass in load_teacher(tmp_path).stream(text.input_ids, mask):
        view = single_expert(layer_pass, routing)
        assert view.sparse and len(view.experts) == 1 and single_expert(view, routing) is view
        x, mlp = inputs[layer_pass.index][mask.bool()], model.model.layers[layer_pass.index].mlp
        hidden = torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
        stats = routing[layer_pass.index]
        torch.testing.assert_close(
            stats.neuron_energy[0], hidden.detach().double().square().sum(0), rtol=1e-4, atol=1e-8
        )
        assert stats.alpha.tolist() == [1.0] and int(stats.tokens) == int(mask.sum())
    with pytest.raises(IndexError):
        OneExpert(view.experts[0])[1]


def test_sizes_and_refusals(tmp_path):
    model = dense("mistral", tmp_path)
    shape = dense_geometry(model.config)
    assert shape.parameters == sum(p.numel() for p in model.parameters()) and shape.expert_width == 128
    with pytest.raises(UserError, match="lie outside its FFNs"):
        build_student(load_teacher(tmp_path), "5%", blocks(), "select")
