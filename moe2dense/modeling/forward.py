"""Run a model's decoder: inputs made from blocks, positions of packed documents, final hidden states."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moe2dense.data.blocks import Blocks
from moe2dense.modeling.attention import use_attention
from moe2dense.modeling.decoder import decoder_of
from moe2dense.modeling.documents import separated
from moe2dense.modeling.kinds import without_adapters
from moe2dense.modeling.products import body_products, count_pass, recomputes

# N blocks, S block length, H hidden size


def final_hidden(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the normed hidden states [N, S, H] that the head of a causal language model reads; compute no logits.

    Documents whose positions start again at 0 do not see each other. Raises UserError for an architecture that carries state
    from one to the next.
    """
    causal = without_adapters(model)
    use_attention(causal, next(iter(inputs.values())).device)
    apart = separated(inputs, causal.config, causal.dtype)
    products, grad = body_products(causal), torch.is_grad_enabled()
    again = causal.training and recomputes(causal)
    blocks, length = next(iter(inputs.values())).shape[:2]
    count_pass(products, blocks, length, causal.device.type, grad and products.trained > 0, again)
    return decoder_of(model)(**apart, use_cache=False).last_hidden_state


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
    """Return keyword arguments for a transformers model: a mask, or positions that restart at each document of packed blocks.

    Positions part attention (see `final_hidden`). Where no block holds two documents, padding alone is masked.
    """
    inputs = {"input_ids": blocks.input_ids.to(device)}
    mask, documents = blocks.attention_mask, blocks.document_ids
    if documents is not None and not one_document(documents, mask):
        if mask is not None:  # padding becomes a document of its own, that no real token sees
            documents = documents.masked_fill(~mask.bool(), -1)
        inputs["position_ids"] = document_positions(documents).to(device)
    elif mask is not None:
        inputs["attention_mask"] = mask.long().to(device)
    return inputs


def one_document(document_ids: Tensor, attention_mask: Tensor | None = None) -> bool:
    """Return whether no block [N, S] holds real tokens of two documents."""
    real = torch.ones_like(document_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    low = torch.where(real, document_ids, document_ids.max() + 1).amin(1)
    high = torch.where(real, document_ids, document_ids.min() - 1).amax(1)
    return bool((low >= high).all())


def document_positions(document_ids: Tensor) -> Tensor:
    """Return positions [N, S] that restart at 0 wherever the document id [N, S] changes."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(1).values
