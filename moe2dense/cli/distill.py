"""`moe2dense distill`: train a dense checkpoint on a teacher, or on targets stored earlier."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

_HELD_OUT = 96  # blocks, at most


def distill_checkpoint(
    student: str,
    /,
    *,
    data: str | None = None,
    out: Path,
    teacher: str | None = None,
    targets: Path | None = None,
    completions: Path | None = None,
    endpoint: str | None = None,
    endpoint_model: str = "",
    cross_tokenizer: Literal["text", "uld", "aligned"] = "text",
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
    completions: .jsonl file of a teacher's answers (prompt and completion, or messages), when nothing else of it is known
    endpoint: URL of an OpenAI-compatible server that answers the prompts in --data, such as http://localhost:8000/v1
    endpoint_model: the name the server knows the model by
    cross_tokenizer: for a teacher with another tokenizer: train on text it writes, or on its distributions by uld or aligned tokens
    tokens: how many teacher positions; with --targets those of the store
    valid: held-out text, where the data has none of its own
    loss: distillation loss; see `moe2dense list losses`
    temperature: softens both distributions; auto: chosen by short trainings
    alpha: weight of the hard-label loss; 1 - alpha weighs the distillation loss
    lr: peak learning rate
    epochs: passes over the text
    lora: rank of adapters to train instead of all weights
    report_to: none, tensorboard, trackio or wandb
    config: TOML file whose [train] and [regime] tables set everything else
    block: tokens per block; default min(2048, the model's max positions)
    seed: of the order of the text
    memory: budget for teacher weights and hidden states
    device: auto, cpu or cuda
    teacher_card: TOML card of a family that is not shipped
    resume: continue in --out
    """
    from rich.console import Console

    from moe2dense.cli.distill_sources import hard_labels
    from moe2dense.common.progress import progress_for
    from moe2dense.config.schedules import temperature_settings
    from moe2dense.distillation.api import distill
    from moe2dense.distillation.regimes.mtp import copy_heads
    from moe2dense.errors import UserError
    from moe2dense.evaluation.reference import answer_nll
    from moe2dense.exporting.api import export
    from moe2dense.student.open import open_student, student_folder

    if sum(x is not None for x in (teacher, targets, completions, endpoint)) != 1:
        raise UserError(
            "give either --teacher, or --targets with what `moe2dense targets` stored; or --completions, or --endpoint"
        )
    if data is None and completions is None:
        raise UserError("--data is missing: text to train on, or prompts for the endpoint")
    if out.exists() and any(out.iterdir()) and not resume:
        raise UserError(f"--out {out} exists; continue it with --resume, or choose another --out")
    flags = {"loss": loss, "alpha": alpha, "lr": lr, "epochs": epochs, "lora": lora, "report_to": report_to}
    settings, write, chosen = _settings(config, flags | temperature_settings(temperature), tokens)
    model = open_student(student)
    source = model.teacher_path or str(student_folder(student))
    console = Console()
    held = None
    with progress_for(console) as progress:
        if completions is not None or endpoint is not None:
            where = completions or (endpoint, endpoint_model, data, out / "answers")
            text, held = _answers(where, source, model, write, tokens, block, seed, console, progress)
            settings = hard_labels(settings)
        else:
            text, settings = _text(
                source, data, valid, model, teacher, targets, tokens, block, seed,
                {"memory": memory, "device": device, "card": teacher_card}, settings, write, cross_tokenizer, out, console, progress,
            )  # fmt: skip
        before = None if held is None else answer_nll(model.model, held)
        done = distill(
            model, tokens=text["data"].tokens, config=settings, seed=seed, out=out, resume=resume, progress=progress,
            regime=_regime(settings.regime, chosen, text.get("teacher")), **text,
        )  # fmt: skip
    written = export(model, out / "model", tokenizer=source, overwrite=resume)
    copy_heads(out, written.path)
    if held is not None:
        after = answer_nll(model.model, held)
        console.print(
            f"held-out answers: {before:.3f} nats per token before training, {after:.3f} nats per token after"
        )
    console.print(f"{done.steps} steps over {done.tokens} tokens; model: {written.path}")


