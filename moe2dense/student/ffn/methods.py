"""How a layer's FFN is made, by name: `--init BASE[+refit][+local]...`; `layerwise` is the whole recipe."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moe2dense.config.schema import BuildConfig
from moe2dense.errors import UserError
from moe2dense.student.ffn.align import aligned_average
from moe2dense.student.ffn.average import average
from moe2dense.student.ffn.cluster import cluster
from moe2dense.student.ffn.concat import concat
from moe2dense.student.ffn.dense import DenseFFN, Experts, Gating, concatenate, dense, silu_glu
from moe2dense.student.ffn.obs import eliminate
from moe2dense.student.ffn.randomized import pad, random_ffn
from moe2dense.student.ffn.refit import grams
from moe2dense.student.ffn.scores import best_experts
from moe2dense.student.ffn.select import best_neurons, gather, output_energy
from moe2dense.student.ffn.svd import svd_gather
from moe2dense.student.footprint import activation_bytes, pool_bytes
from moe2dense.student.init_spec import STEPS, parts, steps_of
from moe2dense.student.memory import device_with_room
from moe2dense.student.types import MIXED, NEW, SHARED, LayerProvenance
from moe2dense.teacher.routing import LayerStats

# T tokens, E experts, F expert width, M student FFN width


@dataclass
class Block:
    """What is known of one layer when its FFN is made. Tokens are real ones only."""

    width: int  # M
    hidden_size: int
    x: Tensor  # [T, H] what enters the student's FFN
    target: Tensor  # [T, H] what its FFN should write
    fixed: list[DenseFFN]  # FFNs that every token passes: shared experts, or the teacher's dense FFN
    experts: Experts = ()
    stats: LayerStats | None = None
    probability: Tensor | None = None  # [E] router probability summed over tokens
    input_scaled: bool = False
    seed: int = 0
    std: float = 0.02
    gating: Gating = silu_glu
    config: BuildConfig = field(default_factory=BuildConfig)
    pool_limit: int = 0  # most neurons a Gram matrix may have; 0 = no limit
    device: torch.device | str = "cpu"  # where Gram matrices are made and neurons eliminated, if there is room

    @property
    def alpha(self) -> Tensor:
        """[E] mean routing weight of each expert over all tokens."""
        assert self.stats is not None
        return self.stats.alpha.float()

    @property
    def fixed_width(self) -> int:
        """Neurons of the FFNs that every token passes."""
        return sum(f.width for f in self.fixed)

    def energies(self) -> list[Tensor]:
        """[F] for each expert: router-weighted energy that its neurons write to the output, summed over tokens."""
        assert self.stats is not None and self.stats.neuron_energy is not None
        if not hasattr(self, "_energies"):
            self._energies = [
                output_energy(self.stats.neuron_energy[e], self.experts[e].down) for e in range(len(self.experts))
            ]
        return self._energies


Method = Callable[[Block, int], tuple[DenseFFN, Tensor, Tensor]]  # routed budget -> FFN, source expert, source neuron


def _mixture(ffn: DenseFFN, kind: int = MIXED) -> tuple[DenseFFN, Tensor, Tensor]:
    return ffn, torch.full((ffn.width,), kind), torch.full((ffn.width,), -1)


def _trimmed(block: Block, ffn: DenseFFN, width: int) -> DenseFFN:
    """At most `width` neurons: those whose output has most energy on the block's inputs."""
    if ffn.width <= width:
        return ffn
    energy = output_energy(ffn.hidden(block.x[:8192]).pow(2).sum(0), ffn.down)
    return dense(ffn, rows=energy.topk(width).indices.sort().values)


def _random(block: Block, width: int) -> tuple[DenseFFN, Tensor, Tensor]:
    bias = bool(block.experts) and block.experts[0].down_bias is not None
    ffn = random_ffn(width, block.hidden_size, block.std, block.seed, bias=bias, gating=block.gating)
    return _mixture(ffn, NEW)


def _average(block: Block, width: int) -> tuple[DenseFFN, Tensor, Tensor]:
    return _mixture(_trimmed(block, average(block.experts, block.alpha), width))


def _weighted(block: Block, width: int) -> tuple[DenseFFN, Tensor, Tensor]:
    return _mixture(_trimmed(block, average(block.experts, block.alpha, weighted=True), width))


def _aligned(block: Block, width: int) -> tuple[DenseFFN, Tensor, Tensor]:
    return _mixture(_trimmed(block, aligned_average(block.experts, block.alpha), width))


def _svd(block: Block, width: int) -> tuple[DenseFFN, Tensor, Tensor]:
    return _mixture(_trimmed(block, svd_gather(block.experts, block.alpha), width))


