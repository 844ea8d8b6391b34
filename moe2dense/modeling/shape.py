"""Read a model's shape in numbers from its config, on the meta device: no weights are touched."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe2dense.errors import UserError
from moe2dense.families.cards import TeacherCard
from moe2dense.families.fields import config_field
from moe2dense.modeling.empty import count_parameters, empty_model

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

_DOWN_PROJECTIONS = ("down_proj", "w2", "output_linear")


@dataclass(frozen=True)
class Geometry:
    """Sizes of a teacher. Widths in neurons, counts in parameters."""

    model_type: str
    num_hidden_layers: int
    moe_layers: tuple[int, ...]  # indices of the sparse layers
    hidden_size: int
    vocab_size: int
    num_experts: int
    top_k: int
    expert_width: int
    shared_width: int  # neurons of the shared experts of one layer; 0 where there are none
    dense_width: int  # widest dense FFN among the non-sparse layers; 0 where there are none
    parameters: int
    active_parameters: int
    expert_parameters: int  # one expert of one layer
    max_positions: int
    num_attention_heads: int = 1
    num_key_value_heads: int = 1
    dense_weights: int = 0  # numbers outside routed experts that a token is multiplied with, over all layers
    pair_flops: int = 0  # FLOPs of attention for a pair of tokens, over all layers

    @property
    def active_width(self) -> int:
        """Neurons that one token passes in a sparse layer."""
        return self.top_k * self.expert_width + self.shared_width


def _width(module: "nn.Module") -> int:
    """Return the number of neurons of a dense gated FFN: the input width of its down projection; 0 where it has none."""
    for name, linear in module.named_modules():
        if name.split(".")[-1] in _DOWN_PROJECTIONS:
            return int(linear.in_features)  # type: ignore[arg-type]
    return 0


def _shared_width(layer: "nn.Module", card: TeacherCard) -> int:
    """Return the neurons of a layer's shared experts, which lie in its MoE block or beside it."""
    block = layer.get_submodule(card.moe_block)
    children = dict(block.named_children())
    owner = block if card.shared.split(".")[0] in children else layer
    return _width(owner.get_submodule(card.shared))


def _field(config: "PreTrainedConfig", card: TeacherCard, key: str) -> Any:
    """Return the value of the config field that a key of the card names. Raises UserError where the config has none."""
    name = getattr(card, key)
    value = config_field(config, name)
    if value is None:
        raise UserError(f"teacher card {card.model_type}: {key} = {name!r} is no field of the teacher's config.json")
    return value


def check_config(config: "PreTrainedConfig", card: TeacherCard | None) -> None:
    """Raise UserError for a number that is NaN, and where a token uses no expert, or more than there are."""
    if name := next(_nan_fields(config.to_dict()), ""):
        raise UserError(f"config.json: {name} is NaN; put the number there that the model was trained with")
    if card is None:
        return
    config = config.get_text_config()
    experts, top_k = _field(config, card, "num_experts"), _field(config, card, "top_k")
    for number in top_k if isinstance(top_k, (list, tuple)) else (top_k,):
        if type(number) is not int or type(experts) is not int or not 1 <= number <= experts:
            raise UserError(
                f"config.json: {card.top_k} is {number!r}, but a token uses between 1 and all of the experts ({card.num_experts}: {experts!r})"
            )


def _nan_fields(value: Any, path: str = "") -> Iterator[str]:
    """Yield the dotted names of the fields of a config that are NaN."""
    if isinstance(value, float) and math.isnan(value):
        yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, inner in entries:
        yield from _nan_fields(inner, f"{path}.{key}" if path else str(key))


def teacher_geometry(config: "PreTrainedConfig", card: TeacherCard) -> Geometry:
    """Return the shape of a teacher of this config; the card says where its MoE block, experts and shared FFN are.

    Raises UserError where the config names another shape than can be built, or lacks a field that the card names.
    """
    from moe2dense.modeling.decoder import decoder_layers
    from moe2dense.modeling.products import Products, layer_products

    check_config(config, card)
    config = config.get_text_config()
    model = empty_model(config)
    moe, shared, dense, per_expert, products = [], 0, 0, 0, Products(0)
    num_experts = _field(config, card, "num_experts")
    for index, layer in enumerate(decoder_layers(model)):
        try:
            experts = layer.get_submodule(card.experts_path)
        except AttributeError:
            products += layer_products(layer, config, index)
            dense = max(dense, _width(layer))
            continue
        products += layer_products(layer, config, index, without=experts)
        moe.append(index)
        per_expert = sum(p.numel() for p in experts.parameters()) // num_experts
        if card.shared:
            shared = _shared_width(layer, card)
    total = count_parameters(model)
    top_k = _field(config, card, "top_k")
    top_k = top_k[0] if isinstance(top_k, (list, tuple)) else top_k  # hunyuan lists one for each layer
    return Geometry(
        model_type=config.model_type,
        num_hidden_layers=config.num_hidden_layers,
        moe_layers=tuple(moe),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        num_experts=num_experts,
        top_k=top_k,
        expert_width=_field(config, card, "expert_width"),
        shared_width=shared,
        dense_width=dense,
        parameters=total,
        active_parameters=total - len(moe) * (num_experts - top_k) * per_expert,
        expert_parameters=per_expert,
        max_positions=getattr(config, "max_position_embeddings", 2048),
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config_field(config, "num_key_value_heads") or config.num_attention_heads,
        dense_weights=products.weights,
        pair_flops=products.pairs,
    )
