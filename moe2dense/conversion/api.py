"""`convert` and `plan`: what a whole conversion is asked for. No torch until one of them runs, so that help is quick.

The annotation of a parameter names the option it sets; its help, default and example stand with the option in
moe2dense/config/schema.py.
"""

from pathlib import Path
from typing import Annotated

from moe2dense.config.flags import argument, flag, given_options
from moe2dense.conversion.results import Plan, Result

Text = str | None


def plan(
    teacher: Annotated[Text, flag("model")] = None,
    /,
    *,
    to: Annotated[Text, flag("to")] = None,
    data: Annotated[Text, flag("data.path")] = None,
    tokens: Annotated[str | int | None, flag("train.tokens")] = None,
    out: Annotated[str | Path | None, flag("out")] = None,
    config: Annotated[Path | None, argument("TOML file with settings; flags override it.", example="run.toml")] = None,
    valid: Annotated[Text, flag("data.valid")] = None,
    ood: Annotated[Text, flag("data.ood")] = None,
    block: Annotated[int | None, flag("data.block")] = None,
    chat_template: Annotated[Text, flag("data.chat_template")] = None,
    init: Annotated[Text, flag("build.init")] = None,
    stages: Annotated[Text, flag("stages")] = None,
    epochs: Annotated[float | None, flag("train.epochs")] = None,
    loss: Annotated[Text, flag("train.loss")] = None,
    lora: Annotated[int | None, flag("train.lora")] = None,
    targets_disk: Annotated[Text, flag("train.targets_disk")] = None,
    control: Annotated[bool | None, flag("control")] = None,
    memory: Annotated[Text, flag("teacher.memory")] = None,
    gpu_memory: Annotated[Text, flag("teacher.gpu_memory")] = None,
    experts: Annotated[Text, flag("teacher.experts")] = None,
    device: Annotated[Text, flag("teacher.device")] = None,
    attention: Annotated[Text, flag("attention")] = None,
    teacher_card: Annotated[Text, flag("teacher.card")] = None,
    machine: Annotated[
        Text,
        argument(
            "Machine to plan for: a number and a name, as in 1xh100, 8xh100, 1x4090 or 2xa100-40; a TOML file that describes one; or cpu "
            "for this machine without its GPU.",
            group="Teacher",
            example="1xh100",
            default="this one, measured",
        ),
    ] = None,
    speed: Annotated[
        Text,
        argument(
            "Speed of the machine to plan for, in place of what is known or measured of it.",
            group="Teacher",
            unit="FLOP/s of matrix products",
            example="300t",
            default="measured on this machine",
            metavar="COUNT",
        ),
    ] = None,
    disk_speed: Annotated[
        Text,
        argument(
            "How fast that machine reads its disk.",
            group="Teacher",
            unit="bytes per second",
            example="3GB",
            default="measured on this machine",
            metavar="SIZE",
        ),
    ] = None,
    json: Annotated[bool, argument("Print JSON instead of tables.", group="Output")] = False,
) -> Plan:
    """Show what a conversion would build and cost, without reading weights.

    Works offline for the teachers of `moe2dense list teachers`. Takes the settings of `convert`, from flags or a --config.
    """
    options = given_options(plan, locals())

    from dataclasses import replace

    from rich.console import Console

    from moe2dense.conversion.checks import check_settings
    from moe2dense.conversion.configure import configure
    from moe2dense.conversion.machine import check_device, machine_to_plan_for
    from moe2dense.conversion.planning import make_plan
    from moe2dense.conversion.show_plan import print_plan
    from moe2dense.conversion.start_command import command_to_start

    settings = configure(config=config, options=options)
    check_settings(settings)
    other = machine_to_plan_for(settings, speed, disk_speed, machine) if machine or speed or disk_speed else None
    if other is None:
        check_device(settings.teacher.device)
    result = make_plan(settings, other)
    result = replace(result, command=command_to_start(options, config, result.machine.count))
    if json:
        Console().print_json(data=result.to_dict(), default=str)
    else:
        print_plan(result, settings, Console())
    return result


def convert(
    teacher: Annotated[Text, flag("model")] = None,
    /,
    *,
    to: Annotated[Text, flag("to")] = None,
    data: Annotated[Text, flag("data.path")] = None,
    tokens: Annotated[str | int | None, flag("train.tokens")] = None,
    out: Annotated[str | Path | None, flag("out")] = None,
    mirror: Annotated[Text, flag("mirror")] = None,
    resume: Annotated[
        bool,
        argument(
            "Continue the run in --out with its own settings; no other flag is needed. Flags that differ are refused."
        ),
    ] = False,
    dry_run: Annotated[bool, argument("Check everything, print the plan and stop.")] = False,
    config: Annotated[Path | None, argument("TOML file with settings; flags override it.", example="run.toml")] = None,
    valid: Annotated[Text, flag("data.valid")] = None,
    ood: Annotated[Text, flag("data.ood")] = None,
    block: Annotated[int | None, flag("data.block")] = None,
    chat_template: Annotated[Text, flag("data.chat_template")] = None,
    init: Annotated[Text, flag("build.init")] = None,
    stages: Annotated[Text, flag("stages")] = None,
    epochs: Annotated[float | None, flag("train.epochs")] = None,
    loss: Annotated[Text, flag("train.loss")] = None,
    temperature: Annotated[float | str | None, flag("train.temperature")] = None,
    alpha: Annotated[float | None, flag("train.alpha")] = None,
    lr: Annotated[float | None, flag("train.lr")] = None,
    lora: Annotated[int | None, flag("train.lora")] = None,
    targets_disk: Annotated[Text, flag("train.targets_disk")] = None,
    report_to: Annotated[Text, flag("train.report_to")] = None,
    seed: Annotated[int | None, flag("seed")] = None,
    control: Annotated[bool | None, flag("control")] = None,
    baseline: Annotated[list[str] | None, flag("evaluate.baseline")] = None,
    allow_loss: Annotated[Text, flag("evaluate.allow_loss")] = None,
    judge: Annotated[Text, flag("evaluate.judge")] = None,
    dtype: Annotated[Text, flag("export.dtype")] = None,
    quantize: Annotated[Text, flag("export.quantize")] = None,
    stack: Annotated[Text, flag("export.stack")] = None,
    memory: Annotated[Text, flag("teacher.memory")] = None,
    gpu_memory: Annotated[Text, flag("teacher.gpu_memory")] = None,
    experts: Annotated[Text, flag("teacher.experts")] = None,
    device: Annotated[Text, flag("teacher.device")] = None,
    attention: Annotated[Text, flag("attention")] = None,
    teacher_card: Annotated[Text, flag("teacher.card")] = None,
    endpoint: Annotated[Text, flag("endpoint.url")] = None,
    endpoint_model: Annotated[Text, flag("endpoint.model")] = None,
    endpoint_k: Annotated[int | None, flag("endpoint.k")] = None,
) -> Result | Plan:
    """Turn an MoE into a dense checkpoint, with a report of what survived.

    Leaves OUT/model, an ordinary checkpoint, and OUT/report.html. `moe2dense plan` says beforehand what it costs.
    """
    options = given_options(convert, locals())

    from moe2dense.conversion.configure import configure
    from moe2dense.conversion.pipeline import resume_conversion, run_conversion

    if resume:
        return resume_conversion(config, options, dry_run=dry_run)
    return run_conversion(configure(config=config, options=options), dry_run=dry_run)
