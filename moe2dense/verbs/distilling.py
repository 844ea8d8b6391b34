"""`moe2dense distill`: train a dense checkpoint on a teacher, or on targets stored earlier."""

import dataclasses
from pathlib import Path
from typing import Any

_HELD_OUT = 96  # blocks, at most


def distill_checkpoint(
    student: str,
    /,
    *,
    data: str,
    out: Path,
    teacher: str | None = None,
    targets: Path | None = None,
    tokens: str | None = None,
    valid: str | None = None,
    loss: str | None = None,
    temperature: float | str | None = None,
    alpha: float | None = None,
    lr: float | None = None,
    epochs: float | None = None,
    lora: int | None = None,
    report_to: str | None = None,
    config: Path | None = None,
    block: int = 0,
    seed: int = 0,
    memory: str = "auto",
    device: str = "auto",
    teacher_card: str = "",
    resume: bool = False,
) -> None:
    """Train a dense checkpoint towards a teacher's distributions; leaves OUT/model and OUT/metrics.jsonl.

    Parameters
    ----------
    student: folder of a dense checkpoint or of a run
    data: text: folder with train/valid/test files, one file, or a hub id
    out: folder of the result
    teacher: folder of a checkpoint, hub id, or known name
    targets: folder of stored targets, in the teacher's place; a twentieth of them is held out for validation
    tokens: how many teacher positions; with --targets those of the store
    valid: held-out text, where the data has none of its own
    loss: distillation loss; see `moe2dense list losses`
    temperature: softens both distributions; auto: chosen by short trainings
    alpha: weight of the hard-label loss; 1 - alpha weighs the distillation loss
    lr: peak learning rate
    epochs: passes over the text
    lora: rank of adapters to train instead of all weights
    report_to: none, tensorboard, trackio or wandb
    config: TOML file whose [train] table sets everything else
    block: tokens per block; default min(2048, the model's max positions)
    seed: of the order of the text
    memory: budget for teacher weights and hidden states
    device: auto, cpu or cuda
    teacher_card: TOML card of a family that is not shipped
    resume: continue in --out
    """
    from rich.console import Console

    from moe2dense.errors import UserError
    from moe2dense.exporting import export
    from moe2dense.progress import progress_for
    from moe2dense.schedules import temperature_settings
    from moe2dense.training import distill
    from moe2dense.verbs.common import open_student, student_folder

    if (teacher is None) == (targets is None):
        raise UserError("give either --teacher, or --targets with what `moe2dense targets` stored")
    if out.exists() and any(out.iterdir()) and not resume:
        raise UserError(f"--out {out} exists; continue it with --resume, or choose another --out")
    flags = {"loss": loss, "alpha": alpha, "lr": lr, "epochs": epochs, "lora": lora, "report_to": report_to}
    settings = _settings(config, flags | temperature_settings(temperature), tokens)
    model = open_student(student)
    source = model.teacher_path or str(student_folder(student))
    console = Console()
    with progress_for(console) as progress:
        text = _text(
            source, data, valid, model, teacher, targets, tokens, block, seed,
            {"memory": memory, "device": device, "card": teacher_card},
        )  # fmt: skip
        done = distill(
            model, tokens=text["data"].tokens, config=settings, seed=seed, out=out, resume=resume, progress=progress,
            **text,
        )  # fmt: skip
    written = export(model, out / "model", tokenizer=source, overwrite=resume)
    console.print(f"{done.steps} steps over {done.tokens} tokens; model: {written.path}")


def _settings(config: Path | None, flags: dict[str, Any], tokens: str | None) -> Any:
    from moe2dense.config import RunConfig
    from moe2dense.settings import merge, merge_flags, read_toml
    from moe2dense.units import parse_count

    base = merge(RunConfig(), read_toml(config), f"--config {config}") if config else RunConfig()
    flags = {f"train.{k}": v for k, v in flags.items()}
    settings = merge_flags(base, flags | {"train.tokens": parse_count(tokens, "--tokens") if tokens else None})
    return dataclasses.replace(settings.train, targets="")


def _text(source, data, valid, student, teacher, targets, tokens, block, seed, options) -> dict[str, Any]:
    """What `distill` reads: training blocks, held-out blocks, and the teacher or the targets of both."""
    from transformers import AutoTokenizer

    from moe2dense.data import load_blocks
    from moe2dense.evaluation import reference
    from moe2dense.targets import open_targets
    from moe2dense.units import parse_count
    from moe2dense.verbs.common import open_teacher

    count = parse_count(tokens, "--tokens") if tokens else None
    longest = min(2048, student.model.config.max_position_embeddings)
    tokenizer = AutoTokenizer.from_pretrained(source)
    train = load_blocks(data, tokenizer, block or longest, "train", tokens=count, seed=seed)
    if targets is not None:
        kept = len(train) - min(_HELD_OUT, len(train) // 20)
        found: dict[str, Any] = {"data": train[:kept], "targets": open_targets(targets, train[:kept])}
        if kept < len(train):
            found |= {"valid": train[kept:], "valid_targets": open_targets(targets, train[kept:], verify=False)}
        return found
    model = open_teacher(teacher, **options)
    held = load_blocks(
        valid or data,
        model.tokenizer(),
        block or longest,
        "valid",
        tokens=_HELD_OUT * train.input_ids.shape[1],
        seed=seed,
    )
    return {"data": train, "teacher": model, "valid": held, "valid_targets": reference(model, held)}
