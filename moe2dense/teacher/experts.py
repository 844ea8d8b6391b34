"""One expert as a plain gated FFN, and the experts of a layer on demand."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from moe2dense.common.counters import count_bus, count_flops
from moe2dense.common.flops import product
from moe2dense.modeling.gated_ffn import Gating
from moe2dense.teacher.buffers import Scratch
from moe2dense.teacher.parameters import Layout, Weights

_SLICE_BYTES = 8_000_000  # matrices are converted to the compute dtype and multiplied in slices of this size
_ACTIVATION_BYTES = 128_000_000  # of the neurons of a slice, at once


class ExpertWeights:
    """One gated FFN in plain orientation whatever its layout on disk: gate [F, H], up [F, H], down [H, F], optional biases.

    Matrices are kept as stored and converted to `dtype` when used, so an expert costs its size on disk.
    """

    def __init__(
        self,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        gating: Gating,
        dtype: torch.dtype = torch.float32,
        biases: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    ):
        self.stored = (gate, up, down)
        self.gating, self.dtype = gating, dtype
        self.gate_bias, self.up_bias, self.down_bias = (None if b is None else b.to(dtype) for b in biases)

    @property
    def gate(self) -> Tensor:
        """[F, H]"""
        return self.stored[0].to(self.dtype)

    @property
    def up(self) -> Tensor:
        """[F, H]"""
        return self.stored[1].to(self.dtype)

    @property
    def down(self) -> Tensor:
        """[H, F]"""
        return self.stored[2].to(self.dtype)

    @property
    def width(self) -> int:
        """Number of neurons F."""
        return self.stored[0].shape[0]

    def _spans(self) -> list[slice]:
        """Return slices of the neurons that are worked on at once: several in fp32 and above, where adding up their outputs is exact enough."""
        exact = self.dtype.itemsize >= 4
        step = max(1, _SLICE_BYTES // (self.stored[0].shape[1] * self.dtype.itemsize)) if exact else self.width
        return [slice(a, min(a + step, self.width)) for a in range(0, self.width, step)]

    def _converted(self, which: int, span: slice, scratch: Scratch) -> Tensor:
        """Return neurons `span` of gate (0) or up (1) [f, H], or of down (2) [H, f], in the compute dtype."""
        stored = self.stored[which]
        part = stored[:, span] if which == 2 else stored[span]
        if part.dtype == self.dtype:
            return part
        return scratch.take(f"matrix{which}", tuple(part.shape), self.dtype, part.device).copy_(part)

    def _neurons(self, x: Tensor, span: slice, scratch: Scratch) -> Tensor:
        """Return the activations [n, f] of some neurons for x [n, H]."""
        projections = []
        for which, bias in enumerate((self.gate_bias, self.up_bias)):
            matrix = self._converted(which, span, scratch)
            out = scratch.take(f"neurons{which}", (len(x), len(matrix)), self.dtype, x.device)
            torch.mm(x, matrix.T, out=out)
            projections.append(out if bias is None else out.add_(bias[span]))
        return self.gating(*projections)

    def _add_output(self, hidden: Tensor, span: slice, y: Tensor, scratch: Scratch) -> None:
        """Set y [n, H] to what the first neurons contribute, or add what others do."""
        torch.addmm(y, hidden, self._converted(2, span, scratch).T, beta=int(span.start > 0), out=y)

    def hidden(self, x: Tensor, scratch: Scratch | None = None) -> Tensor:
        """Return the neuron activations [n, F] of x [n, H]: silu(gate x) * (up x), or the family's own gating."""
        if torch.is_grad_enabled() and x.requires_grad:
            return self.gating(linear(x, self.gate, self.gate_bias), linear(x, self.up, self.up_bias))
        self._count(x, 2)
        scratch = scratch or Scratch()
        hidden = scratch.take("hidden", (len(x), self.width), self.dtype, x.device)
        for span in self._spans():
            hidden[:, span] = self._neurons(x, span, scratch)
        return hidden

    def output(self, hidden: Tensor, scratch: Scratch | None = None) -> Tensor:
        """Return the down projection [n, H] of activations [n, F], its bias included."""
        if torch.is_grad_enabled() and hidden.requires_grad:
            return linear(hidden, self.down, self.down_bias)
        self._count(hidden, 1)
        scratch = scratch or Scratch()
        y = scratch.take("y", (len(hidden), len(self.stored[2])), self.dtype, hidden.device)
        for span in self._spans():
            self._add_output(hidden[:, span], span, y, scratch)
        return y if self.down_bias is None else y.add_(self.down_bias)

    def __call__(self, x: Tensor, scratch: Scratch | None = None) -> Tensor:
        """Return f(x) [n, H] of x [n, H]; neither converted matrices nor activations ever exist whole.

        With a `scratch` the result lies in its memory and lasts until its next use.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            return self.output(self.hidden(x))
        self._count(x, 3)
        scratch, spans = scratch or Scratch(), self._spans()
        y = scratch.take("y", (len(x), len(self.stored[2])), self.dtype, x.device)
        rows = max(256, _ACTIVATION_BYTES // ((spans[0].stop - spans[0].start) * self.dtype.itemsize))
        for x_n, y_n in zip(x.split(rows), y.split(rows), strict=True):
            for span in spans:
                self._add_output(self._neurons(x_n, span, scratch), span, y_n, scratch)
        return y if self.down_bias is None else y.add_(self.down_bias)

    def _count(self, rows: Tensor, matrices: int) -> None:
        """Count the products of rows [n, ..] with so many of the matrices."""
        count_flops(matrices * product(len(rows), self.width, len(self.stored[2])), rows.device.type)

    def tensors(self) -> list[Tensor]:
        """Return its matrices, and the biases that it has."""
        biases = (self.gate_bias, self.up_bias, self.down_bias)
        return [*self.stored, *(b for b in biases if b is not None)]

    @property
    def device(self) -> torch.device:
        """Where its matrices are."""
        return self.stored[0].device

    def to(self, device: torch.device | str) -> "ExpertWeights":
        """Return the same expert with its matrices on `device`; to a GPU they travel while the CPU goes on."""
        on_gpu = torch.device(device).type == "cuda"
        if self.device.type != torch.device(device).type:
            count_bus(sum(t.nbytes for t in self.stored))
        g, u, d = (t.to(device, non_blocking=on_gpu) for t in self.stored)
        biases = tuple(None if b is None else b.to(device) for b in (self.gate_bias, self.up_bias, self.down_bias))
        return ExpertWeights(g, u, d, self.gating, self.dtype, biases)  # type: ignore[arg-type]

    def times(self, factor: float) -> "ExpertWeights":
        """Return the expert whose output is `factor` times this one's."""
        gate, up, down = self.stored
        bias = None if self.down_bias is None else self.down_bias * factor
        biases = (self.gate_bias, self.up_bias, bias)
        return ExpertWeights(gate, up, down * factor, self.gating, self.dtype, biases)

    def resident(self) -> "ExpertWeights":
        """Return the same expert with its matrices in the compute dtype."""
        g, u, d = self.gate.contiguous(), self.up.contiguous(), self.down.contiguous()
        return ExpertWeights(g, u, d, self.gating, self.dtype, (self.gate_bias, self.up_bias, self.down_bias))


