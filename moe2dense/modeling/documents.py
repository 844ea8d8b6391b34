"""Keep documents that are packed into one block apart, also where an architecture's own forward does not."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from moe2dense.errors import UserError
from moe2dense.modeling import internals

# N blocks, S block length
_UNDERSTANDS_POSITIONS: dict[tuple[Any, ...], bool] = {}


def document_numbers(position_ids: Tensor) -> Tensor:
    """Return the document [N, S] that each position [N, S] belongs to, counted from 1: one begins wherever the position is 0."""
    return (position_ids == 0).cumsum(1)


def same_document(position_ids: Tensor) -> Tensor:
    """Return [N, 1, S, S] bool: whether two tokens belong to one document."""
    documents = document_numbers(position_ids)
    return (documents[:, :, None] == documents[:, None, :])[:, None]


def understands_positions(config: PreTrainedConfig) -> bool:
    """Return whether an architecture's own forward keeps documents apart whose positions start again at 0.

    Found by running its forward without its layers: the masks that it hands them say it. Raises UserError where a layer takes
    no mask [N, 1, S, S], because it carries a state along the block.
    """
    text = config.get_text_config()
    key = (type(text), tuple(getattr(text, "layer_types", None) or ()), getattr(text, "sliding_window", None))
    if key not in _UNDERSTANDS_POSITIONS:
        positions = torch.tensor([[0, 1, 2, 0, 1]])
        by_layer = internals.layer_masks(text, positions)
        masks = [mask for mask in by_layer if mask is not None and mask.ndim == 4]
        if len(masks) < len(by_layer):
            raise UserError(
                f"document_ids: {text.model_type} carries state across document borders; give one document per block"
            )
        apart = same_document(positions)
        _UNDERSTANDS_POSITIONS[key] = all(bool((mask[~apart.expand_as(mask)] < 0).all()) for mask in masks)
    return _UNDERSTANDS_POSITIONS[key]


def separated(inputs: dict[str, Any], config: PreTrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return the inputs of a model with masks that keep its documents apart, where its own forward does not.

    The inputs are returned as they are where no positions are given, or each block holds one document.
    """
    positions = inputs.get("position_ids")
    if positions is None or inputs.get("attention_mask") is not None:
        return inputs
    if bool((positions[:, 1:] == 0).any()) and not understands_positions(config):
        return {**inputs, "attention_mask": internals.masks_of_positions(config.get_text_config(), positions, dtype)}
    return inputs
