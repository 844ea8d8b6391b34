"""The student's side of a comparison layer by layer: its FFN on the teacher's inputs, and its own residual stream."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe2dense.common.counters import count_flops
from moe2dense.common.flops import product
from moe2dense.data.blocks import Blocks
from moe2dense.errors import UserError
from moe2dense.families.cards import StudentCard
from moe2dense.modeling.decoder import decoder_layers
from moe2dense.modeling.forward import evaluation_mode, final_hidden, model_inputs
from moe2dense.modeling.hooks import first_tensor
from moe2dense.teacher.layer_pass import LayerPass

# n tokens, H hidden, M student FFN width, D tokens followed through the depth

BATCH = 8  # blocks that a student runs at once


class StudentLayer:
    """One decoder layer's FFN and the norm before it, by the paths its card gives.

    multiplier: what the FFN's output is multiplied with when it joins the residual stream.
    """

    def __init__(self, layer: nn.Module, card: StudentCard, multiplier: float = 1.0):
        self.layer, self.card, self.multiplier = layer, card, multiplier
        self.ffn = layer.get_submodule(card.ffn)
        down = dict(self.ffn.named_modules()).get(card.down)
        self.down = down if isinstance(down, nn.Linear) else None
        self.norm = dict(layer.named_children()).get(card.norm)
        if card.norm and self.norm is None:
            children = ", ".join(name for name, _ in layer.named_children())
            raise UserError(
                f"card {card.name}: a decoder layer has no norm {card.norm!r} (found {children}); set `norm`"
            )

    @property
    def width(self) -> int | None:
        """Neurons, where they can be watched."""
        return None if self.down is None else self.down.in_features

    @torch.no_grad()
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (output [n, H], activations [n, M] or None) for FFN inputs [n, H]."""
        activations: list[Tensor] = []
        weight = next(self.ffn.parameters())
        matrices = sum(p.numel() for p in self.ffn.parameters() if p.dim() > 1)
        count_flops(product(len(x), 1, matrices), weight.device.type)
        handle = None
        if self.down is not None:
            handle = self.down.register_forward_pre_hook(lambda _module, args: activations.append(args[0]))
        try:
            output = self._run(x.to(weight))
        finally:
            if handle is not None:
                handle.remove()
        rows = x.shape[0]
        return output.reshape(rows, -1).float(), activations[0].reshape(rows, -1).float() if activations else None

    def _run(self, x: Tensor) -> Tensor:
        """Return the FFN's output for x [n, H]; where experts alone are the FFN, every token passes the first with weight one."""
        if not self.card.moe_shaped or self.card.experts:
            return first_tensor(self.ffn(x[None]))
        first = torch.zeros(len(x), 1, dtype=torch.int64, device=x.device)
        return self.ffn(x, first, torch.ones_like(x[:, :1]))


@dataclass(frozen=True)
class FFNInput:
    """What a student's FFN is fed for a fair comparison at a layer of the teacher.

    That is the teacher's residual stream before its FFN, through the student's own norm, since training may have moved scale
    between norm and FFN; where no norm stands before the FFN, the teacher's FFN input.
    """

    layer: LayerPass
    student: StudentLayer

    def at(self, rows: Tensor) -> Tensor:
        """Return the input [n, H] at some tokens."""
        if self.student.norm is None:
            return self.layer.x[rows]
        weight = next(self.student.norm.parameters())
        return self.student.norm(self._residual(rows).to(weight))

    def _residual(self, rows: Tensor) -> Tensor:
        """Return the teacher's residual stream before the FFN [n, H] at some tokens, in float32."""
        layer = self.layer
        if self.student.card.join == "parallel":
            return layer.hidden_in.reshape(layer.x.shape)[rows].float()
        added = self.student.multiplier * layer.y[rows].float()
        return layer.hidden_out.reshape(layer.x.shape)[rows].float().to(added.device) - added


@torch.no_grad()
def residual_streams(model: nn.Module, blocks: Blocks, positions: Tensor, batch: int = BATCH) -> list[Tensor]:
    """Return the residual stream after each layer at `positions` of every block: L tensors [N * P, H].

    Runs `batch` blocks at a time.
    """
    streams: list[list[Tensor]] = [[] for _ in decoder_layers(model)]
    device = next(model.parameters()).device

    def keep(index: int, stream: Tensor) -> None:
        streams[index].append(stream[:, positions.to(stream.device)].flatten(0, 1).float().cpu())

    with _watched(decoder_layers(model), keep), evaluation_mode(model):
        for i in range(0, len(blocks), batch):
            final_hidden(model, model_inputs(blocks[i : i + batch], device))
    return [torch.cat(parts) for parts in streams]


@contextmanager
def _watched(layers: nn.ModuleList, keep: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `keep` with the number and the output of every layer that runs within the context."""

    def hook(index: int) -> Callable[..., None]:
        return lambda _module, _args, output: keep(index, first_tensor(output))

    handles = [layer.register_forward_hook(hook(i)) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
