"""Tiny random models of every family, with awkward sizes, saved in their hub layout."""

import copy
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

# Odd expert counts, widths, rotary bases and epsilons wherever the family allows them, so that a default in their place shows;
# layers differ where the family has several kinds.
THETA, EPS = 12345.0, 3e-3
ROPE = {"rope_type": "default", "rope_theta": THETA}
BASE = {
    "vocab_size": 101, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": EPS, "norm_eps": EPS,
    "rope_parameters": ROPE,
}  # fmt: skip
MLA = {
    "num_key_value_heads": 4, "kv_lora_rank": 12, "q_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
    "v_head_dim": 5, "head_dim": 4,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": THETA, "factor": 4.0, "original_max_position_embeddings": 32}
BY_LAYER_TYPE = {
    "full_attention": {**ROPE, "partial_rotary_factor": 0.5}, "sliding_attention": {"rope_type": "default", "rope_theta": 321.0},
}  # fmt: skip
FAMILIES: dict[str, dict] = {
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 13, "sliding_window": 9},
    "qwen2_moe": {
        "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 11, "shared_expert_intermediate_size": 17,
        "intermediate_size": 19, "mlp_only_layers": [1], "norm_topk_prob": False, "qkv_bias": True,
    },
    "qwen3_moe": {
        "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 11, "intermediate_size": 19, "head_dim": 8,
        "norm_topk_prob": True, "mlp_only_layers": [0], "tie_word_embeddings": True, "rope_parameters": YARN,
    },
    "olmoe": {"num_experts": 7, "num_experts_per_tok": 3, "intermediate_size": 11, "clip_qkv": 0.5},
    # the norm after its FFN hides what a token's routing weights add up to, as far as the epsilon is small
    "flex_olmo": {"num_experts": 5, "num_experts_per_tok": 3, "intermediate_size": 11, "rms_norm_eps": 3e-5},
    "deepseek_v2": {
        **MLA, "n_routed_experts": 6, "n_shared_experts": 2, "num_experts_per_tok": 3, "moe_intermediate_size": 11,
        "intermediate_size": 19, "first_k_dense_replace": 1, "topk_method": "group_limited_greedy", "n_group": 3,
        "topk_group": 2, "routed_scaling_factor": 16.0,
    },
    "deepseek_v3": {
        **MLA, "n_routed_experts": 6, "n_shared_experts": 1, "num_experts_per_tok": 3, "moe_intermediate_size": 11,
        "intermediate_size": 19, "first_k_dense_replace": 1, "n_group": 3, "topk_group": 2,
        "routed_scaling_factor": 2.5, "norm_topk_prob": True, "q_lora_rank": None,
    },
    "gpt_oss": {
        "num_local_experts": 5, "num_experts_per_tok": 3, "intermediate_size": 12, "head_dim": 8, "sliding_window": 7,
        "rope_parameters": {**YARN, "truncate": False},
    },
    "phimoe": {
        "num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 13, "attention_bias": True,
        "lm_head_bias": True,
    },
    "granitemoe": {
        "num_local_experts": 5, "num_experts_per_tok": 3, "intermediate_size": 13, "tie_word_embeddings": True,
        "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.3, "logits_scaling": 2.0,
    },
    "granitemoeshared": {
        "num_local_experts": 5, "num_experts_per_tok": 3, "intermediate_size": 13, "shared_intermediate_size": 9,
        "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.3, "logits_scaling": 2.0,
    },
    "glm4_moe": {
        "n_routed_experts": 6, "n_shared_experts": 1, "num_experts_per_tok": 3, "moe_intermediate_size": 11,
        "intermediate_size": 19, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "head_dim": 8,
        "routed_scaling_factor": 1.7, "norm_topk_prob": True, "use_qk_norm": True, "attention_bias": True,
    },
    "llama4_text": {
        "num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 13, "intermediate_size_mlp": 19,
        "interleave_moe_layer_step": 2, "head_dim": 8, "num_hidden_layers": 4, "attention_chunk_size": 16,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 7, "moe_k": 3, "moe_intermediate_size": 11, "moe_num_shared_experts": 2,
        "intermediate_size": 19, "moe_layer_start_index": 1, "moe_layer_end_index": 2, "tie_word_embeddings": True,
    },
    "hunyuan_v1_moe": {
        "num_experts": 5, "moe_topk": [2, 3, 2], "intermediate_size": 13, "head_dim": 8, "tie_word_embeddings": True,
    },
    "dots1": {
        "n_routed_experts": 7, "n_shared_experts": 2, "num_experts_per_tok": 3, "moe_intermediate_size": 11,
        "intermediate_size": 19, "first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
        "head_dim": 8,
    },
    "lfm2_moe": {
        "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 11, "intermediate_size": 19,
        "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"], "tie_word_embeddings": True,
    },
    "minimax_m2": {
        "num_local_experts": 7, "num_experts_per_tok": 3, "intermediate_size": 11, "head_dim": 8, "rotary_dim": 4,
    },
    "qwen3_next": {
        "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 11, "shared_expert_intermediate_size": 9,
        "intermediate_size": 19, "head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_hidden_layers": 4, "norm_topk_prob": True,
    },
    "qwen3_5_moe_text": {
        "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 11, "shared_expert_intermediate_size": 9,
        "head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "num_hidden_layers": 4,
        "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]},
    },
    "glm4_moe_lite": {
        **MLA, "n_routed_experts": 6, "n_shared_experts": 1, "num_experts_per_tok": 3, "moe_intermediate_size": 11,
        "intermediate_size": 19, "n_group": 3, "topk_group": 2, "routed_scaling_factor": 1.8,
    },
    "laguna": {
        "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 11, "shared_expert_intermediate_size": 9,
        "intermediate_size": 19, "head_dim": 8, "sliding_window": 7, "moe_routed_scaling_factor": 2.5,
        "num_attention_heads_per_layer": [4, 6, 4], "rope_parameters": BY_LAYER_TYPE,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "mimo_v2_flash": {
        "n_routed_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 11, "intermediate_size": 19, "head_dim": 8,
        "v_head_dim": 6, "sliding_window": 7, "num_key_value_heads": 1, "rope_parameters": BY_LAYER_TYPE,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "hy_v3": {
        "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 11, "num_shared_experts": 2,
        "intermediate_size": 19, "head_dim": 8, "router_scaling_factor": 2.8,
    },
    "deepseek_v32": {
        **MLA, "n_routed_experts": 6, "n_shared_experts": 1, "num_experts_per_tok": 3, "moe_intermediate_size": 11,
        "intermediate_size": 19, "first_k_dense_replace": 1, "n_group": 3, "topk_group": 2, "index_topk": 6,
        "index_head_dim": 8, "index_n_heads": 32,  # scores of few heads are often zero, and ties are broken by place
    },
    "bailing_hybrid": {
        **MLA, "head_dim": 8, "num_local_experts": 6, "n_shared_experts": 1, "num_experts_per_tok": 3,
        "moe_intermediate_size": 11, "intermediate_size": 19, "first_k_dense_replace": 1, "n_group": 3, "topk_group": 2,
        "layer_group_size": 3, "q_lora_rank": None, "rope_theta": THETA,
    },
    "afmoe": {
        "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 11, "num_shared_experts": 2,
        "intermediate_size": 19, "head_dim": 8, "sliding_window": 7, "route_scale": 1.7, "mup_enabled": True,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "exaone_moe": {
        "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 11, "num_shared_experts": 2,
        "intermediate_size": 19, "head_dim": 8, "sliding_window": 7, "n_group": 3, "topk_group": 2,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "mellum": {
        "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 11, "intermediate_size": 19, "head_dim": 8,
        "sliding_window": 7, "mlp_layer_types": ["dense", "sparse", "sparse"],
        "rope_parameters": {"full_attention": ROPE, "sliding_attention": {**ROPE, "rope_theta": 321.0}},
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "cohere2_moe": {
        "num_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 13, "num_shared_experts": 2, "head_dim": 8,
        "expert_selection_fn": "sigmoid", "norm_topk_prob": False, "sliding_window": 7, "layer_norm_eps": EPS, "rms_norm_eps": None, "rope_theta": THETA,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "granitemoehybrid": {
        "num_local_experts": 5, "num_experts_per_tok": 3, "intermediate_size": 13, "shared_intermediate_size": 9,
        "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.3, "logits_scaling": 2.0,
        "position_embedding_type": "rope", "layer_types": ["mamba", "attention", "mamba"], "mamba_n_heads": 4,
        "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 8,
    },
    "granitemoe_swa": {
        "num_local_experts": 5, "num_experts_per_tok": 3, "intermediate_size": 13, "shared_intermediate_size": 9,
        "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.3, "logits_scaling": 2.0,
        "sliding_window": 7, "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "solar_open": {
        "n_routed_experts": 6, "n_shared_experts": 1, "num_experts_per_tok": 3, "moe_intermediate_size": 11, "n_group": 3,
        "topk_group": 2, "head_dim": 8, "routed_scaling_factor": 1.7,
    },
    "jamba": {
        "num_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 13, "num_hidden_layers": 4,
        "expert_layer_period": 2, "attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 5, "mamba_dt_rank": 3,
        "rope_parameters": None,
    },
    "minimax": {
        "num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 13, "head_dim": 8, "block_size": 8,
        "full_attn_alpha_factor": 1.3, "full_attn_beta_factor": 0.7, "linear_attn_alpha_factor": 0.9,
        "linear_attn_beta_factor": 1.1, "mlp_alpha_factor": 1.2, "mlp_beta_factor": 0.6,
    },
    "minimax_m3_vl_text": {
        "num_local_experts": 7, "num_experts_per_tok": 3, "intermediate_size": 11, "dense_intermediate_size": 19,
        "shared_intermediate_size": 9, "head_dim": 8, "rotary_dim": 4, "swiglu_limit": 1.0,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "gemma4_text": {
        "num_experts": 7, "top_k_experts": 3, "moe_intermediate_size": 11, "intermediate_size": 19, "head_dim": 8,
        "global_head_dim": 12, "num_global_key_value_heads": 1, "attention_k_eq_v": True, "enable_moe_block": True,
        "hidden_size_per_layer_input": 0, "sliding_window": 7, "rms_norm_eps": 3e-5, "final_logit_softcapping": 5.0, "tie_word_embeddings": True,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "rope_theta": THETA, "partial_rotary_factor": 0.5},
            "sliding_attention": {**ROPE, "rope_theta": 321.0},
        },
    },
    "flint": {
        "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 11, "shared_expert_intermediate_size": 9,
        "intermediate_size": 19, "head_dim": 8, "sliding_window": 7, "mlp_only_layers": [0],
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "sarvam_moe": {
        "n_routed_experts": 6, "n_shared_experts": 1, "num_experts_per_tok": 3, "moe_intermediate_size": 11,
        "intermediate_size": 19, "first_k_dense_replace": 1, "head_dim": 8, "routed_scaling_factor": 2.5,
    },
    "sarvam_mla": {
        **MLA, "n_routed_experts": 6, "n_shared_experts": 1, "num_experts_per_tok": 3, "moe_intermediate_size": 11,
        "intermediate_size": 19, "first_k_dense_replace": 1, "q_lora_rank": None,
    },
    "glm_moe_dsa": {
        **MLA, "n_routed_experts": 6, "n_shared_experts": 1, "num_experts_per_tok": 3, "moe_intermediate_size": 11,
        "intermediate_size": 19, "first_k_dense_replace": 1, "n_group": 3, "topk_group": 2, "index_topk": 6,
        "index_head_dim": 8, "index_n_heads": 32,
    },
}  # fmt: skip

# What gives every token the same routing weights where a family's do not add up to a constant: a setting, or a router of zeros.
CONSTANT_WEIGHTS: dict[str, dict] = {
    "qwen2_moe": {"norm_topk_prob": True}, "olmoe": {"norm_topk_prob": True}, "flex_olmo": {"norm_topk_prob": True},
    "cohere2_moe": {"norm_topk_prob": True},
}  # fmt: skip
ZERO_ROUTER = ("deepseek_v2", "jamba", "llama4_text", "phimoe")


def tiny_sizes(model_type: str, **changes) -> dict:
    """The family's row with these fields changed, as copies: some configs write into the RoPE parameters they are given."""
    return copy.deepcopy({**BASE, **FAMILIES.get(model_type, {}), **changes})


def make(model_type: str, folder: Path, seed: int = 0, alike: bool = False, **changes):
    """A random model of the family, saved in `folder` as the hub has it, and returned as the reference (fp32, eager experts).

    alike: all experts of a layer are the same, and their routing weights add up to a constant, so that a dense FFN of one
    expert's width (and the shared experts') computes exactly the same.
    """
    torch.manual_seed(seed)
    if alike:
        changes = CONSTANT_WEIGHTS.get(model_type, {}) | changes
    config = AutoConfig.for_model(model_type, **tiny_sizes(model_type, **changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, value in model.state_dict().items():  # biases and corrections too: zeros would hide what is left out
        if value.is_floating_point():
            value.normal_(0.0, 0.1 if "bias" in name or "norm" in name else 0.3)
            if "norm" in name and "bias" not in name:
                value.add_(1.0)
        if name.endswith("per_expert_scale"):
            value.abs_().add_(0.5)
    if alike:
        _make_alike(model, model_type in ZERO_ROUTER)
    model.save_pretrained(folder)
    model.set_experts_implementation("eager")
    return model.eval().requires_grad_(False)


def _make_alike(model, zero_router: bool) -> None:
    """Make every routed expert a copy of its layer's first, and what weighs experts constant."""
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if "experts" in parts and value.dim() > 1:
            value.copy_(value[:1].expand_as(value).clone())
        if parts[-1] == "per_expert_scale":
            value.fill_(1.3)
        if parts[-2] == "shared_expert_gate" or (zero_router and parts[-2] in ("gate", "router") and value.dim() == 2):
            value.zero_()


def blocks(model, n: int = 4, s: int = 23, seed: int = 0) -> torch.Tensor:
    """Random ids without the padding token."""
    return torch.randint(3, model.config.vocab_size, (n, s), generator=torch.Generator().manual_seed(seed))
