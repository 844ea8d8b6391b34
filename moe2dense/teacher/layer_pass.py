"""One decoder layer of a teacher while its weights are in memory, as students and observers see it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor, nn

from moe2dense.teacher.experts import ExpertWeights, LayerExperts, SharedFFN


class LayerFFNs(Protocol):
    """The FFNs of a layer that are read on demand, besides its routed experts."""

    def shared(self) -> list[SharedFFN]:
        """Return the FFNs that every token passes inside a sparse block."""
        ...

    def dense(self) -> ExpertWeights:
        """Return the FFN of a dense layer."""
        ...


@dataclass
class LayerPass:
    """One layer of one macro-batch, while its weights are in memory. Tensors are overwritten when the next layer begins."""

    index: int
    sparse: bool
    module: nn.Module  # transformers' decoder layer with its weights, the routed experts' excepted
    layer_inputs: Callable[[slice], dict[str, Any]]  # rows of blocks -> keyword arguments of a decoder layer
    hidden_in: Tensor  # [N, S, H] residual stream before the layer
    hidden_out: Tensor  # [N, S, H] and after it
    token_mask: Tensor  # [T] real tokens
    x: Tensor  # [T, H] input of the MoE block or dense FFN
    y: Tensor  # [T, H] its output, shared experts included; padding gets no routed experts
    router_logits: Tensor | None = None  # [T, E]
    top_k_index: Tensor | None = None  # [T, K]
    top_k_weights: Tensor | None = None  # [T, K] exactly as the experts receive them
    experts: LayerExperts | None = None
    ffns: LayerFFNs | None = field(default=None, repr=False)

    @cached_property
    def shared(self) -> list[SharedFFN]:
        """The FFNs that every token passes inside a sparse block."""
        assert self.ffns is not None
        return self.ffns.shared()

    @cached_property
    def dense(self) -> ExpertWeights:
        """The FFN of a dense layer."""
        assert self.ffns is not None
        return self.ffns.dense()
