"""The report in a terminal: what the page says first, as rich tables."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from moe2dense.common.numbers import show_number, show_percent
from moe2dense.common.units import show_count
from moe2dense.reporting.cost_section import cost_in_terminal
from moe2dense.reporting.definitions import EXPERT, MODEL, NEURONS_TITLE
from moe2dense.reporting.headline import choice_sentence
from moe2dense.reporting.heatmap import ranked_rows
from moe2dense.reporting.report_file import Report, ood_path, score_value, transfer_totals
from moe2dense.reporting.samples_section import show_score
from moe2dense.reporting.score_tables import (
    columns_that_fit,
    legend,
    plain_table,
    print_scores,
    show_half_interval,
    titled,
)
from moe2dense.reporting.skills_section import skills_in_terminal

BLOCKS = " ▁▂▃▄▅▆▇█"
UNMEASURED = "·"
RANKED_COLUMNS = {  # key of `ranked_rows` -> heading
    "coverage": EXPERT["coverage"].name,
    "provenance": NEURONS_TITLE.lower(),
    "error": EXPERT["error_after"].name,
    "kl": EXPERT["kl_after"].name,
    "load": EXPERT["load"].name,
    "domain": "main domain",
}
DOMAIN_COLUMNS = {
    "kl": MODEL["kl"].name,
    "lost": "likelihood lost",
    "agreement": MODEL["agreement"].name,
    "retention": MODEL["retention"].name,
    "tokens": "tokens",
}
# left out in this order in a narrow terminal
LESS_NEEDED_OF_DOMAINS = ("tokens", "lost", "agreement")
LESS_NEEDED_OF_RANKED = ("load", "kl", "error", "domain")


def print_report(report: Report, console: Console | None = None) -> None:
    """Print quality of every row, domains, what became of the experts, what the columns mean, and the diagnosis."""
    console = console or Console()
    console.print(_headline(report), highlight=False)
    if exported := choice_sentence(report):
        console.print(Text(exported, style="yellow"))
    model_keys = [*print_scores(_score_tables(report), console)]
    domains = report["rows"]["student"].get("by_domain") or {}
    if len(domains) > 1:
        console.print(_domains(report, domains, console))
        model_keys += ["retention"] if (report.get("retention") or {}).get("by_domain") else []
    transfer = report.get("transfer")
    expert_keys: list[str] = []
    if transfer:
        console.print(_layers(transfer, max(8, min(64, console.width - 44))))
        model_keys.append("transferred")
        expert_keys = ["coverage", "error_after"]
        if transfer.get("worst"):
            columns = _print_ranked("least transferred experts", ranked_rows(transfer, "worst")[:5], console)
            expert_keys += [key for key, column in (("kl_after", "kl"), ("load", "load")) if column in columns]
    if skills := skills_in_terminal(report):
        console.print(skills)
    if report.get("samples"):
        console.print(written_table(report["samples"]))
    if cost := cost_in_terminal(report):
        console.print(cost)
    least_tokens = transfer.get("least_tokens") if transfer else None
    console.print(legend(model_keys, report["rows"]["student"], expert_keys, least_tokens), highlight=False)
    findings = report.get("diagnosis") or []
    if findings:
        console.print()
    for finding in findings:
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
    name = report["teacher"].get("name") or "teacher"
    return Text(f"{name} → dense {parameters}", style="bold") + Text("".join(f"  ·  {p}" for p in parts))


def _domains(report: Report, domains: dict[str, Any], console: Console) -> RenderableType:
    gap_closed = (report.get("retention") or {}).get("by_domain") or {}

    def cell(name: str, column: str) -> str:
        row = domains[name]
        match column:
            case "kl":
                return show_half_interval(row["kl"])
            case "lost":
                return show_number((row["nll"]["value"] or 0) - (row["teacher_nll"]["value"] or 0))
            case "agreement":
                return show_half_interval(row["agreement"], "%")
            case "retention":
                return show_half_interval(gap_closed.get(name), "%")
            case _:
                return f"{row['tokens']:,}"

    def table(columns: Sequence[str]) -> Table:
        filled = plain_table("", *(DOMAIN_COLUMNS[key] for key in columns))
        for name in sorted(domains, key=lambda d: -(domains[d]["kl"]["value"] or 0)):
            filled.add_row(name or "(no label)", *(cell(name, column) for column in columns))
        return filled

    columns = [c for c in DOMAIN_COLUMNS if c != "retention" or gap_closed]
    return titled("by domain", table(columns_that_fit(lambda c: [table(c)], columns, LESS_NEEDED_OF_DOMAINS, console)))


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


def _print_ranked(title: str, rows: list[dict[str, Any]], console: Console) -> tuple[str, ...]:
    """Print experts with as many columns as fit; return the columns."""

    def table(columns: Sequence[str]) -> Table:
        filled = plain_table("layer/expert", *(RANKED_COLUMNS[key] for key in columns))
        for row in rows:
            filled.add_row(f"{row['layer']}/{row['expert']}", *(row[key] for key in columns))
        return filled

    columns = columns_that_fit(lambda c: [table(c)], tuple(RANKED_COLUMNS), LESS_NEEDED_OF_RANKED, console)
    console.print(titled(title, table(columns)))
    return columns
