"""Print a plan as tables and sentences."""

from typing import Any

from moe2dense.common.units import show_bytes, show_count, show_seconds
from moe2dense.config.schema import RunConfig
from moe2dense.conversion.results import Plan


def print_plan(plan: Plan, console: Any) -> None:
    """The plan as tables on a rich console."""
    from rich.table import Table

    from moe2dense.student.target.pruned import pruning_text

    s, t = plan.shape, plan.target
    table = Table(title=f"{plan.teacher} → {t.label}", title_justify="left", show_header=True, header_style="bold")
    for column in ("", "teacher", "student"):
        table.add_column(column)
    neurons = len(s.moe_layers) * s.num_experts * s.expert_width
    moe = f"{s.num_experts} experts, top-{s.top_k}, width {s.expert_width}"
    moe += f", shared {s.shared_width}" if s.shared_width else ""
    part = len(s.moe_layers) * t.config.num_hidden_layers / s.num_hidden_layers
    outside = pruning_text(s, t.geometry, plan.depth) or "attention, norms, embeddings whole"
    rows = [
        ("source", plan.source, f"built from the teacher ({t.card.title} host)" if not t.checkpoint else t.checkpoint),
        (
            "layers x hidden",
            f"{s.num_hidden_layers} x {s.hidden_size}",
            f"{t.config.num_hidden_layers} x {t.config.hidden_size}",
        ),
        ("FFN", moe, f"width {t.width} ({t.whole_experts:.3g} expert{'' if t.whole_experts == 1 else 's'})"),
        ("parameters", show_count(s.parameters), f"{show_count(t.parameters)} ({t.parameters / s.parameters:.0%})"),
        ("per token", show_count(s.active_parameters), show_count(t.parameters)),
        ("kept", "", f"{outside}; {part * t.width / max(neurons, 1):.0%} of the expert neurons"),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    cost = Table(title="Cost", title_justify="left", header_style="bold")
    for column in ("stage", "memory", "disk", "FLOPs", "time"):
        cost.add_column(column)
    for stage, work in (("build", "build"), ("targets", "teacher"), ("distill", "student"), ("evaluate", "")):
        disk = plan.disk.get("checkpoints" if stage == "distill" else stage, 0)
        cost.add_row(
            stage,
            show_bytes(plan.memory[stage]),
            show_bytes(disk) if disk else "",
            f"{plan.flops[work]:.2g}" if work else "",
            show_seconds(plan.seconds[work]) if work else "",
        )
    cost.add_row("reading", "", "", "", show_seconds(plan.seconds["reading"]))
    console.print(cost)
    from_scratch = plan.flops["from_scratch"]
    spent = plan.flops["teacher"] + plan.flops["build"] + plan.flops["student"]
    console.print(
        f"tokens: {show_count(plan.tokens)} teacher positions, {show_count(plan.build_tokens)} of them in the build, blocks of {plan.block}"
    )
    console.print(f"data: {plan.data}   out: {plan.out}")
    console.print(
        f"teacher reads: {plan.reads} x {show_bytes(plan.checkpoint_bytes)}; {show_bytes(plan.bytes_per_token)} per token at a macro-batch of "
        f"{show_count(plan.macro_batch)} tokens ({show_bytes(plan.memory_budget)} of memory); reading costs less than computing from {show_count(plan.break_even_batch)} tokens on"
    )
    console.print(
        f"compute: {spent:.2g} FLOPs, {100 * spent / from_scratch:.2g}% of training this student from scratch ({from_scratch:.2g})"
    )
    for warning in plan.warnings:
        console.print(f"[yellow]warning:[/] {warning}")


def describe(settings: RunConfig, plan: Any) -> str:
    """What of the text, or of the teacher that writes the targets, is not the plain one; '' when nothing is."""
    said, teacher = [], settings.teacher
    if settings.write.share and plan.tokens:
        count = show_count(round(settings.write.share * plan.tokens))
        said.append(
            f"the teacher first writes {count} tokens of the training text, in one pass over its weights for each new token"
        )
    if settings.train.select and plan.tokens:
        said.append(f"of the text only {settings.train.select} is trained on, as many steps as on all of it")
    if teacher.quantize:
        said.append(
            f"the batches is taught by experts rounded to {teacher.quantize} as they are read; the full teacher judges"
        )
    if teacher.draws:
        how = f"{teacher.top_k or 'as many'} experts per token{'' if teacher.top_k else ' as ever'}"
        times = f", {teacher.draws} times, and their distributions averaged" if teacher.draws > 1 else ""
        said.append(f"targets come from {how}, drawn from the router's distribution{times}")
    elif teacher.top_k:
        said.append(f"targets come from {teacher.top_k} experts per token")
    return "; ".join(said)
