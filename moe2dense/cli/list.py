"""`moe2dense list`: teachers, students, methods, losses and formats, each with what it needs."""

from typing import Any, Literal

from moe2dense.families.cards import student_cards, teacher_cards

METHODS = {
    "layerwise": "obs + refit + local fit against error-compensated targets, layer by layer (default)",
    "obs": "neurons chosen across all experts by optimal-brain-surgeon elimination, refit",
    "select": "neurons of highest router-weighted energy, refit",
    "concat": "the best experts kept whole, side by side (arXiv 2605.28207)",
    "cluster": "similar experts merged, then concatenated",
    "average": "uniform mean of the experts",
    "weighted-average": "mean of the experts by their routing weight",
    "aligned-average": "experts' neurons matched by the Hungarian method, then averaged",
    "svd": "experts gathered through truncated SVD (OneS, arXiv 2201.10890)",
    "random": "normal initialisation, the control",
}
LOSSES = {
    "forward_kl": "KL(teacher || student); targets: sampled, topk, hidden, full",
    "reverse_kl": "KL(student || teacher); targets: hidden, full",
    "symmetric_kl": "mean of both; targets: hidden, full",
    "jsd": "generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649); jsd:0.3 sets beta; targets: hidden, full",
    "skew_forward_kl": "KL(teacher || mixture) (DistiLLM, arXiv 2402.03898); skew_forward_kl:0.2 sets the share; targets: hidden, full",
    "skew_reverse_kl": "KL(student || mixture) (DistiLLM); targets: hidden, full",
    "tvd": "total variation distance; targets: hidden, full",
}


def catalogue() -> dict[str, list[dict[str, Any]]]:
    """Everything `list` prints, as plain values."""
    teachers = [
        {
            "family": card.model_type,
            "names": [a for row in card.checkpoints for a in row.aliases],
            "checkpoint": card.checkpoints[0].id if card.checkpoints else "",
            "host": card.host,
        }
        for card in teacher_cards().values()
    ]
    students = [
        {
            "name": card.name,
            "kind": "target" if card.host else "host",
            "title": card.title,
            "moe_shaped": card.moe_shaped,
            "loads": card.loads,
        }
        for card in student_cards().values()
    ]
    return {
        "teachers": teachers,
        "students": students,
        "methods": [{"name": k, "what": v} for k, v in METHODS.items()],
        "losses": [{"name": k, "what": v} for k, v in LOSSES.items()],
    }


def show_list(
    what: Literal["all", "teachers", "students", "methods", "losses"] = "all", /, *, json: bool = False
) -> None:
    """List the teachers, students, methods and losses there are, and what each needs.

    Parameters
    ----------
    what: which list
    json: print JSON instead of tables
    """
    from rich.console import Console
    from rich.table import Table

    console, found = Console(), catalogue()
    if what != "all":
        found = {what: found[what]}
    if json:
        console.print_json(data=found)
        return
    for title, rows in found.items():
        rows = [_flat(row) for row in rows]
        table = Table(title=title, title_justify="left", header_style="bold")
        for column in rows[0]:
            table.add_column(column)
        for row in rows:
            table.add_row(*(", ".join(v) if isinstance(v, list) else str(v) for v in row.values()))
        console.print(table)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row for the terminal: what loads a student in a column each, reasons left to --json."""
    loads = {stack: state.split(":")[0] for stack, state in row.get("loads", {}).items()}
    return {k: v for k, v in row.items() if k != "loads"} | loads
