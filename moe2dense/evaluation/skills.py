"""Which small exact tasks a model solves, and what a student keeps of its teacher's skills."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from moe2dense.data.blocks import Blocks, right_padded
from moe2dense.evaluation.likelihood import label_scores
from moe2dense.evaluation.reference import AnyModel, reference
from moe2dense.evaluation.skill_probes import CANDIDATES, SKILLS, Probe

# R rows of text, S their length, P probes
CHANCE = 1 / CANDIDATES


@torch.no_grad()
def solved(model: AnyModel, probes: Sequence[Probe]) -> list[bool]:
    """Return, for each probe, whether its right candidate is the likeliest.

    A candidate's likelihood is that of its own tokens after the prompt. Candidates that differ in their last token alone are read
    from one row of text. A streamed teacher reads its layers once for all. Processes that have joined must all call it; they share
    the rows.
    """
    rows: dict[tuple[int, ...], int] = {}
    owners, positions, labels = [], [], []
    for number, (probe, candidate) in enumerate((p, c) for p in probes for c in p.candidates):
        row = rows.setdefault(candidate[:-1], len(rows))
        for at in range(probe.start, len(candidate)):
            owners.append(number)
            positions.append((row, at - 1))
            labels.append(candidate[at])
    ids, mask = right_padded([list(row) for row in rows])
    answers = reference(model, Blocks(ids, attention_mask=mask))
    at = torch.tensor(positions)
    log_probabilities, _ = label_scores(answers.hidden[at[:, 0], at[:, 1]], answers.head, torch.tensor(labels))
    totals = torch.zeros(len(probes) * CANDIDATES, dtype=torch.float64)
    totals.index_add_(0, torch.tensor(owners), log_probabilities.double())
    return (totals.view(-1, CANDIDATES).argmax(1) == 0).tolist()


def measure_skills(models: Iterable[tuple[str, AnyModel]], probes: Sequence[Probe]) -> dict[str, Any] | None:
    """Return {"chance", "skills": [{"name", "title", "help", "tasks", "scores", "retention"}]}; None without probes.

    models: by name, each used before the next is asked for, so that one is in memory at a time.
    scores: for each model the share of tasks solved, {"value", "low", "high"} with an exact 95% interval (Clopper and Pearson).
    retention: for each model but "teacher" its distance from chance over the teacher's; None where the teacher's interval holds
    chance, so that there is nothing to keep.
    """
    if not probes:
        return None
    results = {name: torch.tensor(solved(model, probes)) for name, model in models}
    rows = []
    for skill in SKILLS:
        mine = torch.tensor([probe.skill == skill.name for probe in probes])
        if not bool(mine.any()):
            continue
        scores = {name: share(right[mine]) for name, right in results.items()}
        row = {"name": skill.name, "title": skill.title, "help": skill.help, "tasks": int(mine.sum()), "scores": scores}
        rows.append(row | {"retention": retention(scores)})
    return {"chance": CHANCE, "skills": rows}


def share(right: Tensor) -> dict[str, float]:
    """Return the share of true values [P] with its exact 95% interval."""
    interval = stats.binomtest(int(right.sum()), len(right)).proportion_ci(0.95)
    return {"value": float(right.float().mean()), "low": float(interval.low), "high": float(interval.high)}


def retention(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float | None]:
    """Return each model's distance from chance over the teacher's; None where the teacher may be guessing."""
    teacher = scores.get("teacher")
    above_chance = teacher is not None and teacher["low"] > CHANCE
    return {
        name: (row["value"] - CHANCE) / (teacher["value"] - CHANCE) if above_chance and teacher is not None else None
        for name, row in scores.items()
        if name != "teacher"
    }
