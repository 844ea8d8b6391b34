"""Run a model's decoder: inputs made from blocks, positions of packed documents, final hidden states."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moe2dense.data.blocks import Blocks
from moe2dense.modeling.decoder import decoder_of

# N blocks, S block length, H hidden size


def final_hidden(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the normed hidden states [N, S, H] that the head of a causal language model reads; compute no logits."""
    return decoder_of(model)(**inputs, use_cache=False).last_hidden_state


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off within the context, and back to what they were after it."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def model_inputs(blocks: Blocks, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return keyword arguments for a transformers model; positions restart at each document, which also parts attention."""
    inputs = {"input_ids": blocks.input_ids.to(device)}
    mask, documents = blocks.attention_mask, blocks.document_ids
    if documents is not None:
        if mask is not None:  # padding becomes a document of its own, that no real token sees
            documents = documents.masked_fill(~mask.bool(), -1)
        inputs["position_ids"] = document_positions(documents).to(device)
    elif mask is not None:
        inputs["attention_mask"] = mask.long().to(device)
    return inputs


def document_positions(document_ids: Tensor) -> Tensor:
    """Return positions [N, S] that restart at 0 wherever the document id [N, S] changes."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(1).values


def document_numbers(position_ids: Tensor) -> Tensor:
    """Return the document [N, S] that each position [N, S] belongs to, counted from 1: one begins wherever the position is 0."""
    return (position_ids == 0).cumsum(1)
