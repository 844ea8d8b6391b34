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
    # GGUFWriter's method, without `add_`: config field of the student
    keys: Mapping[str, str] = field(default_factory=dict)
    # the linear layer whose rows count the FFN's neurons
    width: str = "mlp.up_proj"
    # n: every n-th layer sees all, the others a window, as the architecture fixes it
    sliding_every: int = 0
    # layers may be short convolutions, which have no KV heads
    conv: bool = False
    # linear layers whose biases llama.cpp reads; a file with others does not load there
    biases: tuple[str, ...] = ()


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_FFN = ("gate_proj", "up_proj", "down_proj")

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
}
