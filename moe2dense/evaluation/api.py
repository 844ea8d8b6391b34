"""`evaluate`: the numbers of one model against its teacher on a held-out text."""

from typing import Any

import torch
from torch import Tensor

from moe2dense.errors import UserError
from moe2dense.evaluation import token_metrics as metrics
from moe2dense.evaluation.bootstrap import Bootstrap
from moe2dense.evaluation.reference import Reference, _hidden, reference
from moe2dense.evaluation.scores import Scores, summarise
from moe2dense.modeling.head import output_head


@torch.no_grad()
def evaluate(
    student: Any,
    teacher: Any = None,
    data: Any = None,
    targets: Any = None,
    *,
    batch: int = 8,
    bootstrap: int = 1000,
    seed: int = 0,
    token_counts: Tensor | None = None,
    progress: Any = None,
) -> Scores:
    """Judge `student` (a Student, a transformers model, or a Reference) against `teacher` on the blocks `data`.

    teacher: a Teacher, a transformers model, or a Reference made once for several students. targets: stored hidden
    targets of these blocks in its place. token_counts [V]: how often each id occurs in the training text, for the
    deciles of token frequency; by default counted on `data`. Judged are the positions whose next token is known.
    Raises UserError where there is nothing to judge or no teacher.
    """
    ref = _reference_of(teacher, data, targets, batch)
    blocks = ref.blocks
    keep = metrics.scored_positions(blocks)
    if not keep.any():
        raise UserError("data: no position to judge; every block needs at least two real tokens of one document")
    own = student if isinstance(student, Reference) else None
    model: Any = getattr(student, "model", None) if hasattr(student, "provenance") else student
    head = own.head if own else output_head(model)
    parts = []
    for i in range(0, len(blocks), batch):
        rows = keep[i : i + batch]
        piece = own.hidden[i : i + batch] if own else _hidden(model, blocks[i : i + batch], batch, head.weight.device)
        labels = blocks.input_ids[i : i + batch, 1:][rows]
        parts.append(
            metrics.score_tokens(ref.hidden[i : i + batch, :-1][rows], ref.head, piece[:, :-1][rows], head, labels)
        )
        if progress:
            progress("evaluate", min(i + batch, len(blocks)), len(blocks))
    values = {k: torch.cat([p[k] for p in parts if p]) for k in next(p for p in parts if p)}
    return summarise(values, blocks, keep, Bootstrap(len(blocks), bootstrap, seed), token_counts)


def _reference_of(teacher: Any, data: Any, targets: Any, batch: int) -> Reference:
    if isinstance(teacher, Reference):
        return teacher
    if data is None:
        raise UserError("data: pass the held-out blocks to judge on")
    if targets is not None:
        hidden, head = getattr(targets, "hidden", None), getattr(targets, "head", None)
        if hidden is None or head is None:
            raise UserError("targets: evaluation needs stored `hidden` targets; write them with format='hidden'")
        return Reference(data, hidden, head)
    if teacher is None:
        raise UserError("teacher: pass the teacher, or the targets stored for these blocks")
    return reference(teacher, data, batch)
