"""The map from a model's final hidden states to its logits: weight, bias, scale and soft-cap."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moe2dense.errors import UserError
from moe2dense.modeling.forward import last_hidden

# V vocabulary, H hidden
_DIVIDED_BY = ("logits_scaling",)  # config fields that act on the logits, over all architectures
_TIMES = ("logit_scale", "lm_head_multiplier")
_SOFTCAP = ("final_logit_softcapping",)


@dataclass
class Head:
    """logits = softcap(scale * (hidden @ weight.T + bias)); weight [V, H], bias [V] or None, softcap c tanh(x / c)."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., H] -> logits [..., V]."""
        found = torch.nn.functional.linear(hidden, self.weight, self.bias)
        found = found * self.scale if self.scale != 1.0 else found
        return found if not self.softcap else self.softcap * torch.tanh(found / self.softcap)


def _first(config: Any, names: tuple[str, ...]) -> float | None:
    return next((float(v) for n in names if (v := getattr(config, n, None))), None)


def logit_rules(config: Any) -> tuple[float, float | None]:
    """The scale and the soft-cap that a config puts on the logits."""
    scale = (_first(config, _TIMES) or 1.0) / (_first(config, _DIVIDED_BY) or 1.0)
    return scale, _first(config, _SOFTCAP)


def model_head(model: Any) -> Head:
    """The head of a causal language model of transformers."""
    linear = model.get_output_embeddings()
    scale, softcap = logit_rules(model.config.get_text_config())
    return Head(linear.weight, getattr(linear, "bias", None), scale, softcap)


@lru_cache(maxsize=4)
def _moved(weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None, device: torch.device) -> Head:
    return Head(weight.to(device), None if bias is None else bias.to(device), scale, softcap)


def head_on(head: Any, device: torch.device) -> Any:
    """A teacher's head on a device, copied there once."""
    if head.weight.device == device:
        return head
    return _moved(head.weight, head.bias, head.scale, head.softcap, device)


def output_head(model: Any) -> Head:
    """The head of a transformers causal LM, checked on a few tokens against the model's own logits.

    Raises UserError where the model's logits are not a linear map of its last hidden state.
    """
    if model.get_output_embeddings() is None:
        raise UserError(f"student: {type(model).__name__} has no output embedding; a causal language model is needed")
    head = model_head(model)
    ids = torch.arange(4, device=head.weight.device)[None] % len(head.weight)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        own = model(input_ids=ids, use_cache=False).logits
        ours = head.logits(last_hidden(model, {"input_ids": ids}))
    model.train(was_training)
    if not torch.allclose(own.float(), ours.float(), rtol=2e-2, atol=1e-3 + 1e-2 * float(own.float().std())):
        raise UserError(f"student: the logits of {type(model).__name__} are not its output embedding of the last state")
    return head
