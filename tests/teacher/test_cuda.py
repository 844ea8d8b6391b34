"""On a CUDA device: bf16, every backend, spilled or not, near the fp32 reference."""

import pytest
import torch

from moe2dense.teacher.load import load_teacher
from moe2dense.teacher.routing import RoutingStats
from tests.teacher.families import blocks, make

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "llama4_text"])
@pytest.mark.parametrize("gpu_memory", ["auto", "17MB"])
def test_near_the_reference(name, gpu_memory, tmp_path):
    reference = make(name, tmp_path, hidden_size=32)
    ids = blocks(reference)
    teacher = load_teacher(tmp_path, gpu_memory=gpu_memory, device="cuda")
    assert teacher.dtype == torch.bfloat16
    stats = RoutingStats(neurons=True)
    out, want = teacher.run(ids, observers=[stats]).logits, reference(ids).logits
    agree = (out.float().argmax(-1) == want.argmax(-1)).float().mean()
    assert agree > 0.8 and all(int(s.tokens) == ids.numel() for s in stats.layers.values())
