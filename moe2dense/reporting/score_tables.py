"""Rows of scores as tables for a terminal, all with the same columns, and the line that explains them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from moe2dense.common.numbers import UNKNOWN, show_number, show_percent
from moe2dense.reporting.definitions import EXPERT, MODEL, NEURONS_BRIEF, NEURONS_TITLE, ROW_TITLES, row_title

COLUMNS = ("kl", "rare_kl", "nll", "perplexity", "agreement", "ece")
LESS_NEEDED = ("ece", "perplexity", "rare_kl")  # left out in this order where a terminal is too narrow
SHORT_TITLES = {"before": "before training", "last": "last training step"}


def plain_table(*columns: str) -> Table:
    """Return a table without lines; its first column is flush left, the others are flush right."""
    table = Table(header_style="bold", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def titled(title: str, table: Table) -> RenderableType:
    """Put an empty line and a title over a table; a table's own title would be folded to the table's width."""
    return Group(Text(f"\n{title}", style="dim"), table)


def print_scores(texts: Sequence[tuple[str, dict[str, Any]]], console: Console) -> tuple[str, ...]:
    """Print one table of scores for each (title, rows); return the keys of the columns.

    Every table has the same columns: those with which all of them fit the terminal.
    """
    columns = columns_that_fit(
        lambda columns: [_filled(rows, columns) for _, rows in texts], COLUMNS, LESS_NEEDED, console
    )
    for title, rows in texts:
        console.print(titled(title, _filled(rows, columns)))
    return columns


def columns_that_fit(
    tables_of: Callable[[Sequence[str]], Sequence[Table]],
    columns: Sequence[str],
    less_needed: Sequence[str],
    console: Console,
) -> tuple[str, ...]:
    """Return the columns with which every table fits the terminal: `less_needed` go one by one until all do.

    A column is shown whole or not at all; where the tables do not fit without all of `less_needed`, they are cut.
    """
    unlimited = console.options.update(max_width=10_000)
    fitting = tuple(columns)
    for key in less_needed:
        widths = [Measurement.get(console, unlimited, table).maximum for table in tables_of(fitting)]
        if max(widths, default=0) <= console.width:
            break
        fitting = tuple(c for c in fitting if c != key)
    return fitting


def _filled(rows: dict[str, Any], columns: Sequence[str]) -> Table:
    table = plain_table("", *(MODEL[key].name for key in columns))
    for name, row in rows.items():
        title = row_title(name).split(":")[0].lower() if name in ROW_TITLES else _shortened(name)
        table.add_row(
            SHORT_TITLES.get(name, title), *(show_half_interval(row.get(key), MODEL[key].unit) for key in columns)
        )
    return table


def _shortened(name: str, most: int = 24) -> str:
    """Return the end of a name, such as a path, that is longer than `most`."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


def show_half_interval(estimate: dict[str, Any] | None, unit: str = "") -> str:
    """Show an estimate in its metric's unit, with half the width of its interval: '0.106 ±0.005'; shares without it."""
    if not estimate or estimate.get("value") is None:
        return UNKNOWN
    if unit == "%":
        return show_percent(estimate["value"], 1)
    half = "" if estimate.get("low") is None else f" ±{show_number((estimate['high'] - estimate['low']) / 2, 2)}"
    return show_number(estimate["value"]) + half


def legend(
    model_keys: Sequence[str],
    scores: Mapping[str, Any] | None = None,
    expert_keys: Sequence[str] = (),
    least_tokens: int | None = None,
) -> Text:
    """Say in a few lines what the columns and signs of the tables mean, and where the exact definitions are.

    scores: a row of the tables, which names what its intervals are over and the text that says which tokens are rare.
    least_tokens: held-out tokens below which an expert is not measured; None where no experts are shown.
    """
    scores = scores or {}
    briefs = {key: MODEL[key].brief for key in model_keys}
    if "rare_kl" in briefs and scores.get("rare_by"):
        briefs["rare_kl"] = f"on the tenth of tokens that is rarest in {scores['rare_by']}"
    entries = [(MODEL[key].name, brief) for key, brief in briefs.items()]
    entries += [(EXPERT[key].name, EXPERT[key].brief) for key in expert_keys]
    if expert_keys:
        entries.append((NEURONS_TITLE.lower(), NEURONS_BRIEF))
    entries.append(("±", f"half the 95% interval{over_units(scores)}"))
    if least_tokens is None:
        entries.append((UNKNOWN, "not measured"))
    else:
        entries.append((f"{UNKNOWN} or ·", f"not measured, for an expert: under {least_tokens} held-out tokens"))
    meanings = "; ".join(f"{name}: {brief}" for name, brief in entries if brief)
    return Text(f"\n{meanings}. KL and NLL are in nats per token. More: docs/report.md.", style="dim")


def over_units(scores: Mapping[str, Any]) -> str:
    """Return ' over 31 passages', the independent units that a row's intervals resample; '' where it does not say."""
    count, unit = scores.get("clusters"), scores.get("unit")
    return f" over {count:,} {unit if count != 1 else unit[:-1]}" if count and unit else ""
