"""`moe2dense distill`: train a dense checkpoint on a teacher, or on targets stored earlier."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from moe2dense.cli.actions.distill_request import DistillRequest
from moe2dense.common.object_store import is_url
from moe2dense.common.units import parse_count
from moe2dense.config.flags import argument, flag, given_options
from moe2dense.config.schedules import with_temperature
from moe2dense.config.schema import RunConfig
from moe2dense.config.toml import merge, merge_flags, read_toml
from moe2dense.errors import UserError


def distill_checkpoint(
    student: Annotated[str, argument("Folder of a dense checkpoint or of a run.", example="out/first")],
    /,
    *,
    out: Annotated[Path, argument("Folder of the result; OUT/model is the trained checkpoint.", example="out/more")],
    data: Annotated[
        str | None,
        argument(
            "Text to train on, or prompts for --endpoint: a folder with train/valid/test files, one file, or a hub id.",
            example="my-text.jsonl",
            default="none: needed, but for --completions and for captured --targets, which are their own text",
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        argument(
            "How much of the text is used; with --targets as much as they were stored for.",
            unit="tokens",
            example="20m",
            default="all there is",
            metavar="COUNT",
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        argument("The teacher: folder of a checkpoint, hub id, or a known name.", example="mixtral", default="none"),
    ] = None,
    targets: Annotated[
        str | Path | None,
        argument(
            "Folder or URL of stored targets, or folder of log-probabilities that DistillKit captured, in the teacher's place; a twentieth "
            "of them is held out.",
            example="s3://bucket/targets",
        ),
    ] = None,
    completions: Annotated[
        Path | None,
        argument(
            "A teacher's answers as a .jsonl file (prompt and completion, or messages), when nothing else of it is known.",
            example="answers.jsonl",
        ),
    ] = None,
    endpoint: Annotated[str | None, flag("endpoint.url", group="Essentials")] = None,
    endpoint_model: Annotated[str | None, flag("endpoint.model", group="Essentials")] = None,
    endpoint_k: Annotated[int | None, flag("endpoint.k", group="Essentials")] = None,
    resume: Annotated[
        bool, argument("Continue in --out, fetched from --mirror first where that is newer or --out is not there.")
    ] = False,
    mirror: Annotated[str | None, flag("mirror")] = None,
    config: Annotated[
        Path | None, argument("TOML file whose [train], [write] and [regime] tables set the rest.", example="run.toml")
    ] = None,
    valid: Annotated[str | None, flag("data.valid")] = None,
    block: Annotated[int | None, flag("data.block")] = None,
    chat_template: Annotated[str | None, flag("data.chat_template")] = None,
    loss: Annotated[str | None, flag("train.loss")] = None,
    temperature: Annotated[float | str | None, flag("train.temperature")] = None,
    alpha: Annotated[float | None, flag("train.alpha")] = None,
    lr: Annotated[float | None, flag("train.lr")] = None,
    epochs: Annotated[float | None, flag("train.epochs")] = None,
    lora: Annotated[int | None, flag("train.lora")] = None,
    targets_disk: Annotated[str | None, flag("train.targets_disk")] = None,
    report_to: Annotated[str | None, flag("train.report_to")] = None,
    cross_tokenizer: Annotated[
        Literal["text", "uld", "aligned"],
        argument(
            "How a teacher with another tokenizer teaches: by text it writes, or by its distributions, matched by rank (uld) or "
            "at aligned tokens.",
            group="Training",
            example="uld",
        ),
    ] = "text",
    seed: Annotated[int | None, flag("seed")] = None,
    memory: Annotated[str | None, flag("teacher.memory")] = None,
    gpu_memory: Annotated[str | None, flag("teacher.gpu_memory")] = None,
    device: Annotated[str | None, flag("teacher.device")] = None,
    attention: Annotated[str | None, flag("attention")] = None,
    teacher_card: Annotated[str | None, flag("teacher.card")] = None,
) -> None:
    """Train a dense checkpoint towards a teacher's distributions.

    Give --teacher, or --targets that `moe2dense targets` stored, or --completions, or --endpoint: with --endpoint-k the server's
    log-probabilities of the text are learnt, without it what the server writes after prompts. Leaves OUT/model and
    OUT/metrics.jsonl.
    """
    options = given_options(distill_checkpoint, locals())
    if sum(x is not None for x in (teacher, targets, completions, endpoint)) != 1:
        raise UserError(
            "give either --teacher, or --targets with what `moe2dense targets` stored; or --completions, or --endpoint"
        )
    if data is None and completions is None and targets is None:
        raise UserError("--data is missing: text to train on, or prompts for the endpoint")
    first = int(os.environ.get("RANK", 0)) == 0  # the others may come when it has begun to write
    if first and out.exists() and any(out.iterdir()) and not resume:
        raise UserError(f"--out {out} exists; continue it with --resume, or choose another --out")
    if targets_disk is not None and teacher is None and not (targets is not None and is_url(targets)):
        raise UserError(
            "--targets-disk is for a teacher that answers while the student trains, or for --targets at a URL; give --teacher, or leave it out"
        )
    count = parse_count(tokens, "--tokens") if tokens else None
    request = DistillRequest(
        student=student,
        out=out,
        settings=_settings(config, options | {"data.path": data, "train.tokens": count}),
        teacher=teacher,
        targets=targets,
        completions=completions,
        endpoint=endpoint,
        cross_tokenizer=cross_tokenizer,
        tokens=count,
        resume=resume,
    )

    from moe2dense.cli.actions.distill import run_distillation

    run_distillation(request)


def _settings(config: Path | None, options: dict[str, object]) -> RunConfig:
    """[train], [write], [regime] and [endpoint] of the file, and the flags. Stored targets and the server's URL are a flag's business."""
    base = RunConfig()
    if config is not None:
        file = merge(base, read_toml(config), f"--config {config}")
        base = replace(
            base, train=replace(file.train, targets=""), write=file.write, regime=file.regime,
            endpoint=replace(file.endpoint, url=""),
        )  # fmt: skip
    return merge_flags(base, with_temperature(options))
