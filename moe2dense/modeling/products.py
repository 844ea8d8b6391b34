"""Count the matrix products of a transformers model: from its parameters, on any device, the meta device too.

A parameter of two dimensions or more is multiplied with every token once, except the embedding, which is looked up, and the experts
of an MoE, of which a token passes some. Attention multiplies every pair of tokens of a block. Mixers without pairs (convolutions,
linear attention) count with their projections alone.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from torch import Tensor, nn
from transformers import PreTrainedConfig

from moe2dense.common.counters import count_flops
from moe2dense.common.flops import ATTENTION_BACKWARD, BACKWARD, product
from moe2dense.families.fields import config_field
from moe2dense.modeling.decoder import decoder_layers
from moe2dense.modeling.kinds import without_adapters

# N blocks, S block length
NEWTON_SCHULZ = 5  # steps
_WITHOUT_PAIRS = ("conv", "linear_attention", "mamba")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Products:
    """What a part of a model multiplies. weights: numbers that every token is multiplied with, `trained` of them with a gradient.

    pairs: FLOPs of attention for a pair of tokens. last: numbers of the layers' last matrices, whose products are not made again
    where activations are computed again (nothing that follows them needs their inputs). orthogonal: FLOPs of one step of Muon.
    """

    weights: int
    trained: int = 0
    pairs: int = 0
    last: int = 0
    orthogonal: int = 0

    def forward(self, blocks: int, length: int) -> float:
        """Return the FLOPs of a forward pass over [blocks, length] tokens."""
        return product(blocks * length, 1, self.weights) + float(self.pairs) * blocks * length**2

    def backward(self, blocks: int, length: int) -> float:
        """Return the FLOPs of the backward pass, whose gradients reach the inputs."""
        tokens = blocks * length
        return (
            product(tokens, 1, self.weights)
            + (BACKWARD - 1) * product(tokens, 1, self.trained)
            + ATTENTION_BACKWARD * self.pairs * blocks * length**2
        )

    def step(self, blocks: int, length: int, again: bool = False) -> float:
        """Return the FLOPs of a forward and a backward pass; `again`: activations are computed again for the backward pass."""
        once = self.forward(blocks, length)
        repeated = once - product(blocks * length, 1, self.last) if again else 0.0
        return once + repeated + self.backward(blocks, length)

    def __add__(self, other: "Products") -> "Products":
        return Products(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def multiplied(parameter: Tensor, config: PreTrainedConfig) -> int:
    """Return how many numbers of a parameter a token is multiplied with: those of the experts it passes, or all of a matrix."""
    if parameter.dim() < 2:
        return 0
    text = config.get_text_config()
    experts = next((n for name in _EXPERTS if isinstance(n := config_field(text, name), int) and n), 0)
    passed = config_field(text, "num_experts_per_tok") or 1
    if parameter.dim() == 3 and experts > 1 and len(parameter) == experts and isinstance(passed, int):
        return parameter.numel() // experts * passed
    return parameter.numel()


def orthogonal_flops(shape: Sequence[int]) -> int:
    """Return the FLOPs in which Muon makes a matrix of this shape orthogonal, in five steps of Newton and Schulz."""
    few, many = sorted(shape)
    return NEWTON_SCHULZ * (4 * few * few * many + 2 * few**3)


def pair_flops(config: PreTrainedConfig, index: int) -> int:
    """Return the FLOPs of attention in layer `index` for a pair of tokens: scores and the mean of the values, over all heads."""
    text = config.get_text_config()
    kinds = config_field(text, "layer_types")
    if kinds and any(kinds[index].startswith(name) for name in _WITHOUT_PAIRS):
        return 0
    heads = _of_layer(text, "num_attention_heads", index)
    if config_field(text, "kv_lora_rank"):  # latent attention: keys and values of their own widths
        widths = (_of_layer(text, name, index) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        return 2 * heads * sum(widths)
    return 4 * heads * (_of_layer(text, "head_dim", index) or text.hidden_size // max(1, heads))


def _of_layer(config: PreTrainedConfig, name: str, index: int) -> int:
    """Return a size of layer `index`, where a config may list one for each layer; 0 where it has none."""
    value = config_field(config, name, 0)
    value = value[index] if isinstance(value, (list, tuple)) else value
    return value if isinstance(value, int) else 0


def layer_products(
    layer: nn.Module, config: PreTrainedConfig, index: int, without: nn.Module | None = None
) -> Products:
    """Return what a decoder layer multiplies, apart from the submodule `without`."""
    left_out = {id(p) for p in without.parameters()} if without is not None else set()
    weights = [(p, multiplied(p, config)) for p in layer.parameters() if id(p) not in left_out]
    trained = sum(number for p, number in weights if p.requires_grad)
    last = next((number for _, number in reversed(weights) if number), 0)
    matrices = [p.shape for p, _ in weights if p.dim() == 2 and p.requires_grad]
    orthogonal = sum(orthogonal_flops(shape) for shape in matrices)
    return Products(sum(number for _, number in weights), trained, pair_flops(config, index), last, orthogonal)


def body_products(model: nn.Module) -> Products:
    """Return what all layers of a dense model multiply; not the head."""
    config = without_adapters(model).config
    total = Products(0)
    for index, layer in enumerate(decoder_layers(model)):
        total += layer_products(layer, config, index)
    return total


def recomputes(model: nn.Module) -> bool:
    """Return whether a model computes its layers' activations again for the backward pass, where it trains."""
    return any(bool(getattr(layer, "gradient_checkpointing", False)) for layer in decoder_layers(model))


def count_pass(
    products: Products, blocks: int, length: int, device: str, grad: bool = False, again: bool = False
) -> None:
    """Count a forward pass over [blocks, length] tokens; with `grad` its backward pass too, before which `again` repeats it."""
    count_flops(products.step(blocks, length, again) if grad else products.forward(blocks, length), device)
