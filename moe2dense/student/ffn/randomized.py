"""Draw random FFNs: the method `random`, the control of every table, and neurons that pad a narrow FFN."""

import torch

from moe2dense.student.ffn.dense import DenseFFN, Gating, silu_glu
from moe2dense.student.ffn.task import FFNTask, SourcedFFN, without_source
from moe2dense.student.types import NEW


def random_ffn(
    width: int, hidden_size: int, std: float = 0.02, seed: int = 0, bias: bool = False, gating: Gating = silu_glu
) -> DenseFFN:
    """Return a gated FFN of `width` neurons with weights from N(0, std^2) and zero biases, as transformers initialises one."""
    generator = torch.Generator().manual_seed(seed)
    gate, up, down = (
        torch.randn(shape, generator=generator) * std
        for shape in ((width, hidden_size), (width, hidden_size), (hidden_size, width))
    )
    biases = (torch.zeros(width), torch.zeros(width), torch.zeros(hidden_size)) if bias else (None, None, None)
    return DenseFFN(gate, up, down, *biases, gating=gating)


def pad(ffn: DenseFFN, width: int, std: float = 0.02, seed: int = 0) -> DenseFFN:
    """Widen `ffn` to `width` neurons with the same output: new neurons read at random, so that they can learn, and write zero.

    Return it unchanged where the width is not above its own.
    """
    extra = width - ffn.width
    if extra <= 0:
        return ffn
    new = random_ffn(extra, ffn.gate.shape[1], std, seed, gating=ffn.gating)
    zeros = torch.zeros(extra)
    return DenseFFN(
        gate=torch.cat([ffn.gate, new.gate.to(ffn.gate)]),
        up=torch.cat([ffn.up, new.up.to(ffn.up)]),
        down=torch.cat([ffn.down, torch.zeros_like(new.down).to(ffn.down)], dim=1),
        gate_bias=None if ffn.gate_bias is None else torch.cat([ffn.gate_bias, zeros.to(ffn.gate_bias)]),
        up_bias=None if ffn.up_bias is None else torch.cat([ffn.up_bias, zeros.to(ffn.up_bias)]),
        down_bias=ffn.down_bias,
        gating=ffn.gating,
    )


def random_method(task: FFNTask, width: int) -> SourcedFFN:
    """Return new neurons, with biases where the experts have some."""
    bias = bool(task.experts) and task.experts[0].down_bias is not None
    ffn = random_ffn(width, task.hidden_size, task.std, task.seed, bias=bias, gating=task.gating)
    return without_source(ffn, NEW)
