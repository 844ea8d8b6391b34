"""Collect statistics of a teacher's experts while it streams: how often each is chosen, how strongly, and what it writes."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from moe2dense.common.processes import add_over_processes
from moe2dense.teacher.layer_pass import LayerPass
from moe2dense.teacher.observer import Observer


@dataclass
class LayerStats:
    """Sums over the tokens of one sparse layer; properties are the statistics. E experts, H hidden size, F expert width."""

    tokens: Tensor  # [] real tokens
    count: Tensor  # [E] tokens that chose the expert
    weight: Tensor  # [E] sum of routing weights
    weighted_norm: Tensor  # [E] sum of w ||f_e(x)||
    output: Tensor  # [E, H] sum of f_e(x)
    neuron_energy: Tensor | None = None  # [E, F] sum of (w h)^2, where asked for

    @classmethod
    def zeros(cls, experts: int, hidden: int, width: int = 0) -> "LayerStats":
        """Return statistics of no tokens; neuron energies are kept when `width` is given."""
        z = lambda *shape: torch.zeros(shape, dtype=torch.float64)  # noqa: E731
        return cls(z(), z(experts), z(experts), z(experts), z(experts, hidden), z(experts, width) if width else None)

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
        """[E] mean routing weight over all real tokens: the expert's magnitude in a dense average."""
        return self.weight / self.tokens.clamp(min=1)

    @property
    def reap(self) -> Tensor:
        """[E] REAP saliency (arXiv:2510.13999): mean of w ||f_e(x)|| over the tokens that chose it."""
        return self.weighted_norm / self.count.clamp(min=1)

    @property
    def mean_output(self) -> Tensor:
        """[E, H] mean output over the tokens that chose it."""
        return self.output / self.count.clamp(min=1)[:, None]


class RoutingStats(Observer):
    """Statistics of every sparse layer, in memory that does not grow with the tokens; `stats[layer]` is a LayerStats.

    outputs=False keeps to what the router alone decides (load and weights), which costs nothing.
    neurons=True keeps each neuron's router-weighted energy too.
    """

    def __init__(self, outputs: bool = True, neurons: bool = False):
        self.outputs, self.neurons = outputs, neurons
        self.layers: dict[int, LayerStats] = {}

    def __getitem__(self, layer: int) -> LayerStats:
        return self.layers[layer]

    def wants_experts(self) -> bool:
        """Return whether outputs or neurons of the experts are asked for."""
        return self.outputs or self.neurons

    def _of(self, layer: LayerPass) -> LayerStats:
        """Return the statistics of a layer, zeros at first."""
        if layer.index not in self.layers:
            assert layer.experts is not None
            width = layer.experts.width if self.neurons else 0
            self.layers[layer.index] = LayerStats.zeros(len(layer.experts), layer.x.shape[1], width)
        return self.layers[layer.index]

    def expert(self, layer: LayerPass, e: int, rows: Tensor, weights: Tensor, hidden: Tensor, output: Tensor) -> None:
        """Add one expert's outputs."""
        stats = self._of(layer)
        norm, w = output.double().norm(dim=1), weights.double()
        stats.weighted_norm[e] += (w * norm).sum().cpu()
        stats.output[e] += output.double().sum(0).cpu()
        if stats.neuron_energy is not None:
            stats.neuron_energy[e] += (hidden.float() * weights[:, None].float()).square().sum(0).double().cpu()

    def layer(self, layer: LayerPass) -> None:
        """Add what the router decided."""
        if not layer.sparse:
            return
        assert layer.top_k_index is not None and layer.top_k_weights is not None
        stats = self._of(layer)
        index, weights = layer.top_k_index[layer.token_mask], layer.top_k_weights[layer.token_mask].double()
        chosen = torch.zeros(len(index), len(stats.count)).scatter_(1, index, 1.0)
        stats.tokens += len(index)
        stats.count += chosen.sum(0)
        stats.weight.index_add_(0, index.flatten(), weights.flatten())


def reduce_stats(stats: RoutingStats) -> None:
    """Add the statistics of all processes, in place and on every one; does nothing for a single process."""
    for index in sorted(stats.layers):
        reduce_layer(stats.layers[index])


def reduce_layer(layer: LayerStats) -> None:
    """Add one layer's statistics of all processes, in place and on every one."""
    for item in fields(layer):
        value = getattr(layer, item.name)
        if value is not None:
            add_over_processes(value)
