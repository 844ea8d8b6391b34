"""Run a model's body: inputs from blocks, positions of packed documents, final hidden states."""

from typing import Any

import torch
from torch import Tensor


def final_hidden(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The normed hidden states [N, S, H] that the head of a causal language model reads; logits are not computed."""
    whole = model.get_base_model() if hasattr(model, "peft_config") else model
    return whole.base_model(**inputs, use_cache=False).last_hidden_state


def last_hidden(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Final normed hidden states [N, S, H] of a transformers causal LM."""
    return model.base_model(**inputs, use_cache=False).last_hidden_state


def model_inputs(blocks: Any, device: Any = "cpu") -> dict[str, Tensor]:
    """Keyword arguments for a transformers model: positions restart at each document, which also parts their attention."""
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
    """[N, S] document ids -> [N, S] positions that restart at 0 where the document changes."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(1).values
