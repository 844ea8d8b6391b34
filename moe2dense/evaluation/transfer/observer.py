"""What is recorded of each expert while the teacher's layer runs: energies, probe outputs and its strongest tokens."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moe2dense.data.blocks import Blocks
from moe2dense.teacher.experts import ExpertWeights
from moe2dense.teacher.layer_pass import LayerPass
from moe2dense.teacher.observer import Observer

# n tokens of one expert, E experts, H hidden, P probe tokens of the layer

EXAMPLES = 6  # strongest tokens shown, of one block each
CANDIDATES = 48
BEFORE, AFTER = 10, 6  # tokens of context shown
Probe = tuple[Tensor, int, Tensor, Tensor]  # (rows, expert, input scale, outputs)


@dataclass
class Probes:
    """A few tokens of every expert, and that expert's outputs for them.

    rows [P]: flat token index; owner [P]: the expert whose tokens they are; scale [P]: what the family multiplies the input
    with; output [P, H]; experts: how many the layer has.
    """

    rows: Tensor
    owner: Tensor
    scale: Tensor
    output: Tensor
    experts: int

    def cosines(self, other: ExpertWeights, x: Tensor) -> Tensor:
        """Return the mean cosine [E], over each expert's probes, between its output and `other`'s; -1 where it has none."""
        inputs = x[self.rows].float() * self.scale[:, None].to(x.device)
        answers = other(inputs.to(other.device, other.dtype)).float().cpu()
        cosine = torch.nn.functional.cosine_similarity(answers, self.output, dim=1)
        count = torch.bincount(self.owner, minlength=self.experts)
        total = cosine.new_zeros(self.experts).index_add_(0, self.owner, cosine)
        return torch.where(count > 0, total / count.clamp(min=1), cosine.new_tensor(-1.0))


@dataclass
class LayerWatch:
    """Sums and samples of one sparse layer.

    weight [E]: sum of routing weights; energy [E]: sum of |w f(x)|^2; width: neurons of an expert; strongest: for each
    expert, (|w f(x)|, flat token index) of its strongest tokens.
    """

    weight: Tensor
    energy: Tensor
    width: int = 0
    probe_list: list[Probe] = field(default_factory=list)
    strongest: dict[int, list[tuple[float, int]]] = field(default_factory=dict)

    def probes(self) -> Probes | None:
        """Return the probe tokens of all experts; None where no token was routed."""
        if not self.probe_list:
            return None
        owner = torch.cat([torch.full((len(rows),), e) for rows, e, _, _ in self.probe_list])
        rows, _, scale, output = zip(*self.probe_list, strict=True)
        return Probes(torch.cat(rows), owner, torch.cat(scale), torch.cat(output), len(self.weight))

    def contexts(self, blocks: Blocks, tokenizer: PreTrainedTokenizerBase | None) -> list[list[list[Any]]]:
        """Return, for each expert, [before, token, after, domain, strength] of its strongest tokens, one per block."""
        if tokenizer is None:
            return []
        length = blocks.input_ids.shape[1]
        contexts = []
        for e in range(len(self.weight)):
            cells, used = [], set()
            for strength, flat in self.strongest.get(e, []):
                block, at = divmod(flat, length)
                if block in used or len(cells) == EXAMPLES:
                    continue
                used.add(block)
                ids = blocks.input_ids[block].tolist()
                pieces = (ids[max(0, at - BEFORE) : at], ids[at : at + 1], ids[at + 1 : at + 1 + AFTER])
                text = [tokenizer.decode(p, skip_special_tokens=False) for p in pieces]
                cells.append([*text, blocks.domains[block], round(strength, 4)])
            contexts.append(cells)
        return contexts


class TransferObserver(Observer):
    """Fill one LayerWatch per sparse layer, which `pop` gives back; `probes`: probe tokens per expert (0 = none).

    input_scaled: the family multiplies the expert's input with the routing weight, and the weights it passes are ones.
    """

    def __init__(self, seed: int = 0, probes: int = 32, input_scaled: bool = False):
        self.count, self.input_scaled = probes, input_scaled
        self.generator = torch.Generator().manual_seed(seed)
        self.watches: dict[int, LayerWatch] = {}

    def pop(self, index: int) -> LayerWatch:
        """Return what was recorded of layer `index`, and forget it."""
        return self.watches.pop(index)

    def expert(self, layer: LayerPass, e: int, rows: Tensor, weights: Tensor, hidden: Tensor, output: Tensor) -> None:
        """Add one expert's tokens. Where the family scales the input, the weight is already in `output`."""
        assert layer.top_k_index is not None and layer.top_k_weights is not None
        watch = self._of(layer)
        rows = rows.cpu()
        routed = (layer.top_k_weights[rows].float() * (layer.top_k_index[rows] == e)).sum(1).cpu()
        strength = (output.float().norm(dim=1) * weights.float()).cpu()
        watch.weight[e] += routed.double().sum()
        watch.energy[e] += strength.double().square().sum()
        watch.width = hidden.shape[1]
        top = strength.topk(min(CANDIDATES, len(rows)))
        candidates = watch.strongest.get(e, []) + [(float(s), int(rows[i])) for s, i in zip(*top, strict=True)]
        watch.strongest[e] = sorted(candidates, reverse=True)[:CANDIDATES]
        if self.count and not any(owner == e for _, owner, _, _ in watch.probe_list):
            take = torch.randperm(len(rows), generator=self.generator)[: self.count]
            scaled = routed[take] if self.input_scaled else torch.ones(len(take))
            watch.probe_list.append((rows[take], e, scaled, output[take.to(output.device)].float().cpu()))

    def layer(self, layer: LayerPass) -> None:
        """Give a layer whose experts no token chose its zeros."""
        if layer.sparse:
            self._of(layer)

    def _of(self, layer: LayerPass) -> LayerWatch:
        assert layer.experts is not None
        if layer.index not in self.watches:
            zeros = torch.zeros(2, len(layer.experts), dtype=torch.float64)
            self.watches[layer.index] = LayerWatch(zeros[0], zeros[1])
        return self.watches[layer.index]
