"""Dense gated feed-forward networks as plain tensors: read from a model, evaluated, joined."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Gating = Callable[[Tensor, Tensor], Tensor]


def silu_glu(gate: Tensor, up: Tensor) -> Tensor:
    """The usual gated activation: silu(gate) * up."""
    return F.silu(gate) * up


class GatedFFN(Protocol):
    """A gated FFN in plain orientation: an expert of a teacher or a dense FFN of a student."""

    @property
    def gate(self) -> Tensor: ...  # [F, H]
    @property
    def up(self) -> Tensor: ...  # [F, H]
    @property
    def down(self) -> Tensor: ...  # [H, F]

    gate_bias: Tensor | None  # [F]
    up_bias: Tensor | None  # [F]
    down_bias: Tensor | None  # [H]

    def hidden(self, x: Tensor) -> Tensor: ...
    def __call__(self, x: Tensor) -> Tensor: ...


class Experts(Protocol):
    """The routed experts of a layer, read on demand: a list, or what a teacher streams."""

    def __len__(self) -> int: ...
    def __getitem__(self, expert: int, /) -> Any: ...


@dataclass
class DenseFFN:
    """A dense gated FFN: y = down(gating(gate x, up x)); weights in torch's Linear orientation."""

    gate: Tensor  # [M, H]
    up: Tensor  # [M, H]
    down: Tensor  # [H, M]
    gate_bias: Tensor | None = None  # [M]
    up_bias: Tensor | None = None  # [M]
    down_bias: Tensor | None = None  # [H]
    gating: Gating = silu_glu

    @property
    def width(self) -> int:
        """M, the number of neurons."""
        return self.gate.shape[0]

    def hidden(self, x: Tensor) -> Tensor:
        """Neuron activations [n, M] of inputs [n, H]."""
        return self.gating(F.linear(x, self.gate, self.gate_bias), F.linear(x, self.up, self.up_bias))

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs [n, H] of inputs [n, H]."""
        return F.linear(self.hidden(x), self.down, self.down_bias)

    def to(self, device: torch.device | str) -> "DenseFFN":
        """The same FFN on `device`; tensors that are there already are shared."""
        moved = [
            None if t is None else t.to(device)
            for t in (self.gate, self.up, self.down, self.gate_bias, self.up_bias, self.down_bias)
        ]
        return DenseFFN(*moved, gating=self.gating)  # type: ignore[arg-type]  # the first three are never None

    def parameters(self) -> list[Tensor]:
        """The tensors of the FFN, biases included where there are any."""
        every = (self.gate, self.up, self.down, self.gate_bias, self.up_bias, self.down_bias)
        return [p for p in every if p is not None]


def gating_of(ffn: GatedFFN) -> Gating:
    """The gated activation of a teacher's expert or a dense FFN."""
    return getattr(ffn, "gating", silu_glu)


def _plain(value: Tensor) -> Tensor:
    """A copy on the CPU, half precision as float32: students are built there."""
    half = value.dtype in (torch.bfloat16, torch.float16)
    return value.detach().to("cpu", torch.float32 if half else value.dtype, copy=True)


def dense(ffn: GatedFFN, scale: float = 1.0, rows: Tensor | None = None) -> DenseFFN:
    """A dense copy of a gated FFN (or of the neurons `rows`) on the CPU, its output multiplied by `scale`."""
    pick = slice(None) if rows is None else rows
    return DenseFFN(
        gate=_plain(ffn.gate[pick]),
        up=_plain(ffn.up[pick]),
        down=_plain(ffn.down[:, pick]) * scale,
        gate_bias=None if ffn.gate_bias is None else _plain(ffn.gate_bias[pick]),
        up_bias=None if ffn.up_bias is None else _plain(ffn.up_bias[pick]),
        down_bias=None if ffn.down_bias is None else _plain(ffn.down_bias) * scale,
        gating=gating_of(ffn),
    )


def _joined(parts: Sequence[Tensor | None], dim: int = 0) -> Tensor | None:
    present = [p for p in parts if p is not None]
    assert len(present) in (0, len(parts)), "experts with and without biases cannot be joined"
    return torch.cat(present, dim) if present else None


def concatenate(ffns: Sequence[DenseFFN]) -> DenseFFN:
    """The FFN whose output is the sum of the outputs of `ffns`: their neurons side by side, output biases added."""
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
