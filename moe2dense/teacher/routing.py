"""Observers: code that runs while a layer's weights are in memory."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch import distributed as dist

from moe2dense.common.processes import _device, world
from moe2dense.teacher.observer import Observer

if TYPE_CHECKING:
    from moe2dense.teacher.layer_pass import LayerPass


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
    pairs: Tensor | None = None  # [E, E] sum of <f_e(x), f_e'(x)> over sampled tokens that chose both, where asked for
    pair_count: Tensor | None = None  # [E, E] how many tokens that was

    @classmethod
    def zeros(cls, experts: int, hidden: int, width: int = 0, gram: bool = False) -> "LayerStats":
        """Nothing seen yet; neuron energies are kept when `width` is given, inner products of outputs with `gram`."""
        z = lambda *shape: torch.zeros(shape, dtype=torch.float64)  # noqa: E731
        return cls(
            z(), z(experts), z(experts), z(experts, experts), z(experts), z(experts), z(experts), z(experts, hidden), z(),
            z(experts, width) if width else None, *((z(experts, experts), z(experts, experts)) if gram else ()),
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
    def mean_output_gram(self) -> Tensor:
        """[E, E] inner products of the experts' mean outputs, each over its own tokens: what clustering experts looks at."""
        return self.mean_output @ self.mean_output.T

    @property
    def output_gram(self) -> Tensor:
        """[E, E] mean of <f_e(x), f_e'(x)> over the sampled tokens that chose both experts: how alike they are on the same inputs.

        0 where no sampled token chose both; `pair_count` tells how many did. Needs RoutingStats(gram_tokens=...).
        """
        assert self.pairs is not None and self.pair_count is not None, "RoutingStats(gram_tokens=...) keeps these"
        return self.pairs / self.pair_count.clamp(min=1)


class RoutingStats(Observer):
    """Statistics of every sparse layer, in memory that does not grow with the tokens. `stats[layer]` is a LayerStats.

    outputs=False keeps to what the router alone tells (load, weights, co-activation), which costs nothing.
    neurons=True keeps each neuron's router-weighted energy too. gram_tokens: that many tokens of each layer and macro-batch, drawn with
    `seed`, keep the outputs of all their experts until the layer is done (K * H numbers a token), for `output_gram`.
    """

    def __init__(self, outputs: bool = True, neurons: bool = False, gram_tokens: int = 0, seed: int = 0):
        self.outputs, self.neurons, self.gram_tokens = outputs, neurons, gram_tokens
        self.layers: dict[int, LayerStats] = {}
        self._random = torch.Generator().manual_seed(seed)
        self._sample: tuple[LayerPass, Tensor, Tensor] | None = None  # layer, sampled rows [n], outputs [n, K, H]

    def __getitem__(self, layer: int) -> LayerStats:
        return self.layers[layer]

    def wants_experts(self) -> bool:
        return self.outputs or self.neurons or self.gram_tokens > 0

    def _of(self, layer: "LayerPass") -> LayerStats:
        if layer.index not in self.layers:
            assert layer.experts is not None
            width = layer.experts.width if self.neurons else 0
            self.layers[layer.index] = LayerStats.zeros(
                len(layer.experts), layer.x.shape[1], width, self.gram_tokens > 0
            )
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
        if self.gram_tokens:
            self._keep_outputs(layer, e, rows.cpu(), output)

    def _keep_outputs(self, layer: "LayerPass", e: int, rows: Tensor, output: Tensor) -> None:
        """Note one expert's outputs on the sampled tokens, each in the place of its choice."""
        assert layer.top_k_index is not None
        if self._sample is None or self._sample[0] is not layer:
            real = layer.token_mask.cpu().nonzero()[:, 0]
            drawn = real[torch.randperm(len(real), generator=self._random)[: self.gram_tokens]].sort().values
            shape = (len(drawn), layer.top_k_index.shape[1], output.shape[1])
            self._sample = (layer, drawn, torch.zeros(shape, dtype=output.dtype))
        _, drawn, kept = self._sample
        taken = torch.isin(rows, drawn)
        at = torch.searchsorted(drawn, rows[taken])
        slot = (layer.top_k_index[rows[taken]] == e).int().argmax(1)
        kept[at, slot] = output[taken.to(output.device)].cpu()

    def _add_pairs(self, layer: "LayerPass", s: LayerStats) -> None:
        """Inner products between the outputs of the experts that each sampled token chose."""
        if self._sample is None or s.pairs is None or s.pair_count is None:
            return
        _, drawn, kept = self._sample
        assert layer.top_k_index is not None
        chosen = layer.top_k_index[drawn]
        cell = (chosen[:, :, None] * len(s.count) + chosen[:, None, :]).flatten()
        inner = (kept.double() @ kept.double().mT).flatten()
        s.pairs.view(-1).index_add_(0, cell, inner)
        s.pair_count.view(-1).index_add_(0, cell, torch.ones_like(inner))
        self._sample = None

    def layer(self, layer: "LayerPass") -> None:
        """Add what the router tells."""
        if not layer.sparse:
            return
        assert layer.top_k_index is not None and layer.top_k_weights is not None
        s = self._of(layer)
        self._add_pairs(layer, s)
        index, weights = layer.top_k_index[layer.token_mask], layer.top_k_weights[layer.token_mask].double()
        chosen = torch.zeros(len(index), len(s.count)).scatter_(1, index, 1.0)
        s.tokens += len(index)
        s.count += chosen.sum(0)
        s.weight.index_add_(0, index.flatten(), weights.flatten())
        s.together += chosen.T @ chosen
        y = layer.y[layer.token_mask.to(layer.y.device)]
        s.output_energy += y.float().square().sum().double().cpu()


def reduce_stats(stats: RoutingStats) -> None:
    """Add the statistics of all processes, in place and on every one; a no-op for a single process."""
    if world()[1] == 1:
        return
    for index in sorted(stats.layers):
        layer = stats.layers[index]
        for item in fields(layer):
            value = getattr(layer, item.name)
            if value is not None:
                total = value.to(_device())
                dist.all_reduce(total)
                value.copy_(total)
