"""Print a plan as tables and sentences, with a legend of the words it uses."""

from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from moe2dense.common.units import show_bytes, show_count, show_flops, show_seconds
from moe2dense.config.schema import RunConfig
from moe2dense.conversion.default_text import kind_of_text
from moe2dense.conversion.plan_warnings import share_text
from moe2dense.conversion.planning import stage_targets
from moe2dense.conversion.results import Plan
from moe2dense.student.target.pruned import pruning_text

# stage: its name in the table
_TITLES = {"train-student": "distill", "build-control": "build control", "train-control": "distill control"}
_LEGEND = {
    "build": "makes the student layer by layer from what the teacher's layers do on the first part of the text",
    "evaluate": "scores held-out text",
    "write": "the teacher writes more text to train on, continuing that text",
    "targets": "stores the teacher's answers on the text, so that training needs no teacher",
    "train-student": "trains the student on these answers",
    "build-control": "the same student from random FFNs, trained alike",
    "transfer": "measures what became of each expert, for the report",
    "samples": "student and teacher write, for the report",
    "skills": "teacher and students do small tasks, for the report",
    "export": "writes the student for serving, and checks it",
    "FLOPs": "of matrix products, two for a multiplication and an addition; run.json has the same count of the run",
    "read": "of weights and stored answers from disk",
    "memory": "the most a stage holds where it computes, beside the program's own. --memory limits what of the teacher is held "
    "at once, not the student's training",
    "host": "the dense architecture that the student has",
}


def print_plan(plan: Plan, settings: RunConfig, console: Console) -> None:
    """Print the plan as tables and sentences."""
    console.print(_shape_table(plan))
    console.print()
    console.print(_cost_table(plan))
    console.print(f"[bold]Times[/] are for {machine_text(plan)}.", highlight=False)
    console.print()
    for line in [*_sentences(plan), *settings_notes(settings, plan)]:
        console.print(line, highlight=False, markup=False)
    console.print()
    console.print("[bold]Words[/]")
    legend = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for word, meaning in _LEGEND.items():
        if word in plan.stages or word in ("FLOPs", "read", "memory", "host"):
            legend.add_row(_TITLES.get(word, word), meaning)
    console.print(Padding(legend, (0, 0, 0, 2)), highlight=False)
    for warning in plan.warnings:
        console.print(f"\n[yellow]warning:[/] {warning}", highlight=False)


def machine_text(plan: Plan) -> str:
    """Say which machine and speed the times are for."""
    machine = plan.machine
    number = f"{machine.count} x " if machine.count > 1 else ""
    rates = [f"{show_flops(machine.share * machine.single)}/s in float32"]
    if machine.half:
        rates.insert(0, f"{show_flops(machine.share * machine.half)}/s in bfloat16")
    products = "measured" if "products" in machine.measured else f"{machine.share:.0%} of the peak"
    disk = f"{show_bytes(machine.disk)}/s from disk ({'measured' if 'disk' in machine.measured else 'assumed'})"
    return f"{number}{machine.title}: {' and '.join(rates)} ({products}), {disk}. --machine plans for another"