def _settings(config: Path | None, flags: dict[str, Any], tokens: str | None) -> Any:
    from moe2dense.common.units import parse_count
    from moe2dense.config.schema import RunConfig
    from moe2dense.config.toml import merge, merge_flags, read_toml

    base = merge(RunConfig(), read_toml(config), f"--config {config}") if config else RunConfig()
    flags = {f"train.{k}": v for k, v in flags.items()}
    settings = merge_flags(base, flags | {"train.tokens": parse_count(tokens, "--tokens") if tokens else None})
    return dataclasses.replace(settings.train, targets=""), settings.write, settings.regime


def _regime(name: str, options: Any, teacher: Any) -> Any:
    """The regime that the config asks for; a second student is a checkpoint here."""
    from moe2dense.distillation.regimes.registry import make_regime
    from moe2dense.errors import UserError
    from moe2dense.student.open import open_student

    peer = None
    if name == "mutual":
        if not Path(options.peer).is_dir():
            raise UserError(
                f"regime.peer must be the folder of a dense checkpoint to learn with; found {options.peer!r}"
            )
        peer = open_student(options.peer)
    return make_regime(name, options, teacher, peer)


def _answers(where: Any, source, student, write, tokens, block, seed, console, progress) -> tuple[dict[str, Any], Any]:
    """What `distill` reads when only a teacher's answers are known, and the held-out ones."""
    from transformers import AutoTokenizer

    from moe2dense.cli.distill_sources import from_completions, from_endpoint
    from moe2dense.common.units import parse_count

    count = parse_count(tokens, "--tokens") if tokens else None
    size = block or min(2048, student.model.config.max_position_embeddings)
    tokenizer = AutoTokenizer.from_pretrained(source)
    if isinstance(where, Path):
        train, held = from_completions(where, tokenizer, size, count, seed, console)
    else:
        url, name, data, folder = where
        train, held = from_endpoint(
            url, name, data, folder, write, tokenizer, size, count, seed, console, progress
        )  # fmt: skip
    return {"data": train}, held


def _text(
    source, data, valid, student, teacher, targets, tokens, block, seed, options, settings, write, cross, out, console, progress
) -> tuple[dict[str, Any], Any]:  # fmt: skip
    """(what `distill` reads: training blocks, held-out blocks, and the teacher or the targets of both; its settings)."""
    from transformers import AutoTokenizer

    from moe2dense.cli.common import open_teacher
    from moe2dense.cli.distill_sources import across
    from moe2dense.common.units import parse_count
    from moe2dense.data.load import load_blocks
    from moe2dense.data.vocabulary import compare_vocabularies
    from moe2dense.distillation.targets.store import open_targets
    from moe2dense.evaluation.reference import reference

    count = parse_count(tokens, "--tokens") if tokens else None
    longest = min(2048, student.model.config.max_position_embeddings)
    tokenizer = AutoTokenizer.from_pretrained(source)
    train = load_blocks(data, tokenizer, block or longest, "train", tokens=count, seed=seed)
    if targets is not None:
        kept = len(train) - min(_HELD_OUT, len(train) // 20)
        found: dict[str, Any] = {"data": train[:kept], "targets": open_targets(targets, train[:kept])}
        if kept < len(train):
            found |= {"valid": train[kept:], "valid_targets": open_targets(targets, train[kept:], verify=False)}
        return found, settings
    model = open_teacher(teacher, **options)
    compared = compare_vocabularies(model.tokenizer(), tokenizer)
    if not compared.same:
        say = f"the teacher's tokenizer is not the student's: {compared.difference}"
        return across(say, cross, model, tokenizer, data, train, out, settings, write, seed, console, progress)
    held = load_blocks(
        valid or data,
        model.tokenizer(),
        block or longest,
        "valid",
        tokens=_HELD_OUT * train.input_ids.shape[1],
        seed=seed,
    )
    return {"data": train, "teacher": model, "valid": held, "valid_targets": reference(model, held)}, settings
