"""Choose the blocks of the training text that are worth training on.

divergence:SHARE  those on which the student is farthest from the teacher now
coreset:SHARE     a compact set that represents all: greedy facility location over blocks, described by the teacher's mean final
                  hidden state and weighted by divergence. Blocks are chosen, none is synthesised.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from moe2dense.data.blocks import Blocks
from moe2dense.distillation.targets.formats import written_temperature
from moe2dense.distillation.targets.protocols import Targets
from moe2dense.errors import UserError
from moe2dense.losses.distillation import distillation_loss
from moe2dense.losses.teacher_rows import HiddenRows
from moe2dense.modeling.forward import evaluation_mode, final_hidden, model_inputs
from moe2dense.modeling.head import model_head

# N blocks, S block length, H teacher hidden

SELECTION_KINDS = ("divergence", "coreset")
_MAX_REPRESENTED = 4096  # blocks that a coreset must represent: a sample, where there are more


@dataclass(frozen=True)
class Selection:
    """kind: divergence or coreset; share: of the blocks that are chosen."""

    kind: str
    share: float


def parse_selection(text: str) -> Selection | None:
    """Return the selection that `divergence:0.5` means, None for "". Raises UserError for anything else."""
    if not text:
        return None
    kind, _, share = text.partition(":")
    try:
        value = float(share)
    except ValueError:
        value = 0.0
    if kind not in SELECTION_KINDS or not 0 < value <= 1:
        raise UserError(
            f"train.select must be divergence:SHARE or coreset:SHARE with a share in (0, 1]; found {text!r}"
        )
    return Selection(kind, value)


@torch.no_grad()
def block_divergence(model: PreTrainedModel, targets: Targets, blocks: Blocks, batch: int = 8) -> Tensor:
    """Return the mean forward KL from teacher to student of every block [N].

    It is taken at the targets' temperature, over the positions that count.
    """
    device = next(model.parameters()).device
    divergences = torch.zeros(len(blocks))
    for start in range(0, len(blocks), batch):
        rows = list(range(start, min(start + batch, len(blocks))))
        part = blocks[rows]
        with evaluation_mode(model):
            hidden = final_hidden(model, model_inputs(part, device)).flatten(0, 1)
        teacher = targets.batch(rows).to(device)
        mask = part.loss_mask()
        length = mask.shape[1]
        for k, row in enumerate(rows):
            counted = (mask[k].nonzero()[:, 0] + k * length).to(device)
            if len(counted):
                temperature = written_temperature(teacher) or 1.0
                rows_counted = teacher.select(counted)
                loss = distillation_loss(hidden[counted], model_head(model), rows_counted, temperature=temperature)
                divergences[row] = loss.kd / temperature**2
    return divergences


def block_features(targets: Targets, blocks: Blocks) -> Tensor:
    """Return the teacher's mean final hidden state of every block, centred and of unit length [N, H].

    Raises UserError for targets that hold no hidden states.
    """
    rows = []
    for i in range(len(blocks)):
        mask = blocks[[i]].loss_mask()[0]
        answers = targets.batch([i])
        if not isinstance(answers, HiddenRows):
            raise UserError('train.select coreset needs `hidden` targets; use train.target_format = "hidden"')
        hidden = answers.hidden
        rows.append(hidden[mask].float().mean(0) if bool(mask.any()) else hidden.float().mean(0))
    features = torch.stack(rows)
    return normalize(features - features.mean(0), dim=-1)


def facility_location(features: Tensor, weights: Tensor, count: int) -> list[int]:
    """Choose `count` rows that together lie closest to all: each next one raises sum_i w_i max_j cos(i, j) most.

    features [N, H] of unit length, weights [N] not negative. The sum is at least 1 - 1/e of the best (Nemhauser, Wolsey and
    Fisher 1978).
    """
    count = min(count, len(features))
    every = max(1, -(-len(features) // _MAX_REPRESENTED))
    represented, w = features[::every], weights[::every].clamp(min=0)
    similarity = represented @ features.T  # [N, N], or a sample of its rows
    best = torch.full((len(represented),), -1.0)
    chosen: list[int] = []
    for _ in range(count):
        gain = w @ (similarity - best[:, None]).clamp(min=0)  # [N]
        gain[chosen] = -1.0
        chosen.append(int(gain.argmax()))
        best = torch.maximum(best, similarity[:, chosen[-1]])
    return chosen


def select_blocks(
    model: PreTrainedModel, targets: Targets, blocks: Blocks, selection: Selection
) -> tuple[list[int], Tensor]:
    """Return (the rows that are chosen, in order; divergence [N] of all).

    The teacher has answered every block: a selection saves training, not teacher tokens.
    """
    divergence = block_divergence(model, targets, blocks)
    count = max(1, round(selection.share * len(blocks)))
    if selection.kind == "divergence":
        rows = divergence.topk(count).indices.tolist()
    else:
        rows = facility_location(block_features(targets, blocks), divergence, count)
    return sorted(rows), divergence
