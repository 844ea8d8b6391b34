"""Teacher and student on tasks of lm-evaluation-harness, with the same tokens, prompts and settings.

Needs the extra `eval`. A streamed teacher scores log-likelihoods in macro-batches, one read of its weights for as many
requests as its memory budget takes; hub tasks need a network, local YAML files do not.
"""

import contextlib
import importlib.util
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from moe2dense.errors import UserError, first_line, nearest
from moe2dense.evaluation.lm_eval_model import prefill_lm
from moe2dense.evaluation.reference import AnyModel
from moe2dense.evaluation.writers import ServedModel


def check_harness() -> None:
    """Raise UserError where lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks needs lm-evaluation-harness, which is not installed: pip install 'moe2dense[eval]'")


def read_tasks(names: Sequence[str]) -> tuple[list[str], Any]:
    """Return (task names, lm_eval TaskManager) for names of the harness's own tasks and paths of task files (YAML).

    Raises UserError for a file that is missing or names no task, and for an unknown name, with the nearest known one.
    """
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    files = [Path(n) for n in names if n.endswith((".yaml", ".yml"))]
    tasks = [_task_of_file(name) if Path(name) in files else name for name in names]
    folders: Any = sorted({str(f.resolve().parent) for f in files})
    manager = TaskManager(include_path=folders or None, include_defaults=len(files) < len(names))
    known = manager.all_tasks
    for task in tasks:
        if task not in known:
            raise UserError(
                f"--tasks {task} is no task of lm-evaluation-harness and no task file{nearest(task, list(known))}"
            )
    return tasks, manager


def _task_of_file(name: str) -> str:
    """Return the name of the task, or group of tasks, that a task file defines."""
    try:
        loader = type("Loader", (yaml.SafeLoader,), {})
        loader.add_multi_constructor("!", lambda *_: None)  # !function and the like are the harness's to resolve
        table = yaml.load(Path(name).read_text(encoding="utf-8"), loader)
    except OSError as error:
        raise UserError(f"--tasks {name} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"--tasks {name} is not valid YAML: {first_line(error)}") from error
    task = table.get("task") or table.get("group") if isinstance(table, dict) else None
    if not isinstance(task, str):
        raise UserError(
            f"--tasks {name} names no task; it needs a line `task: NAME`, see lm-evaluation-harness's task guide"
        )
    return task


def run_tasks(
    models: Mapping[str, AnyModel | ServedModel],
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Return {task: {metric: {model: {"value", "stderr"}}}} for Teachers, transformers models and served ones that share `tokenizer`.

    tasks: as `read_tasks` takes them. limit: documents of each task, the same for every model. Raises UserError for tasks whose
    data cannot be had.
    """
    check_harness()
    from lm_eval import evaluator  # pyright: ignore[reportMissingImports]

    names, manager = read_tasks(tasks)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # or the harness's resampling forks a process for every core
    settings = {"tasks": names, "task_manager": manager, "limit": limit, "log_samples": False, "bootstrap_iters": 1000}
    settings |= {f"{kind}_seed": seed for kind in ("random", "numpy_random", "torch_random", "fewshot_random")}
    run: Any = evaluator.simple_evaluate
    scores: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # the harness prints there; our own stdout is for results
                result = run(model=_harness_model(model, tokenizer, seed), **settings)
        except UserError:
            raise
        except (OSError, ValueError) as error:  # of the task's data or its file, of many kinds
            raise UserError(
                f"--tasks {','.join(tasks)} cannot run ({first_line(error)}); a task from the hub needs a network"
            ) from error
        for task, numbers in result["results"].items():
            for metric, value in _metrics(numbers).items():
                scores.setdefault(task, {}).setdefault(metric, {})[name] = value
    return scores


def _harness_model(model: AnyModel | ServedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> Any:
    """Return what the harness asks: our own model for what runs here, its own client for a server, which must echo log-probabilities."""
    if not isinstance(model, ServedModel):
        return prefill_lm(model, tokenizer, seed=seed)
    try:
        from lm_eval.models.openai_completions import LocalCompletionsAPI  # pyright: ignore[reportMissingImports]

        return LocalCompletionsAPI(
            base_url=f"{model.url}/v1/completions", model=model.name, tokenizer=str(tokenizer.name_or_path),
            tokenizer_backend="huggingface", num_concurrent=model.parallel, max_length=model.longest, seed=seed,
        )  # fmt: skip
    except ModuleNotFoundError as error:
        raise UserError(f"tasks by a server need the harness's client ({error}): pip install 'lm-eval[api]'") from None


def _metrics(numbers: Any) -> dict[str, dict[str, float | None]]:
    """Return {'acc': {'value', 'stderr'}} of the harness's 'acc,none' and 'acc_stderr,none'."""
    metrics = {}
    for key, value in numbers.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = numbers.get(f"{metric}_stderr,{filtered}")
        shown = metric if filtered == "none" else f"{metric} ({filtered})"
        metrics[shown] = {"value": float(value), "stderr": float(error) if isinstance(error, (int, float)) else None}
    return metrics
