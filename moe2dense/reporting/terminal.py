"""The report in a terminal: what the page says first, as rich tables."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from moe2dense.common.units import show_count
from moe2dense.reporting.assemble import Report
from moe2dense.reporting.charts import number, percent
from moe2dense.reporting.definitions import ROW_TITLES, row_title
from moe2dense.reporting.heatmap import ranked_rows

BLOCKS = " ▁▂▃▄▅▆▇█"
COLUMNS = (
    ("KL", "kl", False), ("rare KL", "rare_kl", False), ("NLL", "nll", False), ("ppl", "perplexity", False),
    ("same choice", "agreement", True), ("ECE", "ece", False),
)  # fmt: skip
SPARED = ("ECE", "ppl", "rare KL")  # what goes first where the terminal is too narrow for a table


def print_report(report: Report, console: Console | None = None) -> None:
    """Quality of every row, domains, what became of the experts, and the diagnosis."""
    console = console or Console()
    console.print(_headline(report), highlight=False)
    apart = report.get("apart") or {}
    for title, key, rows in (
        ("held-out text", "held_out", report["rows"]),
        ("out-of-distribution text", "ood", report.get("ood")),
    ):
        if rows:
            console.print(_rows(title, rows, console))
        if parts := apart.get(key):
            lost = ", ".join(apart["domains"])
            console.print(_rows(f"{title} without {lost}", parts["kept"], console))
            console.print(_rows(f"{title}, {lost} alone: may be lost", parts["lost"], console))
    domains = report["rows"]["student"].get("by_domain") or {}
    if len(domains) > 1:
        console.print(_domains(report, domains))
    transfer = report.get("transfer")
    if transfer:
        console.print(_layers(transfer, max(8, min(64, console.width - 44))))
        if transfer.get("worst"):
            console.print(_ranked("least transferred experts", ranked_rows(transfer, "worst")[:5], console.width >= 96))
    if report.get("samples"):
        console.print(written_table(report["samples"]))
    for finding in report.get("diagnosis") or []:
        color = "red" if finding["severity"] == "error" else "yellow"
        console.print(Text(f"{finding['title']}: ", style=color) + Text(f"{finding['finding']} {finding['remedy']}"))


def _headline(report: Report) -> Text:
    cost = report.get("cost") or {}
    parts = [
        f"{report['teacher'].get('name') or 'teacher'} → dense {show_count(report['student'].get('parameters') or 0)}"
    ]
    if cost.get("parameters_ratio") is not None:
        parts.append(f"{percent(cost['parameters_ratio'])} of the parameters")
    share = ((report.get("retention") or {}).get("overall") or {}).get("value")
    if share is not None:
        kept = (report["retention"].get("kept") or {}).get("value")
        apart = report.get("apart") or {}
        without = f" ({percent(kept, 1)} without {', '.join(apart['domains'])})" if apart.get("held_out") else ""
        parts.append(f"{percent(share, 1)} of the gap to the control closed{without}")
    model = (report.get("transfer") or {}).get("model") or {}
    if model.get("reproduced") is not None:
        parts.append(f"{percent(model['reproduced'])} of the expert blocks' output reproduced")
    if model.get("transferred") is not None:
        parts.append(f"{percent(model['transferred'])} of single experts' function survives")
    return Text(parts[0], style="bold") + Text("".join(f"  ·  {p}" for p in parts[1:]))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="dim", header_style="bold", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def _cell(x: dict[str, Any] | None, as_percent: bool = False) -> str:
    if not x or x.get("value") is None:
        return "–"
    if as_percent:
        return percent(x["value"], 1)
    spread = "" if x.get("low") is None else f" ±{number((x['high'] - x['low']) / 2, 2)}"
    return number(x["value"]) + spread


def _rows(title: str, rows: dict[str, Any], console: Console) -> Table:
    """The table with as many columns as fit whole."""
    wide, columns = console.options.update(max_width=10_000), COLUMNS
    for spared in SPARED:
        table = _filled(title, rows, columns)
        if Measurement.get(console, wide, table).maximum <= console.width:
            return table
        columns = tuple(c for c in columns if c[0] != spared)
    return _filled(title, rows, columns)


def _filled(title: str, rows: dict[str, Any], columns: Sequence[tuple[str, str, bool]]) -> Table:
    table = _table(title, "", *(c[0] for c in columns))
    for name, row in rows.items():
        title = {"before": "before training"}.get(
            name, row_title(name).split(":")[0].lower() if name in ROW_TITLES else name
        )
        table.add_row(title, *(_cell(row.get(key), share) for _, key, share in columns))
    return table


def _domains(report: Report, domains: dict[str, Any]) -> Table:
    kept = (report.get("retention") or {}).get("by_domain") or {}
    table = _table("by domain", "", "KL", "likelihood lost", "same choice", "gap closed", "tokens")
    for name, row in sorted(domains.items(), key=lambda item: -(item[1]["kl"]["value"] or 0)):
        lost = (row["nll"]["value"] or 0) - (row["teacher_nll"]["value"] or 0)
        table.add_row(
            name or "(no label)",
            _cell(row["kl"]),
            number(lost),
            _cell(row["agreement"], True),
            _cell(kept.get(name), True),
            str(row["tokens"]),
        )
    return table


def _layers(transfer: dict[str, Any], width: int, most: int = 24) -> Table:
    table = _table("experts by layer", "layer", "survives", "block error", "coverage of each expert")
    table.columns[3].justify = "left"
    rows = transfer["layers"]
    step = -(-len(rows) // most)
    for row in rows[::step]:
        cover = row["metrics"].get("coverage") or [None] * len(row["measured"])
        table.add_row(
            str(row["index"]),
            percent(row["rollup"].get("coverage")),
            f"{number(row['rollup'].get('error_before'))} → {number(row['rollup'].get('error_after'))}",
            bars(cover, width),
        )
    return table


def bars(shares: Sequence[float | None], most: int = 64) -> str:
    """One block character per value between 0 and 1, '·' where unmeasured; long lists are averaged to `most`."""
    if len(shares) > most:
        size = -(-len(shares) // most)
        groups = [[v for v in shares[i : i + size] if v is not None] for i in range(0, len(shares), size)]
        shares = [sum(g) / len(g) if g else None for g in groups]
    return "".join("·" if v is None else BLOCKS[1 + min(7, max(0, int(v * 8)))] for v in shares)


def written_table(samples: dict[str, Any]) -> Table:
    """How likely teacher, student and judge find what was written, as a rich table."""
    readers = [("by teacher", "teacher"), ("by student", "student")]
    readers += [("by judge", "judge")] if samples.get("judge") else []
    table = _table("NLL of what they wrote", "", *(name for name, _ in readers), "distinct bigrams")
    for writer, title in (("student", "student's text"), ("teacher", "teacher's text"), ("text", "held-out text")):
        if writer in samples["scores"]:
            scores = samples["scores"][writer]
            table.add_row(title, *(number(scores.get(k)) for _, k in readers), percent(scores.get("distinct")))
    return table


def _ranked(title: str, rows: list[dict[str, Any]], wide: bool) -> Table:
    columns = [("layer/expert", lambda r: f"{r['layer']}/{r['expert']}"), ("coverage", lambda r: r["coverage"])]
    columns += [("provenance", lambda r: r["provenance"]), ("block error", lambda r: r["error"])]
    if wide:
        columns += [("token KL", lambda r: r["kl"]), ("load", lambda r: r["load"])]
    columns += [("mostly", lambda r: r["domain"])]
    table = _table(title, *(name for name, _ in columns))
    for r in rows:
        table.add_row(*(show(r) for _, show in columns))
    return table
