"""The page's tables of quality: KL of every row on one scale, all scores by text, domains, worst tokens."""

from typing import Any

from moe2dense.common.numbers import UNKNOWN, show_number
from moe2dense.reporting.charts import Scale, axis_number
from moe2dense.reporting.definitions import MODEL, SCORE_KEYS, row_title
from moe2dense.reporting.headline import listed, show_in
from moe2dense.reporting.line_charts import row_style
from moe2dense.reporting.report_file import Report

KEYS_OF_A_PART = ("kl", "rare_kl", "nll", "agreement")  # where a text is split by what may be lost


def show_estimate(estimate: dict[str, Any] | None, unit: str = "") -> str:
    """Show an estimate with its interval: '0.106 [0.098, 0.114]'."""
    if not estimate or estimate.get("value") is None:
        return UNKNOWN
    text = show_in(unit, estimate["value"])
    if estimate.get("low") is None:
        return text
    return f"{text} [{show_in(unit, estimate['low'])}, {show_in(unit, estimate['high'])}]"


def kl_by_row(report: Report) -> dict[str, Any] | None:
    """Place KL of every row but the teacher's own on one logarithmic scale."""
    rows = [(name, r["kl"]) for name, r in report["rows"].items() if name != "teacher" and r["kl"]["value"]]
    if not rows:
        return None
    ends = [v for _, kl in rows for v in (kl["value"], kl["low"], kl["high"]) if v and v > kl["value"] / 30]
    scale = Scale(min(ends) / 1.5, max(ends) * 1.5, log=True)
    placed = [
        {
            "title": row_title(name),
            "style": row_style(name),
            "at": scale(kl["value"]),
            "low": scale(kl["value"] if kl["low"] is None else max(kl["low"], min(ends) / 1.5)),
            "high": scale(kl["high"] or kl["value"]),
            "text": show_number(kl["value"]),
            "interval": show_estimate(kl),
        }
        for name, kl in rows
    ]
    return {"rows": placed, "ticks": [(scale(t), axis_number(t)) for t in scale.ticks(4)]}


def quality_tables(report: Report) -> list[dict[str, Any]]:
    """Return one table of scores for each text, and for its parts where domains may be lost."""
    apart = report.get("apart") or {}
    tables = []
    for title, key, rows in (
        ("Held-out text", "held_out", report["rows"]),
        ("Out-of-distribution text", "ood", report.get("ood")),
    ):
        if rows:
            tables.append(_quality_table(title, rows, SCORE_KEYS))
        if parts := apart.get(key):
            domains, help = listed(apart["domains"]), MODEL["may_be_lost"].help
            tables.append(_quality_table(f"{title}, without {domains}", parts["kept"], KEYS_OF_A_PART, help))
            tables.append(
                _quality_table(f"{title}, {domains} alone: may be lost", parts["lost"], KEYS_OF_A_PART, help, lost=True)
            )
    return tables


def _quality_table(
    title: str, rows: dict[str, Any], keys: tuple[str, ...], help: str = "", lost: bool = False
) -> dict[str, Any]:
    def line(key: str) -> tuple[str, str, list[str]]:
        metric = MODEL[key]
        return metric.title, metric.help, [show_estimate(row.get(key), metric.unit) for row in rows.values()]

    head = [row_title(name) for name in rows]
    return {"title": title, "help": help, "lost": lost, "head": head, "rows": [line(key) for key in keys]}


def domain_rows(report: Report) -> list[dict[str, Any]]:
    """Return each domain's KL with interval, likelihood lost and share of the gap closed; domains that may be lost last."""
    rows = report["rows"]["student"].get("by_domain") or {}
    gap_closed = (report.get("retention") or {}).get("by_domain") or {}
    allowed = (report.get("retention") or {}).get("allow_loss") or []
    top = max((r["kl"].get("high") or r["kl"]["value"] or 0 for r in rows.values()), default=0) or 1
    shown = []
    for name, row in rows.items():
        kl = row["kl"]
        value = kl["value"] or 0
        shown.append(
            {
                "name": name or "(no label)",
                "allowed": name in allowed,
                "tokens": row["tokens"],
                "kl": kl,
                "at": 100 * value / top,
                "low": 100 * (kl["low"] if kl.get("low") is not None else value) / top,
                "high": 100 * (kl["high"] if kl.get("high") is not None else value) / top,
                "lost": (row["nll"]["value"] or 0) - (row["teacher_nll"]["value"] or 0),
                "agreement": row["agreement"],
                "retention": gap_closed.get(name),
            }
        )
    return sorted(shown, key=lambda r: (r["allowed"], -(r["kl"]["value"] or 0)))


def worst_tokens(report: Report, most: int = 12) -> list[dict[str, Any]]:
    """Return the tokens that the student predicts least like its teacher, with their text."""
    texts = report.get("tokens") or {}
    rows = report["rows"]["student"].get("worst_tokens") or []
    return [{**r, "text": texts.get(str(r["id"]), f"#{r['id']}")} for r in rows[:most]]
