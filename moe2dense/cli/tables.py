"""Tables that several commands print."""

from typing import Any

from rich.table import Table


def score_table(rows: dict[str, Any], title: str) -> Table:
    """Return scores (as dicts) by row name as a rich table: value and 95% interval."""
    table = _table(title, "KL", "NLL", "same choice", "rare KL")
    for name, scores in rows.items():
        table.add_row(_short(name), *(_cell(scores[k]) for k in ("kl", "nll", "agreement", "rare_kl")))
    return table


def task_table(tasks: dict[str, Any], models: list[str]) -> Table:
    """Return results of the harness as a rich table: a line for each task and metric, a column for each model, 95% intervals."""
    table = _table("tasks of lm-evaluation-harness", *map(_short, models))
    for task, metrics in tasks.items():
        for metric, values in metrics.items():
            table.add_row(_short(f"{task} {metric}", 30), *(_task_cell(values.get(m)) for m in models))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, no_wrap=True, min_width=12)
    return table


def _short(name: str, most: int = 22) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _task_cell(score: dict[str, float | None] | None) -> str:
    if not score or score["value"] is None:
        return "–"
    error = score["stderr"]
    return f"{score['value']:.3f}" + ("" if error is None else f" ±{1.96 * error:.3f}")


def _cell(estimate: dict[str, Any]) -> str:
    """Value and half the width of its 95% interval."""
    value = estimate["value"]
    if estimate["low"] is None or estimate["high"] is None:
        return f"{value:.3f}"
    half = (estimate["high"] - estimate["low"]) / 2
    return f"{value:.1f} ±{half:.1f}" if value >= 10 else f"{value:.3f} ±{half:.3f}"
