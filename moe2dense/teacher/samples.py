"""Observers that keep tokens: a fixed number of them, or the hidden states of chosen layers."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe2dense.teacher.observer import Observer

if TYPE_CHECKING:
    from moe2dense.teacher.layer_pass import LayerPass
    from moe2dense.teacher.model import Teacher

# n tokens kept, H hidden, K top_k


class TokenSample(Observer):
    """A uniform sample of real tokens, the same ones in every layer, in memory that does not grow with the text.

    Every token draws a key and the smallest `tokens` keys are kept (bottom-k sampling, Cohen and Kaplan 2007), so the sample does not
    depend on how the text is cut into macro-batches. `position` [n] is the flat index of each token in the whole input;
    `x[layer]`, `y[layer]` [n, H] and, on sparse layers, `top_k_index[layer]` and `top_k_weights[layer]` [n, K] are in that order.
    """

    def __init__(self, tokens: int = 1024, seed: int = 0, layers: Iterable[int] | None = None):
        self.tokens, self.seed = tokens, seed
        self.only = None if layers is None else set(layers)
        self.x: dict[int, Tensor] = {}
        self.y: dict[int, Tensor] = {}
        self.top_k_index: dict[int, Tensor] = {}
        self.top_k_weights: dict[int, Tensor] = {}
        self.position = torch.empty(0, dtype=torch.int64)

    def begin(self, teacher: "Teacher", tokens: int) -> None:
        """Start over."""
        for kept in (self.x, self.y, self.top_k_index, self.top_k_weights):
            kept.clear()
        self.position, self._seen = torch.empty(0, dtype=torch.int64), 0
        self._keys = torch.empty(0, dtype=torch.float64)
        self._random = torch.Generator().manual_seed(self.seed)

    def _draw(self, mask: Tensor) -> None:
        """Decide which tokens of a new macro-batch are kept, and which of those held give way."""
        keys = torch.rand(len(mask), generator=self._random, dtype=torch.float64)
        keys[~mask.cpu()] = torch.inf
        held = len(self._keys)
        both = torch.cat((self._keys, keys))
        order = both.argsort()[: self.tokens]
        order = order[both[order].isfinite()].sort().values
        self._stay, self._take = order[order < held], order[order >= held] - held
        self._keys = both[order]
        self.position = torch.cat((self.position[self._stay], self._take + self._seen))
        self._seen += len(mask)

    def _keep(self, kept: dict[int, Tensor], layer: int, value: Tensor) -> None:
        taken = value[self._take.to(value.device)].cpu()
        kept[layer] = torch.cat((kept[layer][self._stay], taken)) if layer in kept else taken.clone()

    def layer(self, layer: "LayerPass") -> None:
        """Keep this layer's rows of the sampled tokens."""
        if layer.index == 0:
            self._draw(layer.token_mask)
        if self.only is not None and layer.index not in self.only:
            return
        self._keep(self.x, layer.index, layer.x)
        self._keep(self.y, layer.index, layer.y)
        if layer.sparse:
            assert layer.top_k_index is not None and layer.top_k_weights is not None
            self._keep(self.top_k_index, layer.index, layer.top_k_index)
            self._keep(self.top_k_weights, layer.index, layer.top_k_weights)


class HiddenStates(Observer):
    """The residual stream after chosen layers, `states[layer]` [N, S, H]. Grows with the text."""

    def __init__(self, layers: Iterable[int]):
        self.only = set(layers)
        self._parts: dict[int, list[Tensor]] = {}
        self.states: dict[int, Tensor] = {}

    def begin(self, teacher: "Teacher", tokens: int) -> None:
        """Start over."""
        self._parts, self.states = {i: [] for i in sorted(self.only)}, {}

    def layer(self, layer: "LayerPass") -> None:
        """Keep a copy."""
        if layer.index in self.only:
            self._parts[layer.index].append(layer.hidden_out.to("cpu", copy=True))

    def end(self) -> None:
        """Put the macro-batches together."""
        self.states = {i: torch.cat(parts) for i, parts in self._parts.items() if parts}
