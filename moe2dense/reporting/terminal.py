"""The report in a terminal: what the page says first, as rich tables."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from moe2dense.common.numbers import show_number, show_percent
from moe2dense.common.units import show_count
from moe2dense.reporting.definitions import EXPERT, MODEL, NEURONS_TITLE
from moe2dense.reporting.heatmap import ranked_rows
from moe2dense.reporting.report_file import Report, ood_path, score_value, transfer_totals
from moe2dense.reporting.samples_section import show_score
from moe2dense.reporting.score_tables import legend, plain_table, print_scores, show_half_interval, titled

BLOCKS = " ▁▂▃▄▅▆▇█"
UNMEASURED = "·"
RANKED_COLUMNS: tuple[tuple[str, str, bool], ...] = (  # (heading, key of `ranked_rows`, only in a wide terminal)
    (EXPERT["coverage"].name, "coverage", False),
    (NEURONS_TITLE.lower(), "provenance", False),
    (EXPERT["error_after"].name, "error", False),
    (EXPERT["kl_after"].name, "kl", True),
    (EXPERT["load"].name, "load", True),
    ("main domain", "domain", False),
)


def print_report(report: Report, console: Console | None = None) -> None:
    """Print quality of every row, domains, what became of the experts, what the columns mean, and the diagnosis."""
    console = console or Console()
    console.print(_headline(report), highlight=False)
    model_keys = [*print_scores(_score_tables(report), console)]
    domains = report["rows"]["student"].get("by_domain") or {}
    if len(domains) > 1:
        console.print(_domains(report, domains))
        model_keys += ["retention"] if (report.get("retention") or {}).get("by_domain") else []
    transfer = report.get("transfer")
    expert_keys: list[str] = []
    if transfer:
        wide = console.width >= 96
        console.print(_layers(transfer, max(8, min(64, console.width - 44))))
        model_keys.append("transferred")
        expert_keys = ["coverage", "error_after"]
        if transfer.get("worst"):
            console.print(_ranked("least transferred experts", ranked_rows(transfer, "worst")[:5], wide))
            expert_keys += ["kl_after", "load"] if wide else []
    if report.get("samples"):
        console.print(written_table(report["samples"]))
    least_tokens = transfer.get("least_tokens") if transfer else None
    console.print(legend(model_keys, expert_keys, least_tokens), highlight=False)
    for finding in report.get("diagnosis") or []:
        color = "red" if finding["severity"] == "error" else "yellow"
        console.print(Text(f"{finding['title']}: ", style=color) + Text(f"{finding['finding']} {finding['remedy']}"))


def _score_tables(report: Report) -> list[tuple[str, dict[str, Any]]]:
    """Return (title, rows) of every text, and of its parts where domains may be lost."""
    apart = report.get("apart") or {}
    path = ood_path(report)
    tables = []
    for title, key, rows in (
        ("held-out text", "held_out", report["rows"]),
        (f"out-of-distribution text{f' ({path})' if path else ''}", "ood", report.get("ood")),
    ):
        if rows:
            tables.append((title, rows))
        if parts := apart.get(key):
            lost = ", ".join(apart["domains"])
            tables.append((f"{title} without {lost}", parts["kept"]))
            tables.append((f"{title}, {lost} alone: may be lost", parts["lost"]))
    return tables


def _headline(report: Report) -> Text:
    cost, totals = report.get("cost") or {}, transfer_totals(report)
    parameters = show_count(report["student"].get("parameters") or 0)
    parts = []
    if cost.get("parameters_ratio") is not None:
        parts.append(f"{show_percent(cost['parameters_ratio'])} of the parameters")
    share = score_value(report.get("retention"), "overall")
    if share is not None:
        apart, without = report.get("apart") or {}, ""
        if apart.get("held_out"):
            without = (
                f" ({show_percent(score_value(report['retention'], 'kept'), 1)} without {', '.join(apart['domains'])})"
            )
        parts.append(f"{show_percent(share, 1)} of the gap to the control closed{without}")
    if totals.get("reproduced") is not None:
        parts.append(f"{show_percent(totals['reproduced'])} of the expert blocks' output reproduced")
    if totals.get("transferred") is not None:
        parts.append(f"{show_percent(totals['transferred'])} of single experts' function survives")
    name = report["teacher"].get("name") or "teacher"
    return Text(f"{name} → dense {parameters}", style="bold") + Text("".join(f"  ·  {p}" for p in parts))


def _domains(report: Report, domains: dict[str, Any]) -> RenderableType:
    gap_closed = (report.get("retention") or {}).get("by_domain") or {}
    columns = [
        "KL",
        "likelihood lost",
        MODEL["agreement"].name,
        *([MODEL["retention"].name] if gap_closed else []),
        "tokens",
    ]
    table = plain_table("", *columns)
    for name, row in sorted(domains.items(), key=lambda item: -(item[1]["kl"]["value"] or 0)):
        lost = (row["nll"]["value"] or 0) - (row["teacher_nll"]["value"] or 0)
        table.add_row(
            name or "(no label)",
            show_half_interval(row["kl"]),
            show_number(lost),
            show_half_interval(row["agreement"], "%"),
            *([show_half_interval(gap_closed.get(name), "%")] if gap_closed else []),
            f"{row['tokens']:,}",
        )
    return titled("by domain", table)


def _layers(transfer: dict[str, Any], width: int, most: int = 24) -> RenderableType:
    """Return a table of at most `most` layers, each with its experts' coverage in `width` characters."""
    table = plain_table("layer", MODEL["transferred"].name, EXPERT["error_after"].name, "coverage of each expert")
    table.columns[3].justify = "left"
    rows = transfer["layers"]
    step = -(-len(rows) // most)
    for row in rows[::step]:
        coverage = row["metrics"].get("coverage") or [None] * len(row["measured"])
        table.add_row(
            str(row["index"]),
            show_percent(row["rollup"].get("coverage")),
            f"{show_number(row['rollup'].get('error_before'))} → {show_number(row['rollup'].get('error_after'))}",
            bars(coverage, width),
        )
    return titled("experts by layer", table)


def bars(shares: Sequence[float | None], most: int = 64) -> str:
    """Return one block character per value between 0 and 1, '·' where unmeasured; long lists are averaged to `most`."""
    if len(shares) > most:
        size = -(-len(shares) // most)
        groups = [[v for v in shares[i : i + size] if v is not None] for i in range(0, len(shares), size)]
        shares = [sum(g) / len(g) if g else None for g in groups]
    return "".join(UNMEASURED if v is None else BLOCKS[1 + min(7, max(0, int(v * 8)))] for v in shares)


def written_table(samples: dict[str, Any]) -> RenderableType:
    """Return how likely teacher, student and judge find what was written, as a rich table."""
    keys = ("teacher", "student", *(("judge",) if samples.get("judge") else ()), "distinct")
    table = plain_table("", *(MODEL[f"written_{key}"].name for key in keys))
    for writer, title in (("student", "student's text"), ("teacher", "teacher's text"), ("text", "held-out text")):
        if writer in samples["scores"]:
            scores = samples["scores"][writer]
            table.add_row(title, *(show_score(key, scores.get(key)) for key in keys))
    return titled(
        "NLL of what they wrote, in nats per token" + (" (by judge: per byte)" if samples.get("judge") else ""), table
    )


def _ranked(title: str, rows: list[dict[str, Any]], wide: bool) -> RenderableType:
    columns = [(heading, key) for heading, key, only_wide in RANKED_COLUMNS if wide or not only_wide]
    table: Table = plain_table("layer/expert", *(heading for heading, _ in columns))
    for row in rows:
        table.add_row(f"{row['layer']}/{row['expert']}", *(row[key] for _, key in columns))
    return titled(title, table)
