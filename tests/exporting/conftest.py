"""Tiny dense models of every host architecture, random enough that no tensor equals another."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-mixtral"
COMMON = {
    "vocab_size": 97, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 40, "max_position_embeddings": 64, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 7321.0}, "rms_norm_eps": 2.3e-3, "norm_eps": 2.3e-3,
}  # fmt: skip
HOSTS = {
    "mistral": {"sliding_window": None, "rms_norm_eps": 3e-5},
    "llama": {"rms_norm_eps": 3e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 10, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "olmo2": {"rms_norm_eps": 1e-5},
    "granite": {
        "embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.4, "logits_scaling": 2.0,
    },
    "ernie4_5": {"tie_word_embeddings": True, "head_dim": 6},
    "hunyuan_v1_dense": {"head_dim": 8, "tie_word_embeddings": True},
    "lfm2": {
        "block_auto_adjust_ff_dim": False, "tie_word_embeddings": True,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "cohere2": {"logit_scale": 0.3, "tie_word_embeddings": True, "sliding_window": 8, "num_hidden_layers": 5},
    "youtu": {
        "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6,
        "v_head_dim": 6, "pad_token_id": None,
    },
}  # fmt: skip


def tiny(host: str, seed: int = 0, **fields) -> PreTrainedModel:
    """A random model of a host architecture; norms and biases are random too, so a lost one shows."""
    fields = copy.deepcopy({**COMMON, **HOSTS.get(host, {}), **fields})  # a config completes its RoPE fields in place
    config = AutoConfig.for_model(host, **fields)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.copy_((torch.rand_like(p) + 0.5) if "norm" in name else torch.randn_like(p) * 0.1)
            else:
                p.copy_(torch.randn_like(p) / p.shape[-1] ** 0.5)
    return model


@pytest.fixture
def example() -> Path:
    return EXAMPLE


@pytest.fixture(scope="session")
def student() -> PreTrainedModel:
    """A random dense Mistral with the example teacher's vocabulary, so that its tokenizer fits."""
    return tiny("mistral", vocab_size=4096, hidden_size=48, max_position_embeddings=256)
