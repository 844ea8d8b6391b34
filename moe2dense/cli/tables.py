"""Tables that several commands print."""

from typing import Any


def score_table(rows: dict[str, Any], title: str) -> Any:
    """Scores (as dicts) by row name as a rich table: value and 95% interval."""
    table = _table(title, "KL", "NLL", "same choice", "rare KL")
    for name, scores in rows.items():
        table.add_row(_short(name), *(_cell(scores[k]) for k in ("kl", "nll", "agreement", "rare_kl")))
    return table


def task_table(tasks: dict[str, Any], models: list[str]) -> Any:
    """Results of the harness as a rich table: a line for each task and metric, a column for each model, 95% intervals."""
    table = _table("tasks of lm-evaluation-harness", *map(_short, models))
    for task, metrics in tasks.items():
        for metric, values in metrics.items():
            table.add_row(_short(f"{task} {metric}", 30), *(_task_cell(values.get(m)) for m in models))
    return table


def _table(title: str, *columns: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, no_wrap=True, min_width=12)
    return table


def _short(name: str, most: int = 22) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _task_cell(found: dict[str, float | None] | None) -> str:
    if not found or found["value"] is None:
        return "–"
    error = found["stderr"]
    return f"{found['value']:.3f}" + ("" if error is None else f" ±{1.96 * error:.3f}")


def _cell(found: dict[str, Any]) -> str:
    """Value and half the width of its 95% interval."""
    value = found["value"]
    if found["low"] is None or found["high"] is None:
        return f"{value:.3f}"
    half = (found["high"] - found["low"]) / 2
    return f"{value:.1f} ±{half:.1f}" if value >= 10 else f"{value:.3f} ±{half:.3f}"