def _shape_table(plan: Plan) -> Table:
    """Teacher and student side by side."""
    teacher, student = plan.shape, plan.target
    config = student.config
    table = Table(title=f"{plan.teacher} → {student.label}", title_justify="left", header_style="bold")
    for column in ("", "teacher", "student"):
        table.add_column(column)
    experts = f"{teacher.num_experts} experts, top-{teacher.top_k}, width {teacher.expert_width}"
    experts += f", shared {teacher.shared_width}" if teacher.shared_width else ""
    built = f"built from the teacher ({student.card.title} host)"
    rows = [
        ("source", plan.source, student.checkpoint or built),
        (
            "layers x hidden",
            f"{teacher.num_hidden_layers} x {teacher.hidden_size}",
            f"{config.num_hidden_layers} x {config.hidden_size}",
        ),
        ("FFN", experts, _width_text(plan)),
        (
            "parameters",
            show_count(teacher.parameters),
            f"{show_count(student.parameters)} ({student.parameters / teacher.parameters:.0%})",
        ),
        ("per token", show_count(teacher.active_parameters), show_count(student.parameters)),
        ("kept", "", _kept_text(plan)),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _width_text(plan: Plan) -> str:
    student = plan.target
    experts = student.whole_experts
    if experts <= 0:
        return f"width {student.width} (less than the shared expert's {plan.shape.shared_width})"
    shared = "shared + " if plan.shape.shared_width else ""
    return f"width {student.width} ({shared}{experts:.3g} expert{'' if experts == 1 else 's'})"


def _kept_text(plan: Plan) -> str:
    """What of the teacher the student keeps: everything outside the FFNs or less, and a share of the experts' neurons."""
    teacher, student = plan.shape, plan.target
    neurons = len(teacher.moe_layers) * teacher.num_experts * teacher.expert_width
    layers = len(teacher.moe_layers) * student.config.num_hidden_layers / teacher.num_hidden_layers
    share = layers * student.width / max(neurons, 1)
    outside = pruning_text(teacher, student.geometry, plan.depth) or "attention, norms, embeddings whole"
    return f"{outside}; {share_text(share)} of the expert neurons"


def _cost_table(plan: Plan) -> Table:
    cost = Table(title="Cost", title_justify="left", header_style="bold")
    cost.add_column("stage")
    for column in ("time", "FLOPs", "read", "memory"):
        cost.add_column(column, justify="right", no_wrap=True)
    for name, stage in plan.stages.items():
        cost.add_row(
            _TITLES.get(name, name),
            show_seconds(stage.seconds),
            show_flops(stage.all_flops).replace("FLOP", "").strip() if stage.flops else "",
            show_bytes(stage.read) if stage.read else "",
            show_bytes(stage.memory),
        )
    cost.add_section()
    read = sum(stage.read for stage in plan.stages.values())
    most = max(stage.memory for stage in plan.stages.values())
    flops = show_flops(plan.flops).replace("FLOP", "").strip()
    cost.add_row("all", show_seconds(plan.seconds), flops, show_bytes(read), show_bytes(most))
    return cost


def _sentences(plan: Plan) -> list[str]:
    """The plan's text, where it comes from, how often the teacher is read, what training is like, and the compute in all."""
    spent, from_scratch = plan.flops, plan.from_scratch
    build = show_count(plan.build_tokens)
    tokens = (
        f"tokens: the teacher reads {show_count(plan.tokens)}, of which the build takes {build}; training passes {_what(plan)} {_times(plan)}"
        if plan.tokens
        else f"tokens: {build} for the build; nothing is trained after it"
    )
    texts = [f"data: {_text_name(plan, 'path', plan.data)}"]
    if plan.ood:
        texts.append(f"out-of-distribution text of the report: {_text_name(plan, 'ood', plan.ood)}")
    disk = ", ".join(f"{part} {show_bytes(size)}" for part, size in plan.disk.items() if size)
    lines = [
        f"{tokens} (in blocks of {plan.block}); {plan.held_out} blocks of each held-out text are scored",
        *texts,
        f"out: {plan.out}, with {show_bytes(sum(plan.disk.values()))} in the end ({disk})",
        f"teacher: its {show_bytes(plan.checkpoint_bytes)} are read {plan.reads} times for build and targets; "
        f"{show_count(plan.macro_batch)} tokens share a "
        f"reading (what {show_bytes(plan.memory_budget)} of --memory hold), which makes {show_bytes(plan.bytes_per_token)} a token. "
        f"From {show_count(plan.break_even_batch)} tokens on, computing takes longer than reading",
        plan.placement.sentence(),
    ]
    lines += [f"heal: {plan.healing}"] if plan.healing else []
    lines += [f"training: {plan.training}"] if plan.training else []
    lines.append(
        f"compute: {spent:.2g} FLOPs, {share_text(spent / from_scratch)} of training this student from scratch ({from_scratch:.2g})"
    )
    return lines + ([f"start: {plan.command}"] if plan.command else [])


def _what(plan: Plan) -> str:
    more = f"{show_count(round(plan.extra * plan.tokens))} more, which the teacher writes,"
    return f"them and {more}" if plan.extra else "them"


def _times(plan: Plan) -> str:
    return "once" if plan.passes == 1 else f"{plan.passes:.3g} times"


def _text_name(plan: Plan, name: str, path: str) -> str:
    """A text's path, from the folder one is in where that is shorter; said where the teacher's folder or name chose it."""
    if name == "path" and (kind := kind_of_text(path)):
        return f"{path} (the default for a {kind} model, which the teacher's name says it is; --data names another)"
    shown = Path(path)
    if shown.is_absolute() and shown.is_relative_to(Path.cwd()):
        shown = shown.relative_to(Path.cwd())
    return f"{shown} (named by the teacher's folder)" if name in plan.folder_texts else str(shown)


def settings_notes(settings: RunConfig, plan: Plan) -> list[str]:
    """Return sentences on what of the settings is not the plain way: stages, the text, or the teacher that gives the targets."""
    notes, teacher = [], settings.teacher
    if settings.stages:
        targets = stage_targets(settings)
        way = " -> ".join([settings.model, *(target.label for target in targets)])
        notes.append(f"stages: {way}, {show_count(settings.train.tokens // len(targets))} tokens each")
    if settings.write.share and plan.tokens:
        count = show_count(round(settings.write.share * plan.tokens))
        notes.append(
            f"the teacher first writes {count} tokens of the training text, in one pass over its weights for each new token"
        )
    if settings.train.select and plan.tokens:
        notes.append(f"of the text only {settings.train.select} is trained on, as many steps as on all of it")
    if teacher.quantize:
        notes.append(
            f"the targets come from experts rounded to {teacher.quantize} as they are read; the full teacher judges"
        )
    if teacher.draws:
        experts = f"{teacher.top_k} experts" if teacher.top_k else "as many experts as ever"
        times = f", {teacher.draws} times, and their distributions averaged" if teacher.draws > 1 else ""
        notes.append(f"targets come from {experts} per token, drawn from the router's distribution{times}")
    elif teacher.top_k:
        notes.append(f"targets come from {teacher.top_k} experts per token")
    return notes
