"""Measure the energy that neurons write to a layer's output, and keep the neurons of highest energy."""

from torch import Tensor

from moe2dense.student.ffn.dense import DenseFFN, dense

# T tokens, F or M neurons, H hidden
_SCORED_TOKENS = 8192


def output_energy(energy: Tensor, down: Tensor) -> Tensor:
    """Return the energy [F] that neurons write: their activation energy [F] times the squared norms of down's [H, F] columns."""
    return energy * down.pow(2).sum(0).to(energy)


def trim_to_width(ffn: DenseFFN, x: Tensor, width: int) -> DenseFFN:
    """Return at most `width` neurons of an FFN: those whose output has most energy on its inputs x [T, H]."""
    if ffn.width <= width:
        return ffn
    energy = output_energy(ffn.hidden(x[:_SCORED_TOKENS].to(ffn.gate)).pow(2).sum(0), ffn.down)
    return dense(ffn, rows=energy.topk(width).indices.sort().values)