def _cluster(block: Block, width: int) -> tuple[DenseFFN, Tensor, Tensor]:
    assert block.stats is not None
    count = max(1, -(-width // block.experts[0].gate.shape[0]))
    ffn, _ = cluster(block.experts, block.alpha, block.stats.mean_output, min(count, len(block.experts)))
    return _mixture(_trimmed(block, ffn, width))


def _concat(block: Block, width: int) -> tuple[DenseFFN, Tensor, Tensor]:
    """Whole experts; where the width is none of theirs, the last one's best neurons fill it."""
    assert block.stats is not None
    size = block.experts[0].gate.shape[0]
    count = min(len(block.experts), max(1, -(-width // size)))
    keep = best_experts(block.stats, count, block.config.score, block.probability)
    ffn = concat(block.experts, block.alpha, keep, block.config.scale)
    expert, neuron = keep.repeat_interleave(size), torch.arange(size).repeat(count)
    if ffn.width <= width:
        return ffn, expert, neuron
    scores = torch.cat([block.energies()[e] for e in keep.tolist()])
    rows = scores.topk(width).indices.sort().values
    return dense(ffn, rows=rows), expert[rows], neuron[rows]


def _gather(block: Block, expert: Tensor, neuron: Tensor) -> DenseFFN:
    """Neurons of the routed experts, writing with their experts' mean weight."""
    if not block.input_scaled:
        return gather(block.experts, expert, neuron, block.alpha)
    assert block.stats is not None
    weight, load = block.stats.mean_weight.float(), block.stats.load.float()
    ffn = gather(block.experts, expert, neuron, load)  # the routing weight multiplies the expert's input
    ffn.gate, ffn.up = ffn.gate * weight[expert, None], ffn.up * weight[expert, None]
    return ffn


def _select(block: Block, width: int) -> tuple[DenseFFN, Tensor, Tensor]:
    energies = block.energies()
    expert, neuron = best_neurons(energies, min(width, sum(len(e) for e in energies)))
    return _gather(block, expert, neuron), expert, neuron


def _obs(block: Block, width: int) -> tuple[DenseFFN, Tensor, Tensor]:
    """Elimination over a pool of neurons, preselected by energy where all would not fit in memory."""
    pool, expert, neuron = _select(block, block.pool_limit or sum(len(e) for e in block.energies()))
    fixed = concatenate(block.fixed) if block.fixed else None
    tokens = slice(0, block.config.gram_tokens or None)
    target = block.target[tokens]
    if fixed is not None:  # shared neurons stay whole; elimination works on what they leave over
        target = target - fixed(block.x[tokens])
    if pool.width <= width:
        return pool, expert, neuron
    need = pool_bytes(pool.width, block.hidden_size) + activation_bytes(pool.width, len(target))
    device, step = device_with_room(block.device, need), max(1, pool.width // 256)
    gram, cross = grams(replace(pool, down_bias=None), block.x[tokens], target, device=device)
    start = pool.down.T.to(device)
    keep = eliminate(gram, cross, start, min(width, pool.width), block.config.ridge, step, overwrite=True).cpu()
    return dense(pool, rows=keep), expert[keep], neuron[keep]


BASES: dict[str, Method] = {
    "random": _random,
    "average": _average,
    "weighted-average": _weighted,
    "aligned-average": _aligned,
    "svd": _svd,
    "concat": _concat,
    "cluster": _cluster,
    "select": _select,
    "obs": _obs,
}


def parse_method(init: str) -> tuple[str, list[str]]:
    """`obs+refit` -> ("obs", ["refit"]); `layerwise` is short for the default recipe. Raises UserError on an unknown part."""
    base, *steps = parts(init)
    if base not in BASES:
        raise UserError(f"init {init!r} starts with no known method; known: layerwise, {', '.join(BASES)}")
    for step in steps:
        if step not in STEPS:
            raise UserError(f"init {init!r}: {step!r} is no step that can follow a method; known: {', '.join(STEPS)}")
    return base, steps_of(init, healed=False)


def made_of_teacher(method: str) -> bool:
    """Whether a student of this method reads and writes the teacher's own residual stream: built, and no checkpoint of its own."""
    return method.split("+")[0] in ("layerwise", *BASES)


def make_ffn(block: Block, base: str) -> tuple[DenseFFN, LayerProvenance | None]:
    """The FFN of exactly `block.width` neurons that method `base` makes, and where its neurons come from.

    FFNs that every token passes come first, unscaled (not for `random`); the routed experts get the rest of the width; what no method fills is
    padded with neurons that write zero. A layer without routed experts keeps its own FFN.
    """
    parts: list[DenseFFN] = []
    sources: list[tuple[Tensor, Tensor]] = []
    if base == "random":
        ffn, expert, neuron = _random(block, block.width)
        return ffn, _provenance(block, expert, neuron)
    for ffn in block.fixed:
        kept = _trimmed(block, ffn, block.width - sum(p.width for p in parts))
        if kept.width:
            parts.append(kept)
            sources.append((torch.full((kept.width,), SHARED), torch.arange(kept.width)))
    left = block.width - sum(p.width for p in parts)
    if block.experts and left > 0:
        ffn, expert, neuron = BASES[base](block, left)
        parts.append(ffn)
        sources.append((expert, neuron))
    made = concatenate(parts)
    missing = block.width - made.width
    made = pad(made, block.width, block.std, block.seed)
    sources.append((torch.full((missing,), NEW), torch.full((missing,), -1)))
    expert, neuron = (torch.cat(column) for column in zip(*sources, strict=True))
    return made, _provenance(block, expert, neuron)


def _provenance(block: Block, expert: Tensor, neuron: Tensor) -> LayerProvenance | None:
    if not block.experts:
        return None
    energies = torch.stack(block.energies()).float()  # [E, F]
    total, kept = energies.sum(1), torch.zeros(len(energies))
    routed = expert >= 0
    kept.index_add_(0, expert[routed], energies[expert[routed], neuron[routed]])
    mixed = int((expert == MIXED).sum())
    if mixed:  # an average holds 1/E of each neuron that went into it
        kept += total * min(1.0, mixed / energies.numel())
    return LayerProvenance(expert, neuron, total, kept)
