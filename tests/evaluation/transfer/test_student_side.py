"""A student's FFN is fed what its own norm makes of the teacher's residual stream, in every family and in half precision."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moe2dense.data.blocks import Blocks
from moe2dense.errors import UserError
from moe2dense.evaluation.transfer.coverage import random_ffn
from moe2dense.evaluation.transfer.student_side import FFNInput, StudentLayer, residual_streams
from moe2dense.families.cards import student_host
from moe2dense.teacher.load import load_teacher
from tests.teacher.families import FAMILIES, blocks, make


def llama(**sizes):
    torch.manual_seed(0)
    shape = dict(vocab_size=53, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=31)
    return LlamaForCausalLM(LlamaConfig(**{**shape, "initializer_range": 0.3, **sizes})).eval()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_norm_of_the_card_makes_the_teachers_own_ffn_input_of_its_residual(family, tmp_path):
    model = make(family, tmp_path)
    teacher = load_teacher(tmp_path, device="cpu", experts="streamed")
    card = student_host(teacher.card.host)
    config = model.config.get_text_config()
    multiplier = float(getattr(config, card.join_multiplier)) if card.join == "scaled" else 1.0
    for layer in teacher.stream(blocks(model)):
        # the teacher's decoder layer stands for a student's: both have the same children but for the FFN
        student = StudentLayer(layer.module, replace(card, ffn=teacher.card.moe_block), multiplier)
        assert (student.norm is None) == (not card.norm)
        rows = torch.arange(0, len(layer.x), 3)
        torch.testing.assert_close(FFNInput(layer, student).at(rows), layer.x[rows], rtol=1e-3, atol=1e-4)
        names = ("hidden_in", "hidden_out", "x", "y")
        half = replace(layer, **{name: getattr(layer, name).bfloat16() for name in names})
        error = (FFNInput(half, student).at(rows).float() - layer.x[rows]).norm() / layer.x[rows].norm()
        assert error < 0.02, (layer.index, error)


def test_a_norm_that_is_not_there_is_named():
    layer = llama().model.layers[0]
    with pytest.raises(UserError, match="no norm 'other'.*post_attention_layernorm"):
        StudentLayer(layer, replace(student_host("llama"), norm="other"))


def test_streams_are_gathered_in_batches():
    model = llama()
    seen = []
    model.model.layers[0].register_forward_hook(lambda _module, args, _output: seen.append(len(args[0])))
    data = Blocks(torch.randint(0, 53, (11, 9), generator=torch.Generator().manual_seed(1)))
    at = torch.tensor([0, 4, 8])
    streams = residual_streams(model, data, at, batch=4)
    assert seen == [4, 4, 3]
    with torch.no_grad():
        whole = model(data.input_ids, output_hidden_states=True).hidden_states
    for i in (0, 1):  # after the last layer transformers gives the normed state
        torch.testing.assert_close(streams[i], whole[i + 1][:, at].flatten(0, 1))
    with torch.no_grad():
        torch.testing.assert_close(model.model.norm(streams[2]), whole[3][:, at].flatten(0, 1))


def test_one_random_ffn_takes_the_spread_of_any_expert(tmp_path):
    make("mixtral", tmp_path)
    teacher = load_teacher(tmp_path, device="cpu", experts="streamed")
    layer = next(iter(teacher.stream(torch.arange(3, 40)[None])))
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(1))
    random = random_ffn(19, 24, torch.Generator().manual_seed(5))
    for expert in (layer.experts[0], layer.experts[3]):
        gate, up = expert.gate.std() * random.gate, expert.up.std() * random.up
        wanted = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
        torch.testing.assert_close(random.features(x, expert), wanted)
    assert random.gate.std() == pytest.approx(1, rel=0.1) and not torch.equal(random.gate, random.up)
