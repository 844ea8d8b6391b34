"""Tables that several commands print."""

from typing import Any

from rich.table import Table


def task_table(tasks: dict[str, Any], models: list[str]) -> Table:
    """Return results of tasks as a rich table: a line for each task and metric, a column for each model, 95% intervals."""
    table = _table("tasks", *map(_short, models))
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
