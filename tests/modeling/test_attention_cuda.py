"""On a CUDA device: torch's kernels through tiles against dense masks, values and gradients, under autocast and without."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe2dense.data.blocks import Blocks
from moe2dense.modeling.attention import attention_setting, use_attention
from moe2dense.modeling.forward import final_hidden, model_inputs
from tests.teacher.families import tiny_sizes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
LENGTH = 1100
# widths of heads that torch's kernels take; windows, sinks, latent attention
SIZES = {
    "mixtral": {"head_dim": 32, "hidden_size": 64},
    "gpt_oss": {"head_dim": 32, "hidden_size": 64},
    "deepseek_v3": {"hidden_size": 64, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 16, "head_dim": 8},
}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("family", sorted(SIZES))
def test_kernels_give_what_dense_masks_give(family, half):
    config = AutoConfig.for_model(family, **tiny_sizes(family, **SIZES[family], max_position_embeddings=2048))
    torch.manual_seed(0)
    model, device = AutoModelForCausalLM.from_config(config, dtype=torch.float32).cuda(), torch.device("cuda", 0)
    model.set_experts_implementation("eager")
    documents = (torch.arange(LENGTH) // 300).expand(2, -1)
    inputs = model_inputs(Blocks(torch.randint(3, 101, (2, LENGTH)), document_ids=documents), device)
    results = {}
    for setting in ("sdpa", "auto"):
        model.zero_grad()
        with attention_setting(setting), torch.autocast("cuda", torch.bfloat16, enabled=half):
            assert ("moe2dense" in use_attention(model, device)) == (setting == "auto")
            hidden = final_hidden(model, inputs)
        hidden.float().square().mean().backward()
        layer = model.model.layers[0].self_attn
        results[setting] = [hidden.detach().float(), layer.o_proj.weight.grad.clone()]
    for got, want in zip(results["auto"], results["sdpa"], strict=True):
        assert float((got - want).norm() / want.norm()) < (0.05 if half else 0.01)