@dataclass
class SharedFFN:
    """A dense FFN that every token passes inside a MoE block; `gate` [H] is its sigmoid gate, where it has one."""

    weights: ExpertWeights
    gate: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        y = self.weights(x)
        return y if self.gate is None else y * torch.sigmoid(x @ self.gate)[:, None]


@dataclass(frozen=True)
class Routing:
    """Which rows of a macro-batch each expert gets: rows sorted by expert, in token order within one."""

    rows: Tensor  # [R] flat token index
    slots: Tensor  # [R] which of the token's K choices this is
    starts: list[int]  # [E + 1]

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Return (rows [n], slots [n]) of one expert."""
        a, b = self.starts[expert], self.starts[expert + 1]
        return self.rows[a:b], self.slots[a:b]

    def hit(self) -> list[int]:
        """Return the experts that at least one token chose."""
        return [e for e in range(len(self.starts) - 1) if self.starts[e + 1] > self.starts[e]]


def route(index: Tensor, token_mask: Tensor, experts: int) -> Routing:
    """Group the choices `index` [T, K] of the real tokens (`token_mask` [T]) by expert."""
    real = token_mask.nonzero()[:, 0]
    flat = index[real].flatten()
    order = torch.argsort(flat, stable=True)
    k = index.shape[1]
    starts = torch.zeros(experts + 1, dtype=torch.int64)
    starts[1:] = torch.bincount(flat, minlength=experts).cumsum(0).cpu()
    return Routing(real[order // k], order % k, starts.tolist())


def _halves(both: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return (gate, up) of what holds both along its first axis."""
    return (both[0::2], both[1::2]) if interleaved else both.chunk(2)  # type: ignore[return-value]


