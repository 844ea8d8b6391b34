"""Hold dense gated feed-forward networks as plain tensors: copied from a model, evaluated, joined."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moe2dense.common.counters import count_flops
from moe2dense.common.flops import product

Gating = Callable[[Tensor, Tensor], Tensor]


def silu_glu(gate: Tensor, up: Tensor) -> Tensor:
    """Return the usual gated activation, silu(gate) * up."""
    return F.silu(gate) * up


class GatedWeights(Protocol):
    """The weights of a gated FFN in plain orientation: an expert of a teacher, a dense FFN, or a part of one."""

    # [F], [F] and [H]
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None

    @property
    def gating(self) -> Gating:
        """The gated activation."""
        ...

    @property
    def gate(self) -> Tensor:
        """[F, H]"""
        ...

    @property
    def up(self) -> Tensor:
        """[F, H]"""
        ...

    @property
    def down(self) -> Tensor:
        """[H, F]"""
        ...


class GatedFFN(GatedWeights, Protocol):
    """A gated FFN that can be evaluated."""

    def hidden(self, x: Tensor) -> Tensor:
        """Return neuron activations [n, F] of inputs [n, H]."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """Return outputs [n, H] of inputs [n, H]."""
        ...


class Experts(Protocol):
    """The routed experts of a layer, read on demand: a list, or what a teacher streams."""

    def __len__(self) -> int: ...
    def __getitem__(self, expert: int, /) -> GatedWeights: ...


@dataclass
class DenseFFN:
    """A dense gated FFN: y = down(gating(gate x, up x)); weights in torch's Linear orientation."""

    # [M, H], [M, H] and [H, M]
    gate: Tensor
    up: Tensor
    down: Tensor
    # [M], [M] and [H]
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    gating: Gating = silu_glu

    @property
    def width(self) -> int:
        """M, the number of neurons."""
        return self.gate.shape[0]

    def hidden(self, x: Tensor) -> Tensor:
        """Return neuron activations [n, M] of inputs [n, H]."""
        self._count(x, 2, self.gate)
        return self.gating(F.linear(x, self.gate, self.gate_bias), F.linear(x, self.up, self.up_bias))

    def __call__(self, x: Tensor) -> Tensor:
        """Return outputs [n, H] of inputs [n, H]."""
        self._count(x, 1, self.down)
        return F.linear(self.hidden(x), self.down, self.down_bias)

    def _count(self, x: Tensor, matrices: int, weight: Tensor) -> None:
        """Count products of x [n, H] with matrices like `weight`, and their gradients where there will be any.

        gate and up pass no gradient on to inputs that have none.
        """
        passes = 1
        if torch.is_grad_enabled() and weight.requires_grad:
            passes = 3 if x.requires_grad or matrices == 1 else 2
        count_flops(passes * matrices * product(x.numel() // x.shape[-1], x.shape[-1], self.width), x.device.type)

    def to(self, device: torch.device | str) -> "DenseFFN":
        """Return the same FFN on `device`; tensors that are there already are shared."""
        moved = [
            None if t is None else t.to(device)
            for t in (self.gate, self.up, self.down, self.gate_bias, self.up_bias, self.down_bias)
        ]
        return DenseFFN(*moved, gating=self.gating)  # type: ignore[arg-type]  # the first three are never None

    def parameters(self) -> list[Tensor]:
        """Return the tensors of the FFN, biases included where there are any."""
        every = (self.gate, self.up, self.down, self.gate_bias, self.up_bias, self.down_bias)
        return [p for p in every if p is not None]


def _plain(value: Tensor) -> Tensor:
    """Copy a tensor where it is; half precision becomes float32."""
    half = value.dtype in (torch.bfloat16, torch.float16)
    return value.detach().to(torch.float32 if half else value.dtype, copy=True)


def dense(ffn: GatedWeights, scale: float = 1.0, rows: Tensor | None = None) -> DenseFFN:
    """Copy a gated FFN, or its neurons `rows`, in float32 or wider, its output multiplied by `scale`."""
    pick = slice(None) if rows is None else rows
    return DenseFFN(
        gate=_plain(ffn.gate[pick]),
        up=_plain(ffn.up[pick]),
        down=_plain(ffn.down[:, pick]) * scale,
        gate_bias=None if ffn.gate_bias is None else _plain(ffn.gate_bias[pick]),
        up_bias=None if ffn.up_bias is None else _plain(ffn.up_bias[pick]),
        down_bias=None if ffn.down_bias is None else _plain(ffn.down_bias) * scale,
        gating=ffn.gating,
    )


def _joined(parts: Sequence[Tensor | None], dim: int = 0) -> Tensor | None:
    present = [p for p in parts if p is not None]
    assert len(present) in (0, len(parts)), "experts with and without biases cannot be joined"
    return torch.cat(present, dim) if present else None


def concatenate(ffns: Sequence[DenseFFN]) -> DenseFFN:
    """Return the FFN whose output is the sum of those of `ffns`: their neurons side by side, output biases added."""
    biases = [f.down_bias for f in ffns if f.down_bias is not None]
    return DenseFFN(
        gate=torch.cat([f.gate for f in ffns]),
        up=torch.cat([f.up for f in ffns]),
        down=torch.cat([f.down for f in ffns], dim=1),
        gate_bias=_joined([f.gate_bias for f in ffns]),
        up_bias=_joined([f.up_bias for f in ffns]),
        down_bias=torch.stack(biases).sum(0) if biases else None,
        gating=ffns[0].gating,
    )
