"""The student's side of a comparison layer by layer: its FFN on the teacher's inputs, and its own residual stream."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe2dense.modeling.decoder import decoder_layers
from moe2dense.modeling.forward import final_hidden, model_inputs

# n tokens, H hidden, M student FFN width, D tokens followed through the depth


class StudentLayer:
    """One decoder layer's FFN, by the paths its card gives."""

    def __init__(self, layer: nn.Module, card: Any):
        self.layer, self.card = layer, card
        self.ffn = layer.get_submodule(card.ffn)
        try:
            down: Any = self.ffn.get_submodule(card.down)
        except AttributeError:
            down = None
        self.down: nn.Linear | None = down if isinstance(down, nn.Linear) else None

    @property
    def width(self) -> int | None:
        """Neurons, where they can be watched."""
        return None if self.down is None else self.down.in_features

    @torch.no_grad()
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(output [n, H], activations [n, M] or None) for FFN inputs [n, H]."""
        seen: list[Tensor] = []
        weight = next(self.ffn.parameters())
        handle = (
            self.down.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
            if self.down is not None
            else None
        )
        try:
            out = self.ffn(x[None].to(weight))
        finally:
            if handle is not None:
                handle.remove()
        out = out[0] if isinstance(out, tuple) else out
        return out.reshape(x.shape[0], -1).float(), seen[0].reshape(x.shape[0], -1).float() if seen else None


def teacher_norm(layer: nn.Module, residual: Tensor, x: Tensor) -> str | None:
    """Name of the child of the teacher's decoder layer that turns `residual` [n, H] into the FFN's input `x`, or None.

    Where two norms are equal (untrained ones) it is the later one; families declare the FFN's after the attention's.
    """
    found = None
    for name, child in layer.named_children():
        weight = getattr(child, "weight", None)
        if weight is None or weight.dim() != 1 or weight.shape[0] != x.shape[1]:
            continue
        if torch.allclose(child(residual.to(weight)).float(), x.float(), rtol=1e-3, atol=1e-4 * float(x.abs().max())):
            found = name
    return found


def ffn_input(layer: Any, student: nn.Module) -> tuple[Tensor, nn.Module | None]:
    """What a student's FFN is to be fed for a fair comparison: (tensor [T, H], norm to pass it through or None).

    Where the residual before the FFN is known (hidden_out - y) and a norm makes the FFN's input of it, the student's own
    norm is used, since training may have moved scale between norm and FFN; otherwise the teacher's FFN input as it is.
    """
    residual = layer.hidden_out.reshape(layer.x.shape) - layer.y
    probe = layer.token_mask.nonzero()[:8, 0]
    name = teacher_norm(layer.module, residual[probe], layer.x[probe])
    own = getattr(student, name, None) if name else None
    return (residual, own) if isinstance(own, nn.Module) else (layer.x, None)


@torch.no_grad()
def residual_streams(model: Any, blocks: Any, positions: Tensor) -> list[Tensor]:
    """The residual stream after each layer at `positions` of every block: L tensors [N * P, H]."""
    streams: list[Tensor] = []
    with _watched(
        decoder_layers(model), lambda out: streams.append(out[:, positions.to(out.device)].flatten(0, 1).float().cpu())
    ):
        final_hidden(model, model_inputs(blocks, next(model.parameters()).device))
    return streams


@contextmanager
def _watched(layers: nn.ModuleList, see: Any) -> Iterator[None]:
    def hook(_module: nn.Module, _args: Any, out: Any) -> None:
        see(out[0] if isinstance(out, tuple) else out)

    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
