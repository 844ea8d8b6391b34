"""Observers: code that runs while a layer's weights are in memory."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moe2dense.teacher.load import Teacher
    from moe2dense.teacher.stream import LayerPass


class Observer:
    """Called as the teacher streams; override what is needed.

    A long input is run as several macro-batches: `layer` then comes once per layer and macro-batch.
    """

    def begin(self, teacher: "Teacher", tokens: int) -> None:
        """Before anything is read. `tokens`: real tokens to come."""

    def expert(self, layer: "LayerPass", e: int, rows: Tensor, weights: Tensor, hidden: Tensor, output: Tensor) -> None:
        """One expert on the tokens routed to it: rows [n] (flat token index), weights [n], hidden [n, F], output [n, H].

        The block's output is the sum of weights * output over experts, plus what is shared. Where a family scales the expert's input
        instead (llama4), hidden and output belong to the scaled input and weights are ones.
        """

    def wants_experts(self) -> bool:
        """Whether `expert` is to be called; computing every expert's activations apart costs a little."""
        return type(self).expert is not Observer.expert

    def layer(self, layer: "LayerPass") -> None:
        """After y and hidden_out are final, the layer's weights still in memory."""

    def end(self) -> None:
        """After the last layer."""


@dataclass
class LayerStats:
    """Sums over tokens for one sparse layer; properties are the statistics. E experts, H hidden, F expert width."""

    tokens: Tensor  # [] real tokens
    count: Tensor  # [E] tokens that chose the expert
    weight: Tensor  # [E] sum of routing weights
    together: Tensor  # [E, E] tokens that chose both; the diagonal is `count`
    norm: Tensor  # [E] sum of ||f_e(x)||
    weighted_norm: Tensor  # [E] sum of w ||f_e(x)||
    energy: Tensor  # [E] sum of ||w f_e(x)||^2
    output: Tensor  # [E, H] sum of f_e(x)
    output_energy: Tensor  # [] sum of ||y||^2, shared experts included
    neuron_energy: Tensor | None = None  # [E, F] sum of (w h)^2, where asked for

    @classmethod
    def zeros(cls, experts: int, hidden: int, width: int = 0) -> "LayerStats":
        """Nothing seen yet; neuron energies are kept when `width` is given."""
        z = lambda *shape: torch.zeros(shape, dtype=torch.float64)  # noqa: E731
        return cls(
            z(), z(experts), z(experts), z(experts, experts), z(experts), z(experts), z(experts), z(experts, hidden), z(),
            z(experts, width) if width else None,
        )  # fmt: skip

    @property
    def load(self) -> Tensor:
        """[E] share of the tokens that chose the expert; sums to top_k."""
        return self.count / self.tokens.clamp(min=1)

    @property
    def mean_weight(self) -> Tensor:
        """[E] mean routing weight over the tokens that chose it (0 where none did)."""
        return self.weight / self.count.clamp(min=1)

    @property
    def alpha(self) -> Tensor:
        """[E] mean routing weight over all real tokens: the expert's honest magnitude in a dense average."""
        return self.weight / self.tokens.clamp(min=1)

    @property
    def reap(self) -> Tensor:
        """[E] REAP saliency (arXiv:2510.13999): mean of w ||f_e(x)|| over the tokens that chose it."""
        return self.weighted_norm / self.count.clamp(min=1)

    @property
    def output_norm(self) -> Tensor:
        """[E] mean ||f_e(x)|| over the tokens that chose it."""
        return self.norm / self.count.clamp(min=1)

    @property
    def coactivation(self) -> Tensor:
        """[E, E] share of the tokens that chose both experts."""
        return self.together / self.tokens.clamp(min=1)

    @property
    def mean_output(self) -> Tensor:
        """[E, H] mean output over the tokens that chose it."""
        return self.output / self.count.clamp(min=1)[:, None]

    @property
    def output_gram(self) -> Tensor:
        """[E, E] inner products of the experts' mean outputs."""
        return self.mean_output @ self.mean_output.T


class RoutingStats(Observer):
    """Statistics of every sparse layer, in memory that does not grow with the tokens. `stats[layer]` is a LayerStats.

    outputs=False keeps to what the router alone tells (load, weights, co-activation), which costs nothing.
    neurons=True keeps each neuron's router-weighted energy too.
    """

    def __init__(self, outputs: bool = True, neurons: bool = False):
        self.outputs, self.neurons = outputs, neurons
        self.layers: dict[int, LayerStats] = {}

    def __getitem__(self, layer: int) -> LayerStats:
        return self.layers[layer]

    def wants_experts(self) -> bool:
        return self.outputs or self.neurons

    def _of(self, layer: "LayerPass") -> LayerStats:
        if layer.index not in self.layers:
            assert layer.experts is not None
            width = layer.experts.width if self.neurons else 0
            self.layers[layer.index] = LayerStats.zeros(len(layer.experts), layer.x.shape[1], width)
        return self.layers[layer.index]

    def expert(self, layer: "LayerPass", e: int, rows: Tensor, weights: Tensor, hidden: Tensor, output: Tensor) -> None:
        """Add one expert's outputs."""
        s = self._of(layer)
        norm, w = output.double().norm(dim=1), weights.double()
        s.norm[e] += norm.sum().cpu()
        s.weighted_norm[e] += (w * norm).sum().cpu()
        s.energy[e] += (w * norm).square().sum().cpu()
        s.output[e] += output.double().sum(0).cpu()
        if s.neuron_energy is not None:
            s.neuron_energy[e] += (hidden * weights[:, None]).square().sum(0).double().cpu()

    def layer(self, layer: "LayerPass") -> None:
        """Add what the router tells."""
        if not layer.sparse:
            return
        assert layer.top_k_index is not None and layer.top_k_weights is not None
        s = self._of(layer)
        index, weights = layer.top_k_index[layer.token_mask], layer.top_k_weights[layer.token_mask].double()
        chosen = torch.zeros(len(index), len(s.count)).scatter_(1, index, 1.0)
        s.tokens += len(index)
        s.count += chosen.sum(0)
        s.weight.index_add_(0, index.flatten(), weights.flatten())
        s.together += chosen.T @ chosen
        y = layer.y[layer.token_mask.to(layer.y.device)]
        s.output_energy += y.float().square().sum().double().cpu()
