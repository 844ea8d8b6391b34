"""A streamed teacher and the layers of a student under construction attend through tiles as through dense masks."""

import pytest
import torch

from moe2dense.data.blocks import Blocks
from moe2dense.errors import UserError
from moe2dense.families.cards import student_host, teacher_cards
from moe2dense.modeling.attention import attention_setting
from moe2dense.modeling.forward import model_inputs
from moe2dense.student.build.layer_runner import LayerRunner
from moe2dense.teacher.load import load_teacher
from tests.teacher.families import blocks, make

# windows; latent attention; sinks, and documents that its own forward does not part; chunks; two widths of heads
FEW = ("mixtral", "deepseek_v3", "gpt_oss", "llama4_text", "gemma4_text")
LENGTH = 150


def text(model):
    documents = (torch.arange(LENGTH) // 43).expand(3, -1).clone()
    documents[1] = 0
    return blocks(model, 3, LENGTH), documents


@pytest.mark.parametrize("family", FEW)
def test_a_streamed_teacher(family, tmp_path):
    ids, documents = text(make(family, tmp_path, max_position_embeddings=256))
    hidden = {}
    for setting in ("sdpa", "flex"):
        with attention_setting(setting):
            teacher = load_teacher(tmp_path, memory="1GB")
            hidden[setting] = teacher.run(ids, document_ids=documents, logits=False).hidden_states
            assert ("moe2dense" in teacher.model.config._attn_implementation) == (setting == "flex")
    torch.testing.assert_close(hidden["flex"], hidden["sdpa"], rtol=1e-4, atol=2e-5)


def test_a_teacher_without_tiles_is_refused_when_it_is_opened(tmp_path):
    make("olmoe", tmp_path)
    with attention_setting("flex"), pytest.raises(UserError, match="OlmoeForCausalLM has no flex attention"):
        load_teacher(tmp_path)


def test_a_students_layers(tmp_path):
    model = make("mixtral", tmp_path, max_position_embeddings=256)
    ids, documents = text(model)
    inputs = model_inputs(Blocks(ids, document_ids=documents))
    runner = LayerRunner(model, student_host(teacher_cards()["mixtral"].host), ids, position_ids=inputs["position_ids"])
    states, outputs = runner.embed(), {}
    for setting in ("sdpa", "flex", "sdpa"):  # masks of one way do not meet the other
        with attention_setting(setting):
            outputs[setting] = runner.run(1, states)
            assert runner.mask_use().tiles == (setting == "flex")
    torch.testing.assert_close(outputs["flex"], outputs["sdpa"], rtol=1e-4, atol=2e-5)
