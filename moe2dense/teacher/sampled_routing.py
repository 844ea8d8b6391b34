"""Draw experts from the router's distribution in the place of the likeliest ones (knowledge augmentation, 2502.12947).

The router weighs all experts; K of them are drawn one after the other without replacement, each with the weight of what is left, and
weighted as the family weighs the ones it chooses. Drawing is by perturbed weights (Gumbel top-k, 1903.06059).
"""

from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from moe2dense.common.seeds import uniforms


@dataclass(frozen=True)
class Resample:
    """Draws experts for the tokens of a layer.

    experts: K of each token; draw: number of this drawing; normalized: whether the weights of the chosen always add up to one constant.
    """

    experts: int
    normalized: bool
    draw: int = 0
    seed: int = 0

    def __call__(self, ids: Tensor, layer: int, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return (index, weights) [T, K] of what is drawn for blocks ids [n, S]; index, weights [T, E]: all experts of each token.

        What is drawn depends on the seed, the draw, the layer, the block's own ids and a token's place in it: not on the blocks beside it.
        """
        count = ids.shape[1] * index.shape[1]
        numbers = [xxhash.xxh3_64_intdigest(f"{self.draw} {layer} {row}".encode()) for row in ids.tolist()]
        drawn = torch.stack([torch.from_numpy(uniforms(self.seed, number, count)) for number in numbers])
        return choose_experts(index, weights, drawn.view(index.shape), self.experts, self.normalized)


def choose_experts(index: Tensor, weights: Tensor, u: Tensor, k: int, normalized: bool) -> tuple[Tensor, Tensor]:
    """Return (index, weights) [T, k] drawn without replacement, likeliest first, from weights [T, E] of the experts index [T, E].

    u [T, E]: uniform numbers in [0, 1), one for each expert.
    """
    noise = -(-u.clamp(min=1e-300).log()).log()  # of each expert, whatever its place in index
    keys = weights.double().clamp(min=0).log() + noise.gather(1, index.long())
    places = keys.topk(k, dim=1).indices
    places = places.gather(1, weights.gather(1, places).argsort(1, descending=True))
    chosen = weights.gather(1, places)
    if normalized:
        chosen = chosen * (weights.sum(1, keepdim=True) / chosen.sum(1, keepdim=True))
    return index.gather(1, places), chosen
