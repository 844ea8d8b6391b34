"""Find the parts of a causal language model: its decoder and the decoder's layers."""

from typing import cast

from torch import nn

from moe2dense.errors import UserError
from moe2dense.modeling import internals
from moe2dense.modeling.kinds import without_adapters


def decoder_of(model: nn.Module) -> nn.Module:
    """Return the part of a causal language model that ends in its final, normed hidden states.

    This is transformers' `base_model`, except where a model names itself as its own (Llama 4).
    """
    causal = without_adapters(model)
    body = causal.base_model
    return cast(nn.Module, internals.decoder(causal)[1]) if body is causal else body


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the decoder layers of a causal language model, in order. Raises UserError where it has no list of them."""
    count = without_adapters(model).config.get_text_config().num_hidden_layers
    lists = (m for m in decoder_of(model).modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    layers = next(lists, None)
    if layers is None:
        raise UserError(
            f"{type(model).__name__} has no list of {count} decoder layers; its layers cannot be told apart"
        )
    return layers
