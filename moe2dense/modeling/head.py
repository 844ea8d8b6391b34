"""The map from a model's final hidden states to its logits: weight, bias, scale and soft-cap."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from moe2dense.common.counters import count_flops
from moe2dense.common.flops import product
from moe2dense.errors import UserError
from moe2dense.modeling.forward import evaluation_mode, final_hidden
from moe2dense.modeling.kinds import without_adapters

# V vocabulary, H hidden size
_DIVIDE_LOGITS = ("logits_scaling",)  # config fields that act on the logits, over all architectures
_MULTIPLY_LOGITS = ("logit_scale", "lm_head_multiplier")
_SOFTCAP = ("final_logit_softcapping",)


class OutputHead(Protocol):
    """A language-model head: logits = softcap(scale * (hidden @ weight.T + bias)), with softcap(x) = c tanh(x / c).

    `Head` holds its weight as it is; the head of a streamed teacher converts the stored weight as it is used.
    """

    scale: float
    softcap: float | None
    bias: Tensor | None

    @property
    def stored(self) -> Tensor:
        """The weight [V, H] in the dtype it is kept in."""
        ...

    @property
    def weight(self) -> Tensor:
        """The weight [V, H] in the compute dtype."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V] of hidden [..., H]."""
        ...


@dataclass
class Head:
    """A head whose weight [V, H] and bias [V] are tensors in memory, those of a model or copies of them."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def stored(self) -> Tensor:
        """The weight [V, H]."""
        return self.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V] of hidden [..., H]."""
        count_flops(product(hidden.numel() // hidden.shape[-1], hidden.shape[-1], len(self.weight)), hidden.device.type)
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        logits = logits * self.scale if self.scale != 1.0 else logits
        return logits if not self.softcap else self.softcap * torch.tanh(logits / self.softcap)


def in_float32(head: OutputHead) -> OutputHead:
    """Return the head with logits in float32 or wider.

    In half precision logits are rounded to eight bits before the softmax: a perfect student would then differ from its
    teacher on one first choice in a hundred.
    """
    if head.weight.dtype in (torch.float32, torch.float64):
        return head
    bias = None if head.bias is None else head.bias.float()
    return Head(head.weight.float(), bias, head.scale, head.softcap)


def _first_set(config: PreTrainedConfig, names: Sequence[str]) -> float | None:
    """Return the first of these config fields that is set and not zero."""
    return next((float(v) for n in names if (v := getattr(config, n, None))), None)


def logit_rules(config: PreTrainedConfig) -> tuple[float, float | None]:
    """Return the scale and the soft-cap that a config puts on the logits."""
    scale = (_first_set(config, _MULTIPLY_LOGITS) or 1.0) / (_first_set(config, _DIVIDE_LOGITS) or 1.0)
    return scale, _first_set(config, _SOFTCAP)


def model_head(model: nn.Module) -> Head:
    """Return the head of a causal language model of transformers, sharing its weight."""
    causal = without_adapters(model)
    linear = causal.get_output_embeddings()
    scale, softcap = logit_rules(causal.config.get_text_config())
    return Head(linear.weight, getattr(linear, "bias", None), scale, softcap)  # type: ignore[arg-type, union-attr]


@lru_cache(maxsize=4)
def _copied(weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None, device: torch.device) -> Head:
    return Head(weight.to(device), None if bias is None else bias.to(device), scale, softcap)


def head_on(head: OutputHead, device: torch.device) -> OutputHead:
    """Return a teacher's head on a device, copied there once."""
    if head.weight.device == device:
        return head
    return _copied(head.weight, head.bias, head.scale, head.softcap, device)


def output_head(model: PreTrainedModel) -> Head:
    """Return the head of a causal language model, checked on a few tokens against the model's own logits.

    Raises UserError where they are not finite, or not a linear map of its last hidden state.
    """
    if model.get_output_embeddings() is None:
        raise UserError(f"student: {type(model).__name__} has no output embedding; a causal language model is needed")
    head = model_head(model)
    ids = torch.arange(4, device=head.weight.device)[None] % len(head.weight)
    with evaluation_mode(model), torch.no_grad():
        own = model(input_ids=ids, use_cache=False).logits
        ours = head.logits(final_hidden(model, {"input_ids": ids}))
    if not own.isfinite().all():
        raise UserError(f"student: the logits of {type(model).__name__} are not finite; its weights are damaged")
    if not torch.allclose(own.float(), ours.float(), rtol=2e-2, atol=1e-3 + 1e-2 * float(own.float().std())):
        raise UserError(f"student: the logits of {type(model).__name__} are not its output embedding of the last state")
    return head
