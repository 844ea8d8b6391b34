"""`moe2dense eval`: a dense checkpoint against its teacher on held-out text, on tasks, and in what both write."""

from pathlib import Path
from typing import Annotated, Literal

from moe2dense.common.units import names
from moe2dense.config.flags import argument, flag, given_options
from moe2dense.config.schema import RunConfig
from moe2dense.config.toml import merge_flags
from moe2dense.errors import UserError


def evaluate_checkpoint(
    student: Annotated[str, argument("Folder of a dense checkpoint or of a run.", example="out/first")],
    /,
    *,
    teacher: Annotated[
        str, argument("The teacher: folder of a checkpoint, hub id, or a known name.", example="mixtral")
    ],
    data: Annotated[str, argument("Held-out text: a folder, one file, or a hub id.", example="my-text")],
    tokens: Annotated[
        str, argument("How much of the text is scored.", unit="tokens", example="100k", metavar="COUNT")
    ] = "25k",
    out: Annotated[
        Path | None, argument("Folder for eval.json and the blind rating sheet of the samples.", example="out/eval")
    ] = None,
    json: Annotated[bool, argument("Print JSON instead of tables.")] = False,
    split: Annotated[
        Literal["valid", "test", "ood", "train", "all"],
        argument("Which of the folder's files; `all` takes a file as it stands.", group="Text", example="test"),
    ] = "valid",
    block: Annotated[int | None, flag("data.block")] = None,
    chat_template: Annotated[str | None, flag("data.chat_template")] = None,
    seed: Annotated[int | None, flag("seed", group="Text")] = None,
    baseline: Annotated[list[str] | None, flag("evaluate.baseline")] = None,
    allow_loss: Annotated[str | None, flag("evaluate.allow_loss")] = None,
    tasks: Annotated[
        str | None,
        argument(
            "Tasks for teacher, student and baselines: names or task files of lm-evaluation-harness, and .jsonl files of programs to "
            "complete or word problems.",
            group="Comparison",
            example="arc_easy,my/task.yaml",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        argument(
            "How many documents of each task.", group="Comparison", unit="documents", example="200", default="all"
        ),
    ] = None,
    stack: Annotated[
        Literal["vllm"] | None,
        argument(
            "Let this serving stack answer the tasks: it is started on each model in turn.",
            group="Comparison",
            example="vllm",
            default="they are answered here",
        ),
    ] = None,
    endpoint: Annotated[str | None, flag("endpoint.url", group="Comparison")] = None,
    endpoint_model: Annotated[str | None, flag("endpoint.model", group="Comparison")] = None,
    samples: Annotated[
        int,
        argument(
            "Held-out beginnings that student and teacher continue, side by side.",
            group="Comparison",
            unit="texts",
            example="8",
            default="0, or 4 with --judge",
        ),
    ] = 0,
    judge: Annotated[str | None, flag("evaluate.judge")] = None,
    memory: Annotated[str | None, flag("teacher.memory")] = None,
    gpu_memory: Annotated[str | None, flag("teacher.gpu_memory")] = None,
    device: Annotated[str | None, flag("teacher.device")] = None,
    attention: Annotated[str | None, flag("attention")] = None,
    teacher_card: Annotated[str | None, flag("teacher.card")] = None,
) -> None:
    """Compare a student with its teacher on held-out text: KL, NLL, agreement, rare tokens, domains, with 95% intervals."""
    settings = merge_flags(RunConfig(), given_options(evaluate_checkpoint, locals()))
    if (stack or endpoint) and not tasks:
        raise UserError("--stack and --endpoint answer tasks; add --tasks")

    from moe2dense.cli.actions.evaluate import EvalRequest, run_evaluation

    request = EvalRequest(
        student=student,
        teacher=teacher,
        data=data,
        split=split,
        tokens=tokens,
        settings=settings,
        tasks=tuple(names(tasks) or ()),
        limit=limit,
        samples=samples,
        stack=stack or "",
    )
    run_evaluation(request, out, as_json=json)
