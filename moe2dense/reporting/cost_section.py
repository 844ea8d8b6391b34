"""What a run cost, stage by stage: time, compute, bytes from disk and over the bus, memory."""

from typing import Any

from rich.console import RenderableType

from moe2dense.common.costs import Cost
from moe2dense.common.numbers import show_percent
from moe2dense.common.units import show_bytes, show_flops, show_seconds
from moe2dense.reporting.report_file import Report
from moe2dense.reporting.score_tables import plain_table, titled

COST_HELP = (
    "FLOPs are those of matrix products, a multiplication and an addition each; with a GPU the share that the CPU made is given. "
    "Of the GPU's peak: its FLOPs over the stage's time, by what the card is sold with in bfloat16 (model FLOPs utilisation). "
    "Read: weights and stored targets from disk. Bus: sent to the GPU or fetched from it. Memory: the most that the process held, "
    "of the GPU where there is one. Of several processes: FLOPs, speed and bytes are those of all together, memory is that of the one "
    "that held most, and the last column has that of each; it is empty where the first process worked alone."
)


def cost_rows(report: Report) -> list[dict[str, str]]:
    """Return {"stage", "time", "flops", "rate", "peak", "read", "bus", "memory", "each"} of each stage and of the run; [] where unknown."""
    stages = {name: Cost.from_dict(entry) for name, entry in (report["run"].get("cost") or {}).items()}
    if not stages:
        return []
    whole = sum(stages.values(), Cost())
    return [_row(name, cost) for name, cost in [*stages.items(), ("all", whole)]]


def _row(stage: str, cost: Cost) -> dict[str, str]:
    total = sum(cost.flops.values())
    on_cpu = cost.flops.get("cpu", 0.0)
    flops = show_flops(total)
    if len(cost.flops) > 1:
        flops += f" ({show_percent(on_cpu / total)} on the CPU)"
    share = cost.utilisation
    return {
        "stage": stage,
        "time": show_seconds(cost.seconds),
        "flops": flops,
        "rate": f"{show_flops(total / cost.seconds)}/s" if cost.seconds else "",
        "peak": "" if not cost.peak else show_percent(share) if share else "–",
        "read": show_bytes(cost.disk),
        "bus": show_bytes(cost.bus) if cost.bus else "",
        "memory": show_bytes(cost.gpu_memory or cost.memory),
        "each": ", ".join(show_bytes(size) for size in cost.gpu_memory_of_each or cost.memory_of_each),
    }


def cost_in_terminal(report: Report) -> RenderableType | None:
    """Return the table for a terminal; None where the report does not say."""
    rows = cost_rows(report)
    if not rows:
        return None
    heads = {"stage": "", "time": "time", "flops": "FLOPs", "read": "read", "memory": "memory"}
    if any(row["peak"] for row in rows):
        heads = {"stage": "", "time": "time", "flops": "FLOPs", "peak": "of peak", "read": "read", "memory": "memory"}
    table = plain_table(*heads.values())
    for row in rows:
        table.add_row(*(row[key] for key in heads))
    return titled("what it cost", table)


def cost_section(report: Report) -> dict[str, Any] | None:
    """Return {"head", "rows", "help"} for the page; None where the report does not say."""
    rows = cost_rows(report)
    if not rows:
        return None
    keys = {"stage": "Stage", "time": "Time", "flops": "FLOPs", "rate": "Speed"}
    keys |= {"peak": "Of the GPU's peak"} if any(row["peak"] for row in rows) else {}
    keys |= {"read": "Read from disk"}
    keys |= {"bus": "Over the bus"} if any(row["bus"] for row in rows) else {}
    keys |= {"memory": "Most memory"}
    keys |= {"each": "Of each process"} if any(row["each"] for row in rows) else {}
    return {"head": list(keys.values()), "rows": [[row[key] for key in keys] for row in rows], "help": COST_HELP}
