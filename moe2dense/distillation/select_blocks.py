"""Which blocks of the training text are worth training on.

divergence:SHARE  those on which the student is farthest from the teacher now
coreset:SHARE     a compact set that stands for all: greedy facility location over blocks, described by the teacher's mean final
                  hidden state and weighted by divergence. This is a choice among real blocks, the modest form of dataset distillation;
                  nothing is synthesised.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from moe2dense.data.blocks import Blocks
from moe2dense.errors import UserError
from moe2dense.losses.distillation import distillation_loss
from moe2dense.modeling.forward import evaluation_mode, final_hidden, model_inputs
from moe2dense.modeling.head import model_head

# N blocks, S block length, H teacher hidden

KINDS = ("divergence", "coreset")
_WITNESSES = 4096  # blocks that a coreset must stand for: a sample, beyond that


@dataclass(frozen=True)
class Selection:
    """kind: divergence or coreset; share of the blocks that is kept."""

    kind: str
    share: float


def parse_selection(text: str) -> Selection | None:
    """`divergence:0.5` -> Selection; '' -> None. Raises UserError."""
    if not text:
        return None
    kind, _, share = text.partition(":")
    try:
        value = float(share)
    except ValueError:
        value = 0.0
    if kind not in KINDS or not 0 < value <= 1:
        raise UserError(
            f"train.select must be divergence:SHARE or coreset:SHARE with a share in (0, 1]; found {text!r}"
        )
    return Selection(kind, value)


@torch.no_grad()
def block_divergence(model: Any, targets: Any, blocks: Blocks, batch: int = 8) -> Tensor:
    """Mean forward KL from teacher to student of every block [N], at the targets' temperature, over the positions that count."""
    device = next(model.parameters()).device
    found = torch.zeros(len(blocks))
    mask = blocks.loss_mask()
    for start in range(0, len(blocks), batch):
        rows = list(range(start, min(start + batch, len(blocks))))
        with evaluation_mode(model):
            hidden = final_hidden(model, model_inputs(blocks[rows], device)).flatten(0, 1)
        teacher = targets.batch(rows).to(device)
        length = mask.shape[1]
        for k, row in enumerate(rows):
            kept = (mask[row].nonzero()[:, 0] + k * length).to(device)
            if len(kept):
                softness = getattr(teacher, "temperature", 1.0)
                part = teacher.select(kept)
                loss = distillation_loss(hidden[kept], model_head(model), part, temperature=softness)
                found[row] = loss.kd / softness**2
    return found


def block_features(targets: Any, blocks: Blocks) -> Tensor:
    """The teacher's mean final hidden state of every block, centred and of unit length [N, H].

    Raises UserError for targets that hold no hidden states.
    """
    rows = []
    mask = blocks.loss_mask()
    for i in range(len(blocks)):
        hidden = getattr(targets.batch([i]), "hidden", None)
        if hidden is None:
            raise UserError('train.select coreset needs `hidden` targets; use train.target_format = "hidden"')
        rows.append(hidden[mask[i]].float().mean(0) if bool(mask[i].any()) else hidden.float().mean(0))
    features = torch.stack(rows)
    return normalize(features - features.mean(0), dim=-1)


def facility_location(features: Tensor, weights: Tensor, count: int) -> list[int]:
    """`count` rows that together lie closest to all: each next one raises sum_i w_i max_j cos(i, j) most. At least 1 - 1/e of the best.

    features [N, H] of unit length, weights [N] not negative (Nemhauser, Wolsey and Fisher 1978).
    """
    count = min(count, len(features))
    every = max(1, -(-len(features) // _WITNESSES))
    witnesses, w = features[::every], weights[::every].clamp(min=0)
    similarity = witnesses @ features.T  # [N, N], or a sample of its rows
    best = torch.full((len(witnesses),), -1.0)
    chosen: list[int] = []
    for _ in range(count):
        gain = w @ (similarity - best[:, None]).clamp(min=0)  # [N]
        gain[chosen] = -1.0
        chosen.append(int(gain.argmax()))
        best = torch.maximum(best, similarity[:, chosen[-1]])
    return chosen


def select_blocks(model: Any, targets: Any, blocks: Blocks, selection: Selection) -> tuple[list[int], Tensor]:
    """(rows that are kept, in order; divergence [N] of all). The teacher answered every block: what is saved is training, not teacher tokens."""
    divergence = block_divergence(model, targets, blocks)
    count = max(1, round(selection.share * len(blocks)))
    if selection.kind == "divergence":
        rows = divergence.topk(count).indices.tolist()
    else:
        rows = facility_location(block_features(targets, blocks), divergence, count)
    return sorted(rows), divergence
