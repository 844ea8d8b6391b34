"""`evaluate`: the numbers of one model against its teacher on a held-out text."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe2dense.common.devices import moved_to
from moe2dense.common.processes import gather_objects, my_share, world
from moe2dense.common.progress import Report
from moe2dense.data.blocks import Blocks
from moe2dense.errors import UserError
from moe2dense.evaluation.bootstrap import Bootstrap
from moe2dense.evaluation.clusters import clusters_of
from moe2dense.evaluation.reference import AnyModel, Reference, hidden_states, reference
from moe2dense.evaluation.scores import Scores
from moe2dense.evaluation.summary import summarise
from moe2dense.evaluation.token_metrics import score_tokens, scored_positions
from moe2dense.modeling.head import OutputHead, in_float32, output_head
from moe2dense.modeling.kinds import BuiltStudent, language_model


@runtime_checkable
class HiddenTargets(Protocol):
    """Stored targets that may hold the teacher's final hidden states [N, S, H] and the head that reads them."""

    @property
    def hidden(self) -> Tensor | None: ...

    @property
    def head(self) -> OutputHead | None: ...


@torch.no_grad()
def evaluate(
    student: BuiltStudent | PreTrainedModel | Reference,
    teacher: AnyModel | Reference | None = None,
    data: Blocks | None = None,
    targets: HiddenTargets | None = None,
    *,
    batch: int = 8,
    bootstrap: int = 1000,
    seed: int = 0,
    token_counts: Tensor | None = None,
    progress: Report | None = None,
) -> Scores:
    """Judge `student` against `teacher` on the blocks `data`; only positions whose next token is known are judged.

    teacher: a Teacher, a transformers model, or a Reference made once for several students. targets: stored hidden
    targets of these blocks in its place. token_counts [V]: how often each id occurs in the training text, for rare tokens and the deciles of
    token frequency (`data.frequency.count_tokens`); by default counted on `data`, which `Scores.rare_by` then says.
    bootstrap: resamples of works or passages, else of blocks, for the intervals; 0 = none.
    progress: called as progress(stage, done, total) after every `batch` blocks. Processes that have joined must all call it; they
    share the blocks.
    Raises UserError where there is nothing to judge or no teacher.
    """
    truth = _reference_of(teacher, data, targets, batch)
    blocks = truth.blocks
    keep = scored_positions(blocks)
    if not keep.any():
        raise UserError("data: no position to judge; every block needs at least two real tokens of one document")
    batch = max(1, min(batch, len(blocks) // world()[1]))  # so that each process has some
    starts = range(0, len(blocks), batch)
    shared = len(starts) >= world()[1] > 1
    parts, teacher_head = [], in_float32(truth.head)
    with _on_accelerator(student, teacher_head.weight.device):
        head, hidden_of = _student_answers(student, blocks, batch)
        for i in starts[my_share(len(starts))] if shared else starts:
            rows = slice(i, i + batch)
            judged = keep[rows]
            teacher_hidden, student_hidden = truth.hidden[rows, :-1][judged], hidden_of(rows)[:, :-1][judged]
            labels = blocks.input_ids[rows, 1:][judged]
            parts.append(score_tokens(teacher_hidden, teacher_head, student_hidden, head, labels))
            if progress:
                progress("evaluate", min(i + batch, len(blocks)), len(blocks))
    if shared:
        parts = [part for own in gather_objects(parts) for part in own]
    values = {k: torch.cat([p[k] for p in parts if p]) for k in next(p for p in parts if p)}
    clusters = clusters_of(blocks)
    return summarise(values, blocks, keep, clusters, Bootstrap(clusters.count, bootstrap, seed), token_counts)


def _on_accelerator(
    student: BuiltStudent | PreTrainedModel | Reference, device: torch.device
) -> AbstractContextManager[object]:
    """Have a student's model on the device of the teacher's head within the context, where it fits there."""
    return nullcontext() if isinstance(student, Reference) else moved_to(language_model(student), device)


def _student_answers(
    student: BuiltStudent | PreTrainedModel | Reference, blocks: Blocks, batch: int
) -> tuple[OutputHead, Callable[[slice], Tensor]]:
    """Return the student's head, and a function that gives its final hidden states of a range of blocks."""
    if isinstance(student, Reference):
        return student.head, lambda rows: student.hidden[rows]
    model = language_model(student)
    head = output_head(model)
    return head, lambda rows: hidden_states(model, blocks[rows], batch, head.weight.device)


def _reference_of(
    teacher: AnyModel | Reference | None, data: Blocks | None, targets: HiddenTargets | None, batch: int
) -> Reference:
    """Return the teacher's answers: given, read from stored targets, or computed."""
    if isinstance(teacher, Reference):
        return teacher
    if data is None:
        raise UserError("data: pass the held-out blocks to judge on")
    if targets is not None:
        if not isinstance(targets, HiddenTargets) or targets.hidden is None or targets.head is None:
            raise UserError("targets: evaluation needs stored `hidden` targets; write them with format='hidden'")
        return Reference(data, targets.hidden, targets.head)
    if teacher is None:
        raise UserError("teacher: pass the teacher, or the targets stored for these blocks")
    return reference(teacher, data, batch)
