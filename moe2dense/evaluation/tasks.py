"""Tasks of both kinds: lm-evaluation-harness's, and local files of records (local_tasks.py), for models here and models that a server runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from moe2dense.evaluation.lm_eval_tasks import check_harness, read_tasks, run_tasks
from moe2dense.evaluation.local_tasks import is_local, read_task, score_task
from moe2dense.evaluation.reference import AnyModel
from moe2dense.evaluation.writers import ModelWriter, ServedModel


def check_tasks(names: Sequence[str]) -> None:
    """Raise UserError for a task that is not known, or whose file or harness is missing."""
    if harness := [name for name in names if not is_local(name)]:
        check_harness()
        read_tasks(harness)
    for name in names:
        if is_local(name):
            read_task(name)


def score_tasks(
    models: Mapping[str, AnyModel | ServedModel],
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Return {task: {metric: {model: {"value", "stderr"}}}}, each model with the same prompts. Raises UserError as run_tasks does."""
    harness = [name for name in names if not is_local(name)]
    scores = run_tasks(models, tokenizer, harness, limit=limit, seed=seed) if harness else {}
    for task in (read_task(name) for name in names if is_local(name)):
        row = scores.setdefault(task.name, {}).setdefault(task.metric, {})
        for name, model in models.items():
            writer = model if isinstance(model, ServedModel) else ModelWriter(model, tokenizer)
            row[name] = score_task(task, writer, limit)
    return scores
