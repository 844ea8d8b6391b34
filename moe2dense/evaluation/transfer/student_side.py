"""The student's side of a comparison layer by layer: its FFN on the teacher's inputs, and its own residual stream."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe2dense.data.blocks import Blocks
from moe2dense.families.cards import StudentCard
from moe2dense.modeling.decoder import decoder_layers
from moe2dense.modeling.forward import final_hidden, model_inputs
from moe2dense.modeling.hooks import first_tensor
from moe2dense.teacher.layer_pass import LayerPass

# n tokens, H hidden, M student FFN width, D tokens followed through the depth


class StudentLayer:
    """One decoder layer's FFN, by the paths its card gives."""

    def __init__(self, layer: nn.Module, card: StudentCard):
        self.layer = layer
        self.ffn = layer.get_submodule(card.ffn)
        down = dict(self.ffn.named_modules()).get(card.down)
        self.down = down if isinstance(down, nn.Linear) else None

    @property
    def width(self) -> int | None:
        """Neurons, where they can be watched."""
        return None if self.down is None else self.down.in_features

    @torch.no_grad()
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (output [n, H], activations [n, M] or None) for FFN inputs [n, H]."""
        activations: list[Tensor] = []
        weight = next(self.ffn.parameters())
        handle = None
        if self.down is not None:
            handle = self.down.register_forward_pre_hook(lambda _module, args: activations.append(args[0]))
        try:
            output = first_tensor(self.ffn(x[None].to(weight)))
        finally:
            if handle is not None:
                handle.remove()
        rows = x.shape[0]
        return output.reshape(rows, -1).float(), activations[0].reshape(rows, -1).float() if activations else None


@dataclass(frozen=True)
class FFNInput:
    """What a student's FFN is fed for a fair comparison: a tensor [T, H] and the norm it passes, where there is one."""

    tensor: Tensor
    norm: nn.Module | None

    def at(self, rows: Tensor) -> Tensor:
        """Return the input [n, H] at some tokens."""
        x = self.tensor[rows]
        return x if self.norm is None else self.norm(x.to(next(self.norm.parameters())))


def ffn_input(layer: LayerPass, student: nn.Module) -> FFNInput:
    """Return what the FFN of the student's decoder layer is to be fed.

    Where the residual before the FFN is known (hidden_out - y) and a norm makes the FFN's input of it, the student's own
    norm is used, since training may have moved scale between norm and FFN; otherwise the teacher's FFN input as it is.
    """
    residual = layer.hidden_out.reshape(layer.x.shape) - layer.y
    probe = layer.token_mask.nonzero()[:8, 0]
    name = teacher_norm(layer.module, residual[probe], layer.x[probe])
    norm = dict(student.named_children()).get(name) if name else None
    return FFNInput(layer.x, None) if norm is None else FFNInput(residual, norm)


def teacher_norm(layer: nn.Module, residual: Tensor, x: Tensor) -> str | None:
    """Return the name of the child of the teacher's decoder layer that turns `residual` [n, H] into the FFN's input `x`.

    None where no child does. Where two norms are equal (untrained ones) it is the later one; families declare the FFN's
    after the attention's.
    """
    match = None
    for name, child in layer.named_children():
        weight = getattr(child, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 1 or weight.shape[0] != x.shape[1]:
            continue
        if torch.allclose(child(residual.to(weight)).float(), x.float(), rtol=1e-3, atol=1e-4 * float(x.abs().max())):
            match = name
    return match


@torch.no_grad()
def residual_streams(model: nn.Module, blocks: Blocks, positions: Tensor) -> list[Tensor]:
    """Return the residual stream after each layer at `positions` of every block: L tensors [N * P, H]."""
    streams: list[Tensor] = []

    def keep(stream: Tensor) -> None:
        streams.append(stream[:, positions.to(stream.device)].flatten(0, 1).float().cpu())

    with _watched(decoder_layers(model), keep):
        final_hidden(model, model_inputs(blocks, next(model.parameters()).device))
    return streams


@contextmanager
def _watched(layers: nn.ModuleList, keep: Callable[[Tensor], None]) -> Iterator[None]:
    """Call `keep` with the output of every layer that runs within the context."""
    handles = [layer.register_forward_hook(lambda _module, _args, out: keep(first_tensor(out))) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
