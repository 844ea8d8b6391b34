"""Compare a dense checkpoint with its teacher, as `moe2dense eval` asks."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from moe2dense.cli.actions.common import open_teacher, read_text
from moe2dense.cli.tables import task_table
from moe2dense.common.devices import moved_to
from moe2dense.common.files import atomic_write
from moe2dense.common.numbers import show_number
from moe2dense.common.units import parse_count
from moe2dense.config.schema import EvaluateConfig, RunConfig
from moe2dense.conversion.checks import check_allowed
from moe2dense.conversion.scoring import read_token_counts
from moe2dense.data.blocks import Blocks
from moe2dense.evaluation.api import evaluate
from moe2dense.evaluation.baselines import check_baselines, open_baseline
from moe2dense.evaluation.judge import Judge, check_judge
from moe2dense.evaluation.reference import AnyModel, reference
from moe2dense.evaluation.samples import side_by_side
from moe2dense.evaluation.tasks import check_tasks, score_tasks
from moe2dense.evaluation.writers import ServedModel, reach_model
from moe2dense.exporting.running import running
from moe2dense.exporting.stacks import STACKS, flags_of, host_of, served_model
from moe2dense.modeling.attention import attention_setting
from moe2dense.reporting.assemble import split_rows
from moe2dense.reporting.rating_sheet import write_sheet
from moe2dense.reporting.score_tables import legend, print_scores
from moe2dense.reporting.terminal import written_table
from moe2dense.teacher.model import Teacher

_SAMPLES_FOR_JUDGE = 4


@dataclass(frozen=True)
class EvalRequest:
    """Which student is compared with which teacher, on what. stack: which one answers the tasks; "": they are answered here."""

    student: str
    teacher: str
    data: str
    split: str
    tokens: str
    settings: RunConfig
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    samples: int = 0
    stack: str = ""


def run_evaluation(request: EvalRequest, out: Path | None, as_json: bool = False) -> None:
    """Measure, and print the tables; with `out`, write eval.json and the rating sheet there. Raises UserError for bad input."""
    with attention_setting(request.settings.attention):
        _evaluate(request, out, as_json)


def _evaluate(request: EvalRequest, out: Path | None, as_json: bool) -> None:
    """Measure, print and write with the attention that the process is set to."""
    settings, options = request.settings, request.settings.teacher
    allowed, baselines = settings.evaluate.allow_loss, settings.evaluate.baseline
    check_tasks(request.tasks)
    if request.stack:
        STACKS[request.stack].check_installed()
    teacher = open_teacher(request.teacher, options)
    check_baselines([request.student], teacher.tokenizer(), "STUDENT")
    check_baselines(baselines, teacher.tokenizer())
    judge = None
    if settings.evaluate.judge:
        check_judge(settings.evaluate.judge, teacher.path, request.student)
        judge = Judge(settings.evaluate.judge, options.memory, options.device, options.gpu_memory)
    count = parse_count(request.tokens, "--tokens")
    blocks = read_text(request.data, teacher, settings.data, request.split, count, settings.seed)
    check_allowed(allowed, blocks.domains)
    results = _measure(request, teacher, blocks, judge)
    if out is not None:
        atomic_write(out / "eval.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        if results["samples"]:
            write_sheet(results["samples"], out, settings.seed)
    if as_json:
        Console().print_json(data=results)
    else:
        title = f"{blocks.tokens} tokens of {request.data} ({request.split})"
        _print(results, request.student, title, Console())


def _measure(request: EvalRequest, teacher: Teacher, blocks: Blocks, judge: Judge | None) -> dict[str, Any]:
    """{"rows", "apart", "tasks", "samples"} as plain values; the last three None where they were not asked for."""
    allowed, seed, limit = request.settings.evaluate.allow_loss, request.settings.seed, request.limit
    tasks, samples = list(request.tasks), request.samples or (_SAMPLES_FOR_JUDGE if judge else 0)
    teacher_states, tokenizer = reference(teacher, blocks), teacher.tokenizer()
    counts = read_token_counts(request.student)
    rows = {"teacher": evaluate(teacher_states, teacher_states, seed=seed, token_counts=counts)}
    scores = None
    if tasks:
        with _answering(request, "teacher", teacher, Path(teacher.path), tokenizer) as who:
            scores = score_tasks({"teacher": who}, tokenizer, tasks, limit=limit, seed=seed)
    written = None
    for name in (request.student, *request.settings.evaluate.baseline):
        model = open_baseline(name)
        rows[name] = evaluate(model, teacher_states, seed=seed, token_counts=counts)
        if scores is not None:
            # a stack needs the device for itself
            place = torch.device("cpu") if request.stack else teacher.device
            with moved_to(model, place), _answering(request, name, model, Path(name), tokenizer) as who:
                answers = score_tasks({name: who}, tokenizer, tasks, limit=limit, seed=seed)
            for task, metrics in answers.items():
                for metric, values in metrics.items():
                    scores[task][metric] |= values
        if samples and name == request.student:
            options = EvaluateConfig(samples=samples)
            written = side_by_side(model, teacher, blocks, options, tokenizer=tokenizer, seed=seed, judge=judge)
    return {
        "rows": {name: row.to_dict() for name, row in rows.items()},
        "apart": {"domains": list(allowed), **(split_rows(rows, allowed) or {})} if allowed else None,
        "tasks": scores,
        "samples": written,
    }


@contextlib.contextmanager
def _answering(
    request: EvalRequest, name: str, model: AnyModel, folder: Path, tokenizer: PreTrainedTokenizerBase
) -> Iterator[AnyModel | ServedModel]:
    """Yield who answers the tasks for a model: the teacher's server, the stack that is started on its folder, or the model itself."""
    endpoint = request.settings.endpoint
    if name == "teacher" and endpoint.url:
        yield reach_model(endpoint.url, tokenizer, endpoint.model)
    elif request.stack:
        stack, place = STACKS[request.stack], served_model(folder)
        flags = () if name == "teacher" else flags_of(host_of(place), stack)
        with running(stack, place, flags, lambda url: reach_model(url, tokenizer, tries=1)) as served:
            yield served
    else:
        yield model


def _print(results: dict[str, Any], student: str, title: str, console: Console) -> None:
    tables = [(title, results["rows"])]
    if apart := results["apart"]:
        lost = ", ".join(apart["domains"])
        tables += [(f"without {lost}", apart["kept"]), (f"{lost} alone: may be lost", apart["lost"])]
    columns = print_scores(tables, console)
    domains = results["rows"][student]["by_domain"]
    if sorted(domains) != [""]:
        shown = "  ".join(f"{d or '(no label)'} {show_number(domains[d]['kl']['value'])}" for d in sorted(domains))
        console.print(f"\nKL by domain: {shown}", highlight=False)
    console.print(legend(columns, results["rows"][student]), highlight=False)
    if results["tasks"]:
        console.print(task_table(results["tasks"], list(results["rows"])))
    if samples := results["samples"]:
        console.print(written_table(samples))
        for row in samples["rows"]:
            console.print(f"\n{row['prompt']}", style="dim", highlight=False, markup=False)
            for who in ("student", "teacher"):
                if row.get(who) is not None:
                    console.print(f"{who}: {row[who]}", highlight=False, markup=False)
        console.print(samples["how"], highlight=False)
