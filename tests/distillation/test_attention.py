"""Training on packed documents goes the same way through tiles as through dense masks."""

import pytest
import torch

from moe2dense.data.blocks import Blocks
from moe2dense.distillation.api import distill
from moe2dense.modeling.attention import attention_setting
from tests.distillation.tiny_run import make_blocks, make_student, make_teacher, settings, weights


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"lora": 2}], ids=str)
def test_training(options):
    ids = make_blocks(6, 150).input_ids
    packed, runs = Blocks(ids, document_ids=(torch.arange(150) // 41).expand(6, -1)), {}
    for setting in ("sdpa", "flex"):
        student = make_student(torch.float64, max_position_embeddings=256)
        teacher = make_teacher(torch.float64)
        with attention_setting(setting):
            config = settings(batch=300, micro_batch=2, epochs=1.0, **options)
            result = distill(student, teacher, packed, valid=packed, config=config)
        assert ("moe2dense" in student.config._attn_implementation) == (setting == "flex")
        runs[setting] = [r["loss"] for r in result.history if r["loss"]], weights(student)
    (dense, ours), (losses, through_tiles) = runs["sdpa"], runs["flex"]
    assert losses == pytest.approx(dense, rel=1e-8) and len(losses) >= 3
    for name, value in ours.items():
        torch.testing.assert_close(through_tiles[name], value, rtol=1e-6, atol=1e-7)
