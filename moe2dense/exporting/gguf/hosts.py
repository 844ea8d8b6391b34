"""List what GGUF calls each dense host: the architecture's name, its keys, and how its rotary pairs lie.

Names and keys: the `gguf` package's constants. `interleaved`: llama.cpp rotates neighbouring pairs for this architecture
while transformers rotates halves, so the rows of Q and K are reordered.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class GgufHost:
    """One architecture of GGUF."""

    arch: str
    interleaved: bool = False
    norm: str = "layer_norm_rms_eps"
    eps: str = "rms_norm_eps"
    # GGUFWriter's method, without `add_`: config field of the student, or a number
    keys: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    # the linear layer whose rows count the FFN's neurons
    width: str = "mlp.up_proj"
    # n: every n-th layer sees all, the others a window, as the architecture fixes it
    sliding_every: int = 0
    # layers may be short convolutions, which have no KV heads
    conv: bool = False
    # its one expert is stacked: halves (gate above up) or neighbours (gate and up alternate); "" for a dense FFN
    experts: str = ""
    # all layers are leading dense ones of an MoE architecture
    dense_lead: bool = False
    # the router gates by sigmoid
    sigmoid: bool = False
    # its norms of queries and keys are of all heads, as many for both
    equal_heads: bool = False
    # multi-head latent attention
    latent: bool = False
    # a part of each head may be rotated
    partial: bool = False
    # linear layers whose biases llama.cpp reads; a file with others does not load there
    biases: tuple[str, ...] = ()


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_FFN = ("gate_proj", "up_proj", "down_proj")
# no layer has experts, but the architecture's loader asks how many there would be
_DEEPSEEK: dict[str, str | int | float | bool] = {
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_count": "n_shared_experts",
    "expert_weights_scale": "routed_scaling_factor",
}
_YOUTU: dict[str, str | int | float | bool] = {
    "expert_count": 1,
    "expert_used_count": 1,
    "expert_feed_forward_length": "intermediate_size",
    "expert_shared_count": 1,
    "expert_weights_scale": 1.0,
}

HOSTS: dict[str, GgufHost] = {
    "llama": GgufHost("llama", interleaved=True, biases=_ATTENTION + _FFN),
    "mistral": GgufHost("llama", interleaved=True, biases=_ATTENTION + _FFN),
    "granite": GgufHost(
        "granite",
        interleaved=True,
        biases=_ATTENTION + _FFN,
        keys={
            "attention_scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
    ),
    "qwen2": GgufHost("qwen2", biases=("q_proj", "k_proj", "v_proj")),
    "qwen3": GgufHost("qwen3"),
    "olmo2": GgufHost("olmo2"),
    "ernie4_5": GgufHost("ernie4_5"),
    "hunyuan_v1_dense": GgufHost("hunyuan-dense"),
    "lfm2": GgufHost(
        "lfm2", eps="norm_eps", keys={"shortconv_l_cache": "conv_L_cache"}, width="feed_forward.w1", conv=True
    ),
    "cohere2": GgufHost(
        "cohere2",
        norm="layer_norm_eps",
        eps="layer_norm_eps",
        keys={"logit_scale": "logit_scale", "sliding_window": "sliding_window"},
        sliding_every=4,
    ),
    "olmoe": GgufHost(
        "olmoe",
        experts="halves",
        equal_heads=True,
        keys={"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"},
    ),
    "minimax_m2": GgufHost(
        "minimax-m2",
        experts="halves",
        sigmoid=True,
        partial=True,
        keys={
            "expert_count": "num_local_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "intermediate_size",
        },
    ),
    "gpt_oss": GgufHost(
        "gpt-oss",
        experts="neighbours",
        sliding_every=2,
        biases=(*_ATTENTION, "router", "experts"),
        keys={
            "expert_count": "num_local_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "intermediate_size",
            "sliding_window": "sliding_window",
        },
    ),
    "glm4_moe": GgufHost(
        "glm4moe",
        dense_lead=True,
        sigmoid=True,
        partial=True,
        biases=("q_proj", "k_proj", "v_proj"),
        keys={
            "expert_count": "n_routed_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_count": "n_shared_experts",
            "expert_weights_scale": "routed_scaling_factor",
        },
    ),
    "deepseek_v2": GgufHost("deepseek2", dense_lead=True, latent=True, keys=_DEEPSEEK),
    "deepseek_v3": GgufHost("deepseek2", dense_lead=True, latent=True, keys=_DEEPSEEK),
    "youtu": GgufHost("deepseek2", dense_lead=True, latent=True, keys=_YOUTU),
}
