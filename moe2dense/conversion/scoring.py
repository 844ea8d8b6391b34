"""Score a conversion's models on its held-out text, each against the teacher."""

from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from moe2dense.common.files import atomic_write
from moe2dense.common.processes import from_first
from moe2dense.conversion.job import Job
from moe2dense.evaluation.api import evaluate
from moe2dense.evaluation.baselines import open_baseline, row_names
from moe2dense.evaluation.reference import Reference, reference
from moe2dense.evaluation.retention import split_domains
from moe2dense.evaluation.scores import Scores
from moe2dense.student.types import Student
from moe2dense.weights.tensors import read_tensors

# V vocabulary
_COUNTS = "token_counts.safetensors"
TextScores = dict[str, Scores]  # by text: valid and, where given, ood


def reference_for(job: Job, which: str) -> Reference:
    """Return the teacher's final hidden states on held-out text, computed once per process."""
    if which not in job.references:
        blocks = job.text.valid if which == "valid" else job.text.ood
        assert blocks is not None, "only texts that the run has are scored"
        job.references[which] = reference(job.teacher, blocks)
    return job.references[which]


def write_token_counts(job: Job) -> None:
    """Keep in the run folder how often each token occurs in the training text, so that `eval` means the same rare tokens."""
    assert job.text.token_counts is not None, "a run counts the tokens of its training text"
    counts = save({"token_counts": job.text.token_counts})
    from_first(lambda: atomic_write(job.run.folder / _COUNTS, counts))


def read_token_counts(student: str | Path) -> Tensor | None:
    """Return the counts [V] of the run that a student, its folder or its exported model belongs to; None without one."""
    folder = Path(student)
    places = (folder, *folder.absolute().parents[:3])
    file = next((place / _COUNTS for place in places if (place / _COUNTS).is_file()), None)
    return None if file is None else read_tensors(file, "remove it to count on the scored text")["token_counts"]


def score(job: Job, student: Student | PreTrainedModel) -> TextScores:
    """Score a student on the held-out and, where given, the out-of-distribution text."""
    counts, seed = job.text.token_counts, job.settings.seed
    with job.metered("evaluate"):
        return {t: evaluate(student, reference_for(job, t), token_counts=counts, seed=seed) for t in _texts(job)}


def plain_scores(job: Job, scores: TextScores) -> dict[str, dict[str, Any]]:
    """Return scores by text as the run's record holds them.

    Under --allow-loss each has "apart": the same without those domains ("kept") and on them alone ("lost").
    """
    plain = {}
    for text, whole in scores.items():
        parts = split_domains(whole, job.settings.evaluate.allow_loss) if job.settings.evaluate.allow_loss else None
        apart = {"apart": {"kept": parts[0].to_dict(), "lost": parts[1].to_dict()}} if parts else {}
        plain[text] = whole.to_dict() | apart
    return plain


def score_teacher(job: Job) -> TextScores:
    """Score the teacher itself: its likelihood of the text; everything relative to itself is zero."""
    counts, seed = job.text.token_counts, job.settings.seed
    with job.metered("evaluate"):
        references = {t: reference_for(job, t) for t in _texts(job)}
        return {t: evaluate(own, own, token_counts=counts, seed=seed) for t, own in references.items()}


def score_baselines(job: Job) -> dict[str, TextScores]:
    """Score every --baseline, by the report's name for it. One is in memory at a time."""
    return {row: score(job, open_baseline(name)) for row, name in row_names(job.settings.evaluate.baseline).items()}


def _texts(job: Job) -> list[str]:
    return ["valid"] if job.text.ood is None else ["valid", "ood"]
