"""Make small random models of a family's own config: every kind of layer, all settings, sizes cut, so that rules can be tried out."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from moe2dense.errors import UserError
from moe2dense.families.cards import TeacherCard
from moe2dense.families.fields import config_field

_VOCABULARY, _WIDTH, _EXPERTS, _TOP_K = 96, 16, 4, 2
_HEAD_DIM, _WINDOW, _CHUNK = 16, 7, 8
# fields of multi-head latent, linear and convolutional mixers, and their small sizes
_MIXER_SIZES = {
    "kv_lora_rank": 12, "q_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 5,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
_WIDTHS = (
    "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
    "intermediate_size_mlp", "moe_shared_expert_intermediate_size",
)  # fmt: skip
_GROUPS = ("n_group", "topk_group")
_NOT_PASSED = ("model_type", "transformers_version", "architectures", "quantization_config", "auto_map", "qk_head_dim")


def small_config(config: PreTrainedConfig, card: TeacherCard | None) -> PreTrainedConfig:
    """Return a config like this one with its sizes cut: few layers of every kind, heads, experts and tokens.

    What is no size stays as it is: RoPE, norms, multipliers, kinds of layers. Windows become shorter than a short text.
    """
    config = config.get_text_config()
    fields = {
        name: config_field(config, name, value) for name, value in config.to_dict().items()
    }  # to_dict writes infinity as JSON does
    fields = {k: copy.deepcopy(v) for k, v in fields.items() if k not in _NOT_PASSED and not k.startswith("_")}
    layers = config.num_hidden_layers
    count = _enough_layers(fields, layers, card, config)
    for name, value in fields.items():
        if isinstance(value, list) and len(value) == layers:
            fields[name] = value[:count]
    if by_layer := fields.get("per_layer_config"):
        fields["per_layer_config"] = {int(layer): own for layer, own in by_layer.items() if int(layer) < count}
    fields |= {"num_hidden_layers": count, "vocab_size": _VOCABULARY, "pad_token_id": None}
    fields |= {"bos_token_id": 1, "eos_token_id": 2, "dtype": None}
    fields |= _heads(config) | _mixers(config) | _windows(fields)
    if card is not None:
        fields |= _experts(config, card, count)
    _cut_rope(fields, config)
    return type(config)(**fields)


def _enough_layers(fields: dict[str, Any], layers: int, card: TeacherCard | None, config: PreTrainedConfig) -> int:
    """Return how many of the first layers hold one of every kind that the config's lists tell apart, and a sparse one."""
    lists = [v for v in fields.values() if isinstance(v, list) and len(v) == layers and v != list(range(layers))]
    kinds = [str(kind) for kind in zip(*lists, strict=True)] if lists else [""] * layers
    last_new = max(kinds.index(kind) for kind in kinds)
    dense = 0
    for name in ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"):
        dense = max(dense, int(getattr(config, name, 0) or 0))
    step = max(int(getattr(config, n, 1) or 1) for n in ("decoder_sparse_step", "interleave_moe_layer_step"))
    return min(layers, max(2, last_new + 1, dense + 1, step))


def _heads(config: PreTrainedConfig) -> dict[str, Any]:
    """Return small numbers of heads with the same sharing of keys, and a hidden size that is their product where it was."""
    heads = config.num_attention_heads
    groups = config_field(config, "num_key_value_heads") or heads
    small_groups = min(groups, 2)
    small_heads = small_groups * min(heads // groups, 2)
    given = config_field(config, "head_dim")
    width = min(given or config.hidden_size // heads, _HEAD_DIM)
    hidden = small_heads * width + (0 if config.hidden_size == heads * (given or width) or not given else 8)
    fields: dict[str, Any] = {"num_attention_heads": small_heads, "hidden_size": hidden}
    if config_field(config, "num_key_value_heads"):
        fields["num_key_value_heads"] = small_groups
    return fields | ({"head_dim": width} if given else {})


def _mixers(config: PreTrainedConfig) -> dict[str, Any]:
    """Return small sizes for the mixers that have some of their own."""
    fields: dict[str, Any] = {name: size for name, size in _MIXER_SIZES.items() if getattr(config, name, None)}
    if "qk_rope_head_dim" in fields:
        fields["head_dim"] = fields["qk_rope_head_dim"]
        fields["num_key_value_heads"] = _heads(config)["num_attention_heads"]
    if getattr(config, "mamba_n_heads", None):
        width, groups = config.mamba_expand * _heads(config)["hidden_size"], min(config.mamba_n_groups, 2)
        fields |= {"mamba_n_heads": 2, "mamba_d_head": width // 2, "mamba_n_groups": groups, "mamba_d_state": 8}
    if getattr(config, "linear_num_key_heads", None):
        share = config.linear_num_value_heads // config.linear_num_key_heads
        fields |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2 * share}
    return fields


def _windows(fields: dict[str, Any]) -> dict[str, Any]:
    """Return windows of attention that a text of a few dozen tokens is longer than."""
    small = {"sliding_window": _WINDOW, "attention_chunk_size": _CHUNK}
    return {name: size for name, size in small.items() if fields.get(name)}


def _experts(config: PreTrainedConfig, card: TeacherCard, layers: int) -> dict[str, Any]:
    """Return few, narrow experts. Raises UserError for a field that the card names and the config does not have."""
    for name in (card.num_experts, card.top_k, card.expert_width):
        if getattr(config, name, None) is None:
            raise UserError(
                f"teacher card {card.model_type}: the teacher's config has no field {name!r}; correct the card"
            )
    top_k = getattr(config, card.top_k)
    chosen = [min(_TOP_K, k) for k in top_k[:layers]] if isinstance(top_k, (list, tuple)) else min(_TOP_K, top_k)
    fields: dict[str, Any] = {card.num_experts: _EXPERTS, card.top_k: chosen}
    for name in (*_WIDTHS, card.expert_width):
        value = getattr(config, name, None)
        if value:
            fields[name] = [_WIDTH] * layers if isinstance(value, (list, tuple)) else _WIDTH
    return fields | {name: 1 for name in _GROUPS if getattr(config, name, None)}


def _cut_rope(fields: dict[str, Any], config: PreTrainedConfig) -> None:
    """Shorten the lists of a scaled RoPE, which have a number for each pair of a head's channels, and give it all of a small head."""
    rope = fields.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    width = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    for name in ("short_factor", "long_factor"):
        if isinstance(rope.get(name), list):
            rope[name] = rope[name][: max(1, int(width * rope.get("partial_rotary_factor", 1.0)) // 2)]
    if fields.get("rotary_dim"):
        fields["rotary_dim"] = int(width * rope.get("partial_rotary_factor", 1.0))


@torch.no_grad()
def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Return a causal language model of a config with random weights in float32, none of them zero or one; torch's own seed stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                small = value.dim() == 1
                value.normal_(0.0, 0.1 if small else 0.2)
                if small and "norm" in name and "bias" not in name:
                    value.add_(1.0)
    return model.eval().requires_grad_(False)


def random_text(config: PreTrainedConfig, blocks: int = 2, tokens: int = 29, seed: int = 0) -> Tensor:
    """Return random ids [blocks, tokens] of a small model's vocabulary, special tokens left out."""
    seeded = torch.Generator().manual_seed(seed)
    return torch.randint(3, config.vocab_size, (blocks, tokens), generator=seeded)


def relative_difference(value: Tensor, reference: Tensor) -> float:
    """Return the largest difference by the reference's largest magnitude; infinite where a value is not finite."""
    difference = float((value - reference).abs().max() / reference.abs().max().clamp(min=1e-30))
    return difference if difference == difference else float("inf")
