"""Score a conversion's models on its held-out text, each against the teacher."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe2dense.conversion.job import Job
from moe2dense.evaluation.api import evaluate
from moe2dense.evaluation.baselines import open_baseline, row_names
from moe2dense.evaluation.reference import Reference, reference
from moe2dense.evaluation.scores import Scores
from moe2dense.student.types import Student

# V vocabulary
TextScores = dict[str, Scores]  # by text: valid and, where given, ood


def reference_for(job: Job, which: str) -> Reference:
    """Return the teacher's final hidden states on held-out text, computed once per process."""
    if which not in job.references:
        blocks = job.text.valid if which == "valid" else job.text.ood
        assert blocks is not None, "only texts that the run has are scored"
        job.references[which] = reference(job.teacher, blocks)
    return job.references[which]


def token_counts(job: Job) -> Tensor:
    """Count how often each token id stands in the training text [V]."""
    return torch.bincount(job.text.train.input_ids.flatten(), minlength=job.plan.shape.vocab_size)


def score(job: Job, student: Student | PreTrainedModel) -> TextScores:
    """Score a student on the held-out and, where given, the out-of-distribution text."""
    counts, seed = token_counts(job), job.settings.seed
    return {t: evaluate(student, reference_for(job, t), token_counts=counts, seed=seed) for t in _texts(job)}


def score_teacher(job: Job) -> TextScores:
    """Score the teacher itself: its likelihood of the text; everything relative to itself is zero."""
    counts, seed = token_counts(job), job.settings.seed
    references = {t: reference_for(job, t) for t in _texts(job)}
    return {t: evaluate(own, own, token_counts=counts, seed=seed) for t, own in references.items()}


def score_baselines(job: Job) -> dict[str, TextScores]:
    """Score every --baseline, by the report's name for it. One is in memory at a time."""
    return {row: score(job, open_baseline(name)) for row, name in row_names(job.settings.evaluate.baseline).items()}


def _texts(job: Job) -> list[str]:
    return ["valid"] if job.text.ood is None else ["valid", "ood"]
