"""Packed documents do not see each other in any architecture, and what carries state along a block is refused by name."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe2dense.data.blocks import Blocks
from moe2dense.errors import UserError
from moe2dense.families.cards import student_host, teacher_cards
from moe2dense.modeling.documents import understands_positions
from moe2dense.modeling.forward import final_hidden, model_inputs
from moe2dense.student.target.dense_config import dense_config
from tests.teacher.families import FAMILIES, tiny_sizes

LENGTHS = ((7, 20, 4), (31,), (1, 30), (16, 15))  # windows and chunks of the tiny families are 7 to 16 tokens long


def random_model(config, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    model.set_experts_implementation("eager")
    for name, value in model.named_parameters():
        value.normal_(1.0 if "norm" in name and "bias" not in name else 0.0, 0.3)
    return model


def packed(seed=0):
    ids = torch.randint(3, 101, (4, 31), generator=torch.Generator().manual_seed(seed))
    return ids, torch.stack([torch.arange(len(n)).repeat_interleave(torch.tensor(n)) for n in LENGTHS])


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_each_document_is_read_as_if_alone(family, dense):
    config = AutoConfig.for_model(family, **tiny_sizes(family))
    if dense:
        config = dense_config(config, student_host(teacher_cards()[family].host), 13)
    model, (ids, documents) = random_model(config), packed()
    inputs = model_inputs(Blocks(ids, document_ids=documents))
    if not teacher_cards()[family].packing:
        with pytest.raises(UserError, match="carries state across document borders"):
            final_hidden(model, inputs)
        alone = final_hidden(model, model_inputs(Blocks(ids[1:2], document_ids=documents[1:2])))
        torch.testing.assert_close(alone, final_hidden(model, {"input_ids": ids[1:2]}))
        return
    hidden = final_hidden(model, inputs)
    for row, lengths in enumerate(LENGTHS):
        at = 0
        for n in lengths:
            want = final_hidden(model, {"input_ids": ids[row : row + 1, at : at + n]})[0]
            torch.testing.assert_close(hidden[row, at : at + n], want, rtol=1e-4, atol=2e-5)
            at += n


def test_masks_are_made_only_where_an_architecture_ignores_positions():
    known = {n: understands_positions(AutoConfig.for_model(n, **tiny_sizes(n))) for n in ("gpt_oss", "mixtral")}
    assert known == {"gpt_oss": False, "mixtral": True}


def test_gradients_pass_through_recomputed_layers_with_the_same_masks():
    config = AutoConfig.for_model("gpt_oss", **tiny_sizes("gpt_oss", num_local_experts=1, num_experts_per_tok=1))
    gradients = []
    for checkpointing in (False, True):
        model = random_model(config).requires_grad_(True).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids, documents = packed()
        final_hidden(model, model_inputs(Blocks(ids, document_ids=documents))).square().sum().backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
