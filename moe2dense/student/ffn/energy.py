"""Measure the energy that neurons write to a layer's output, and keep the neurons of highest energy."""

from torch import Tensor

from moe2dense.common.processes import add_over_processes
from moe2dense.common.shared_rows import share_of_rows
from moe2dense.student.ffn.dense import DenseFFN, dense

# T tokens, F or M neurons, H hidden
_SCORED_TOKENS = 8192


def output_energy(energy: Tensor, down: Tensor) -> Tensor:
    """Return the energy [F] that neurons write: their activation energy [F] times the squared norms of down's [H, F] columns."""
    return energy * down.pow(2).sum(0).to(energy)


def trim_to_width(ffn: DenseFFN, x: Tensor, width: int) -> DenseFFN:
    """Return at most `width` neurons of an FFN: those whose output has most energy on its inputs x [T, H], of all processes."""
    if ffn.width <= width:
        return ffn
    scored = x[: share_of_rows(len(x)).of_first(_SCORED_TOKENS)]
    energy = output_energy(ffn.hidden(scored.to(ffn.gate)).pow(2).sum(0), ffn.down)
    add_over_processes(energy)
    return dense(ffn, rows=energy.topk(width).indices.sort().values)