class LayerExperts:
    """The routed experts of one layer: `len()` of them, `experts[e]` read on demand (or from memory when resident)."""

    def __init__(self, weights: Weights, prefix: str, count: int, layout: Layout, gating: Gating, dtype: torch.dtype):
        self.weights, self.prefix, self.count, self.layout = weights, prefix, count, layout
        self.gating, self.dtype = gating, dtype
        self.device: torch.device | str = "cpu"
        self.width = 0  # neurons of one expert
        self.keep: dict[int, ExpertWeights] | None = None  # filled when the teacher stays in memory
        self.stacked: Any = None  # the module that holds all experts in memory, once a grouped backend has filled it
        self.cache: dict[int, ExpertWeights] = {}  # as read from disk, until the layer is given back
        self.cache_bytes = 0  # that it may still take

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, expert: int) -> ExpertWeights:
        if not 0 <= expert < self.count:
            raise IndexError(f"expert {expert} of {self.count}")
        if self.keep is not None and expert in self.keep:
            return self.keep[expert]
        if self.stacked is not None:
            return self._view(expert)
        stored = self.cache.get(expert)
        weights = (self.read(expert) if stored is None else stored).to(self.device)
        if self.keep is not None:
            weights = self.keep[expert] = weights.resident()
        return weights

    def remember(self, expert: int, weights: ExpertWeights) -> bool:
        """Keep an expert as it was read, where there is room; return whether it is kept, and its memory with it."""
        size = sum(matrix.nbytes for matrix in weights.stored)
        if self.cache_bytes < size:
            return False
        self.cache_bytes -= size
        self.cache[expert] = weights
        return True

    def forget(self) -> None:
        """Free what was kept of the experts as they were read."""
        self.cache, self.cache_bytes = {}, 0

    def _view(self, expert: int) -> ExpertWeights:
        """Return one of the stacked experts, sharing their memory."""
        both, down = self.stacked.gate_up_proj[expert], self.stacked.down_proj[expert]
        if self.layout.transposed:
            both, down = both.mT, down.mT
        gate, up = _halves(both, self.layout.interleaved)
        gate_bias = up_bias = down_bias = None
        if getattr(self.stacked, "gate_up_proj_bias", None) is not None:
            gate_bias, up_bias = _halves(self.stacked.gate_up_proj_bias[expert], self.layout.interleaved)
            down_bias = self.stacked.down_proj_bias[expert]
        return ExpertWeights(gate, up, down, self.gating, self.dtype, (gate_bias, up_bias, down_bias))

    def __iter__(self) -> Iterator[ExpertWeights]:
        return (self[e] for e in range(self.count))

    def nbytes(self, expert: int) -> int:
        """Return the stored bytes of one expert's matrices."""
        w = self.weights
        return sum(
            w.source_bytes(s, True)
            for part in ("gate_up_proj", "down_proj")
            for s in w.expert_sources(self.prefix + part, expert)
        )

    def read(self, expert: int, buffer: Tensor | None = None) -> ExpertWeights:
        """Read one expert from disk; with `buffer` (uint8), its matrices are views of it and last as long as it is left alone."""
        w, name = self.weights, self.prefix
        head = sum(w.source_bytes(s, True) for s in w.expert_sources(name + "gate_up_proj", expert))
        first, second = (None, None) if buffer is None else (buffer[:head], buffer[head:])
        gate, up = w.gate_up(name + "gate_up_proj", expert, self.layout, first)
        down = w.down(name + "down_proj", expert, self.layout, second)
        both = w.bias(name + "gate_up_proj_bias", expert)
        gate_bias = up_bias = None
        if both is not None:
            gate_bias, up_bias = _halves(both, self.layout.interleaved)
        biases = (gate_bias, up_bias, w.bias(name + "down_proj_bias", expert))
        return ExpertWeights(gate, up, down, self.gating, self.dtype, biases)
