"""Random students of every host in sizes that the stacks' kernels take, exported, with what transformers answers beside them."""

import copy
import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from moe2dense.exporting.api import export
from moe2dense.families.cards import student_host
from moe2dense.student.target.dense_config import dense_config

PROMPTS, NEW, TOP = 8, 12, 64
ROPE = {"rope_type": "default", "rope_theta": 12345.0}
BASE = {
    "vocab_size": 4096, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": 1e-5,
    "norm_eps": 1e-5, "rope_parameters": ROPE,
}  # fmt: skip
# a latent of 512 numbers and rotary heads of 64, as the public checkpoints have: vLLM's kernel for CPUs takes no other
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 512, "q_lora_rank": 48, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64,
    "v_head_dim": 64, "head_dim": 64, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "first_k_dense_replace": 1, "routed_scaling_factor": 1.0,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WINDOWS = {"sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"] * 2}
YARN = {
    "rope_type": "yarn", "rope_theta": 12345.0, "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
    "mscale": 0.707, "mscale_all_dim": 0.707,
}  # fmt: skip
WIDE = {
    "rope_type": "yarn", "rope_theta": 12345.0, "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32.0,
    "beta_slow": 1.0,
}  # fmt: skip
SCALED = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.3, "logits_scaling": 2.0}
BY_KIND = {"full_attention": ROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 321.0}}
# host -> (the family of its teacher, what of the family's config is not BASE)
HOSTS: dict[str, tuple[str, dict]] = {
    "mistral": ("mixtral", {"sliding_window": None}),
    "llama": ("mixtral", {"sliding_window": None}),
    "qwen2": ("qwen2_moe", {"qkv_bias": True, "hidden_size": 128}),
    "qwen3": ("qwen3_moe", {"tie_word_embeddings": True}),
    "olmo2": ("flex_olmo", {"hidden_size": 128}),
    "olmoe": ("olmoe", {"hidden_size": 128, "num_key_value_heads": 4}),
    "granite": ("granitemoe", {**SCALED, "tie_word_embeddings": True, "hidden_size": 128}),
    "ernie4_5": ("ernie4_5_moe", {"tie_word_embeddings": True}),
    "hunyuan_v1_dense": ("hunyuan_v1_moe", {"tie_word_embeddings": True}),
    "lfm2": ("lfm2_moe", {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "tie_word_embeddings": True, "hidden_size": 128}),
    "cohere2": ("cohere2", {"hidden_size": 128, "logit_scale": 0.3, "tie_word_embeddings": True, "sliding_window": 64, "layer_norm_eps": 1e-5}),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64, "rope_parameters": WIDE}),
    "phimoe": ("phimoe", {"attention_bias": True, "lm_head_bias": True, "hidden_size": 128}),
    "glm4_moe": ("glm4_moe", {"n_routed_experts": 4, "num_experts_per_tok": 2, "use_qk_norm": False, "attention_bias": True, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}),
    "minimax_m2": ("minimax_m2", {"rotary_dim": 16}),
    "llama4_text": ("llama4_text", {"intermediate_size_mlp": 48, "attention_chunk_size": 128}),
    "deepseek_v2": ("deepseek_v2", {**LATENT, "rope_parameters": YARN}),
    "deepseek_v3": ("deepseek_v3", LATENT),
    "youtu": ("deepseek_v3", {**LATENT, "pad_token_id": None}),
    "qwen3_next": (
        "qwen3_next",
        {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    ),
    "qwen3_5_text": (
        "qwen3_5_moe_text",
        {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    ),
    "glm4_moe_lite": ("glm4_moe_lite", LATENT),
    "afmoe": ("afmoe", {**EXPERTS, **WINDOWS, "num_shared_experts": 1, "mup_enabled": True}),
    "exaone_moe": ("exaone_moe", {**EXPERTS, **WINDOWS, "num_shared_experts": 1}),
    "granite_swa": ("granitemoe_swa", {**SCALED, **WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {**SCALED, "hidden_size": 128, "position_embedding_type": "rope", "layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 8, "mamba_d_state": 32, "mamba_n_groups": 1},
    ),
    "hy_v3": ("hy_v3", {**EXPERTS, "num_shared_experts": 1}),
    "jamba": (
        "jamba",
        {"hidden_size": 128, "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 16, "mamba_dt_rank": 8, "rope_parameters": None},
    ),
    "laguna": ("laguna", {**EXPERTS, **WINDOWS, "shared_expert_intermediate_size": 32, "rope_parameters": BY_KIND}),
    "mellum": ("mellum", {**EXPERTS, **WINDOWS, "rope_parameters": BY_KIND}),
    "gemma4_text": (
        "gemma4_text",
        {
            "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32, "intermediate_size": 48, "global_head_dim": 64, "num_global_key_value_heads": 2,
            "attention_k_eq_v": True, "enable_moe_block": True, "hidden_size_per_layer_input": 0, "tie_word_embeddings": True,
            "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2, "final_logit_softcapping": 30.0,
            "rope_parameters": {**BY_KIND, "full_attention": {"rope_type": "proportional", "rope_theta": 12345.0, "partial_rotary_factor": 0.5}},
        },
    ),
    "bailing_hybrid": ("bailing_hybrid", {**LATENT, "q_lora_rank": None, "layer_group_size": 2, "num_local_experts": 4, "rope_theta": 12345.0}),
    "flint": ("flint", {**EXPERTS, **WINDOWS, "shared_expert_intermediate_size": 32}),
}  # fmt: skip


def student(host: str):
    """A random dense model of a host, as a teacher of its family gives it its shape."""
    family, fields = HOSTS[host]
    known = AutoConfig.for_model(family).to_dict()
    base = {name: value for name, value in BASE.items() if name in known or name not in ("rms_norm_eps", "norm_eps")}
    teacher = AutoConfig.for_model(family, **copy.deepcopy({**base, **fields}))  # configs complete RoPE in place
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(dense_config(teacher.get_text_config(), student_host(host), 96)).float()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() == 1:
                value.copy_(1 + 0.2 * torch.randn_like(value) if "norm" in name else 0.1 * torch.randn_like(value))
            else:
                value.copy_(torch.randn_like(value) / value.shape[-1] ** 0.5)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head.mul_(4.0 if head is not model.get_input_embeddings().weight else 1.0)
    return model.eval()


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 4096, (5 + 3 * i,), generator=generator).tolist() for i in range(PROMPTS)]


@torch.no_grad()
def answers(model) -> dict:
    """What transformers says: greedy tokens after each prompt, and the likeliest tokens at every position of the longest."""
    greedy = []
    for ids in prompts():
        row = list(ids)
        for _ in range(NEW):
            row.append(int(model(torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
        greedy.append(row[len(ids) :])
    log_p = model(torch.tensor([prompts()[-1]]), use_cache=False).logits[0].double().log_softmax(-1)
    return {"prompts": prompts(), "greedy": greedy, "new": NEW, "top": TOP, "log_p": log_p[:-1].tolist()}


def write(host: str, folder: Path, tokenizer: Path) -> None:
    """Export a student of `host` to folder/host, with folder/host.json beside it."""
    model = student(host)
    export(model, folder / host, tokenizer=AutoTokenizer.from_pretrained(tokenizer), dtype="float32")
    reloaded = AutoModelForCausalLM.from_pretrained(folder / host, dtype=torch.float32)
    if student_host(host).experts:
        reloaded.set_experts_implementation("eager")
    (folder / f"{host}.json").write_text(json.dumps(answers(reloaded.eval())))


def kl(reference: dict, tops: list[dict[str, float]]) -> float:
    """Mean KL in nats from transformers to a stack, whose likeliest tokens are given at each position; the rest is one bucket."""
    total = 0.0
    for row, top in zip(reference["log_p"], tops, strict=True):
        p = torch.tensor(row, dtype=torch.float64).exp()
        ids = torch.tensor([int(i) for i in top])
        q = torch.tensor(list(top.values()), dtype=torch.float64).exp()
        rest_p, rest_q = (1 - p[ids].sum()).clamp(min=1e-12), (1 - q.sum()).clamp(min=1e-12)
        total += float((p[ids] * (p[ids].log() - q.log())).sum() + rest_p * (rest_p / rest_q).log())
    return max(0.0, total / len(tops))
