"""A model's shape in numbers, read from its config on the meta device: no weights are touched."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe2dense.families.cards import TeacherCard

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


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

    @property
    def active_width(self) -> int:
        """Neurons that one token passes in a sparse layer."""
        return self.top_k * self.expert_width + self.shared_width


def _width(module) -> int:
    """Neurons of a dense gated FFN: the input width of its down projection."""
    sizes = [
        m.in_features for n, m in module.named_modules() if n.split(".")[-1] in ("down_proj", "w2", "output_linear")
    ]
    return sizes[0] if sizes else 0


def teacher_geometry(config: "PreTrainedConfig", card: TeacherCard) -> Geometry:
    """The shape of a teacher of this config; the card says where its MoE block, experts and shared FFN are."""

    config = config.get_text_config()
    model = empty_model(config)
    moe, shared, dense, per_expert = [], 0, 0, 0
    experts_total = getattr(config, card.num_experts)
    decoder: Any = model.get_decoder()
    decoder = decoder if hasattr(decoder, "layers") else decoder.model  # llama4's language model names itself
    for index, layer in enumerate(decoder.layers):
        try:
            experts = layer.get_submodule(f"{card.moe_block}.{card.experts}")
        except AttributeError:
            dense = max(dense, _width(layer))
            continue
        moe.append(index)
        per_expert = sum(p.numel() for p in experts.parameters()) // experts_total
        if card.shared:
            block = layer.get_submodule(card.moe_block)
            holder = block if hasattr(block, card.shared.split(".")[0]) else layer
            shared = _width(holder.get_submodule(card.shared))
    total = count_parameters(model)
    top_k = getattr(config, card.top_k)
    top_k = top_k[0] if isinstance(top_k, (list, tuple)) else top_k  # hunyuan lists one for each layer
    return Geometry(
        model_type=config.model_type,
        num_hidden_layers=config.num_hidden_layers,
        moe_layers=tuple(moe),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        num_experts=experts_total,
        top_k=top_k,
        expert_width=getattr(config, card.expert_width),
        shared_width=shared,
        dense_width=dense,
        parameters=total,
        active_parameters=total - len(moe) * (experts_total - top_k) * per_expert,
        expert_parameters=per_expert,
        max_positions=getattr(config, "max_position_embeddings", 2048),
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
    )


def empty_model(config: "PreTrainedConfig") -> "PreTrainedModel":
    """A causal language model of this config without storage (every parameter on the meta device)."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def count_parameters(model: "nn.Module") -> int:
    """Parameters of a model, tied ones counted once; works on meta tensors."""
    return sum(p.numel() for p in model.parameters())
