"""Keep an optimiser's moments in eight bits: groups of 256 numbers share a scale, and roots spread the codes over many sizes.

Block-wise scales follow Dettmers et al. (2110.02861). Moments span many orders of magnitude, so the first is stored as its square
root and the second, which divides the step, as its fourth root and never as zero.
"""

import torch
from torch import Tensor

_GROUP = 256  # numbers that share a scale
_LEAST = 4096  # tensors of fewer numbers stay as they are
CODES, SCALES = "codes", "scales"
# moments that may be packed: their power, and whether they have a sign
_ROOTS = {"exp_avg": (2, True), "exp_avg_sq": (4, False), "momentum_buffer": (2, True)}


def pack(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a parameter's state with its large moments as `NAME.codes` and `NAME.scales`."""
    packed: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in _ROOTS and value.numel() >= _LEAST:
            packed[f"{name}.{CODES}"], packed[f"{name}.{SCALES}"] = _coded(value, *_ROOTS[name])
        else:
            packed[name] = value
    return packed


def unpack(packed: dict[str, Tensor], shape: torch.Size) -> dict[str, Tensor]:
    """Return the state that `pack` was given, its moments in float32 of this shape."""
    state: dict[str, Tensor] = {}
    for name, value in packed.items():
        moment, _, part = name.partition(".")
        if part == CODES:
            state[moment] = _decoded(value, packed[f"{moment}.{SCALES}"], *_ROOTS[moment]).view(shape)
        elif part != SCALES:
            state[name] = value
    return state


def _in_groups(value: Tensor) -> Tensor:
    """Return a tensor's numbers as [groups, 256], zeros after the last."""
    flat = value.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % _GROUP)).view(-1, _GROUP)


def _coded(value: Tensor, root: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Return (codes, one for each number, scales [groups])."""
    groups = _in_groups(value.float())
    scales = groups.abs().amax(1)
    share = (groups.abs() / scales.clamp_min(1e-38)[:, None]).pow_(1 / root)
    if signed:
        codes = (share.mul_(127).round_() * groups.sign()).to(torch.int8)
    else:
        codes = torch.where(groups > 0, share.mul_(255).round_().clamp_(min=1), 0.0).to(torch.uint8)
    return codes.view(-1)[: value.numel()].clone(), scales


def _decoded(codes: Tensor, scales: Tensor, root: int, signed: bool) -> Tensor:
    share = _in_groups(codes.float()) / (127 if signed else 255)
    value = share.abs().pow_(root) * scales[:, None]
    value = value * share.sign() if signed else value
    return value.view(-1)[: codes.numel()]
