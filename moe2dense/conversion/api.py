"""`convert` and `plan`: what a whole conversion is asked for. No torch until one of them runs, so that help is quick."""

from pathlib import Path

from moe2dense.common.units import names, parse_count
from moe2dense.config.schedules import temperature_settings
from moe2dense.conversion.configure import configure
from moe2dense.conversion.results import Plan, Result


def _count(text: str | int | None, name: str) -> int | None:
    return None if text is None else parse_count(text, name)


def plan(
    teacher: str,
    /,
    *,
    to: str = "",
    data: str | None = None,
    tokens: str | None = None,
    out: str | None = None,
    config: Path | None = None,
    memory: str | None = None,
    block: int | None = None,
    teacher_card: str | None = None,
    lora: int | None = None,
    json: bool = False,
) -> Plan:
    """Show what a conversion would build and cost, without reading weights.

    Parameters
    ----------
    teacher: folder of a checkpoint, hub id (owner/name), or a known name such as mixtral
    to: size of the student (7b, 350m), share of the teacher (25%), named target, or dense checkpoint
    data: text to distil on: folder with train/valid/test files, one file, or a hub id
    tokens: unique teacher positions, the build's included (500k, 1b)
    out: folder of the run
    config: TOML file with settings; flags override it
    memory: budget for teacher weights and hidden states (2GB); default half of the free memory
    block: tokens per block; default min(2048, the teacher's max positions)
    teacher_card: TOML card of a family that is not shipped
    lora: rank of adapters to train instead of all weights
    json: print JSON instead of tables
    """
    from rich.console import Console

    from moe2dense.conversion.plan import make_plan
    from moe2dense.conversion.show_plan import print_plan

    flags = {"data.path": data, "train.tokens": _count(tokens, "--tokens"), "out": out, "teacher.memory": memory}
    flags |= {"data.block": block, "teacher.card": teacher_card, "train.lora": lora}
    result = make_plan(configure(teacher, to, config, flags))
    if json:
        Console().print_json(data=result.to_dict(), default=str)
    else:
        print_plan(result, Console())
    return result


def convert(
    teacher: str,
    /,
    *,
    to: str = "",
    data: str | None = None,
    valid: str | None = None,
    ood: str | None = None,
    tokens: str | int | None = None,
    init: str | None = None,
    out: str | Path | None = None,
    config: Path | None = None,
    memory: str | None = None,
    experts: str | None = None,
    block: int | None = None,
    teacher_card: str | None = None,
    loss: str | None = None,
    temperature: float | str | None = None,
    alpha: float | None = None,
    lr: float | None = None,
    epochs: float | None = None,
    lora: int | None = None,
    report_to: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    seed: int | None = None,
    device: str | None = None,
    control: bool | None = None,
    stages: str | None = None,
    baseline: list[str] | None = None,
    allow_loss: str | None = None,
    judge: str | None = None,
    resume: bool = False,
    dry_run: bool = False,
) -> Result | Plan:
    """Turn an MoE into a dense checkpoint, with a report of what survived.

    Parameters
    ----------
    teacher: folder of a checkpoint, hub id (owner/name), or a known name such as mixtral
    to: size of the student (7b, 350m), share of the teacher (25%), named target, or dense checkpoint to start from
    data: text to distil on: folder with train/valid/test files, one file, or a hub id
    valid: held-out text, where the data has none of its own
    ood: text of another kind, for the report
    tokens: unique teacher positions, the build's included (500k, 1b); 0 stops after the build
    init: how the student is built; see `moe2dense list methods`
    out: folder of the run; default ./TEACHER-TARGET
    config: TOML file with settings; flags override it
    memory: budget for teacher weights and hidden states (2GB); default half of the free memory
    experts: how experts are computed: auto, streamed, grouped_mm, megablocks
    block: tokens per block; default min(2048, the teacher's max positions)
    teacher_card: TOML card of a family that is not shipped
    loss: distillation loss; see `moe2dense list losses`
    temperature: softens both distributions; the loss is multiplied by its square. auto: chosen by short trainings
    alpha: weight of the hard-label loss; 1 - alpha weighs the distillation loss (some papers mean the opposite)
    lr: peak learning rate
    epochs: passes over the training text; replays cost no teacher tokens
    lora: rank of adapters to train instead of all weights
    report_to: none, tensorboard, trackio or wandb; metrics.jsonl is always written
    dtype: of the exported weights
    quantize: int8 or int4: quantise the exported student
    seed: of everything random
    device: auto, cpu or cuda
    control: also train a randomly initialised student, and with stages a direct one, to compare with
    stages: sizes from large to small (47%,40%): each student teaches the next; to is the last, or follows them
    baseline: a dense checkpoint with the teacher's tokenizer to compare with, such as its pretrained sibling; may be repeated
    allow_loss: domains of the held-out text that may be lost (code,drama); they are reported apart
    judge: folder of a third language model that scores what student and teacher write
    resume: continue the run in --out
    dry_run: print the plan and stop
    """
    from moe2dense.conversion.pipeline import run_conversion

    flags = {"data.path": data, "data.valid": valid, "data.ood": ood, "train.tokens": _count(tokens, "--tokens")}
    flags |= {
        "build.init": init,
        "out": None if out is None else str(out),
        "teacher.memory": memory,
        "teacher.experts": experts,
    }
    flags |= {"data.block": block, "teacher.card": teacher_card, "train.loss": loss}
    flags |= {f"train.{k}": v for k, v in temperature_settings(temperature).items()}
    flags |= {
        "train.alpha": alpha,
        "train.lr": lr,
        "train.epochs": epochs,
        "train.lora": lora,
        "train.report_to": report_to,
    }
    flags |= {
        "export.dtype": dtype,
        "export.quantize": quantize,
        "seed": seed,
        "teacher.device": device,
        "control": control,
        "stages": stages,
    }
    flags |= {"evaluate.baseline": baseline, "evaluate.allow_loss": names(allow_loss), "evaluate.judge": judge}
    settings = configure(teacher, to, config, flags)
    return run_conversion(settings, resume=resume, dry_run=dry_run)
