"""report.html: one self-contained page from the report dict. No network, no file beside it."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from moe2dense.common.files import atomic_write
from moe2dense.common.jsonable import clean
from moe2dense.common.units import show_bytes, show_seconds
from moe2dense.common.units import show_count as _count
from moe2dense.reporting import charts
from moe2dense.reporting.assemble import SCHEMA, Report
from moe2dense.reporting.charts import Series, number, percent
from moe2dense.reporting.definitions import BY_KEY, METRICS, NAMES, QUALITY, row_title
from moe2dense.reporting.heatmap import heatmap_data, heatmap_svg, ranked_rows
from moe2dense.reporting.samples_section import samples_section

STYLES = {"teacher": "s-teacher", "student": "s-student", "before": "s-before", "control": "s-control"}


def show_count(n: float) -> str:
    """3200000 -> '3.2M'."""
    return _count(n).upper()


def write(report: Report, folder: str | Path) -> Path:
    """Write report.json and report.html into `folder`, each whole or not at all; returns the page's path."""
    folder = Path(folder)
    report = clean(report)
    page = render(report)
    atomic_write(folder / "report.json", json.dumps(report, ensure_ascii=False, indent=1) + "\n")
    atomic_write(folder / "report.html", page)
    return folder / "report.html"


def render(report: Report) -> str:
    """The page as one string."""
    environment = Environment(
        loader=PackageLoader("moe2dense.reporting", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "estimate": estimate, "seconds": show_seconds}
    environment.globals |= {"island": island, "source": lambda name: Markup(_source(environment, name))}
    return environment.get_template("report.html.j2").render(context(report))


def _source(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def island(value: Any) -> Markup:
    """A value as JSON that cannot close its script element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def estimate(x: dict[str, Any] | None, style: str = "number") -> str:
    """'0.106 [0.098, 0.114]' of an estimate."""
    if not x or x.get("value") is None:
        return "–"
    show = (lambda v: percent(v, 1)) if style == "percent" else number
    text = show(x["value"])
    return text if x.get("low") is None else f"{text} [{show(x['low'])}, {show(x['high'])}]"


def context(report: Report) -> dict[str, Any]:
    """Everything the template shows, already worded and placed."""
    transfer = report.get("transfer")
    return {
        "report": report,
        "schema": SCHEMA,
        "title": f"{report['teacher'].get('name') or 'teacher'} → dense\u00a0{show_count(report['student'].get('parameters') or 0)}",
        "lede": lede(report),
        "teacher_facts": _teacher_facts(report["teacher"]),
        "student_facts": _student_facts(report["student"]),
        "tiles": tiles(report),
        "quality": quality_rows(report),
        "quality_table": _quality_table(report),
        "learning": learning(report),
        "parts": loss_parts(report),
        "depth": depth(report),
        "domains": domain_rows(report),
        "deciles": decile_chart(report),
        "positions": position_chart(report),
        "worst_tokens": _worst_tokens(report),
        "samples": samples_section(report),
        "transfer": transfer,
        "heatmap": heatmap_svg(transfer, "coverage") if transfer else None,
        "heatmap_data": heatmap_data(transfer) if transfer else None,
        "worst": ranked_rows(transfer, "worst") if transfer else [],
        "best": ranked_rows(transfer, "best") if transfer else [],
        "metrics": METRICS,
        "metric": BY_KEY,
        "definitions": QUALITY,
        "names": NAMES,
        "config": json.dumps(report["run"].get("config") or {}, indent=2, ensure_ascii=False),
    }


def value(report: Report, row: str, name: str) -> float | None:
    """The number of one row of scores, or None."""
    return ((report["rows"].get(row) or {}).get(name) or {}).get("value")


def lede(report: Report) -> str:
    """The result in words; every clause only where its number exists."""
    parts = []
    kl, nll, teacher = (value(report, "student", k) for k in ("kl", "nll", "teacher_nll"))
    if kl is not None:
        parts.append(f"The student's next-token distribution is {number(kl)} nats from the teacher's")
    if nll is not None and teacher is not None:
        parts[-1:] = [f"{parts[-1]}, and it loses {number(max(nll - teacher, 0))} nats of likelihood on held-out text."]
    share = ((report.get("retention") or {}).get("overall") or {}).get("value")
    if share is not None:
        parts.append(
            f"It closes {percent(share, 1)} of the gap between a student trained from a random start and the teacher"
            f"{_without_lost(report)}."
        )
    model = (report.get("transfer") or {}).get("model") or {}
    if model.get("reproduced") is not None:
        parts.append(
            f"Given the same inputs, its FFN layers reproduce {percent(model['reproduced'])} of the expert blocks' output."
        )
    if model.get("transferred") is not None:
        parts.append(
            f"{percent(model['transferred'])} of what the single experts compute can be read from its neurons "
            f"({model['measured']} of {model['experts']} experts measured)."
        )
    return " ".join(parts)


def _without_lost(report: Report) -> str:
    """' (93 % without code, which may be lost)' where domains may be lost and the text has them."""
    kept = ((report.get("retention") or {}).get("kept") or {}).get("value")
    if kept is None or not (report.get("apart") or {}).get("held_out"):
        return ""
    return f" ({percent(kept, 1)} without {_listed(report['apart']['domains'])}, which may be lost)"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _teacher_facts(t: dict[str, Any]) -> list[str]:
    facts = []
    if t.get("parameters"):
        facts.append(f"{show_count(t['parameters'])} parameters, {show_count(t['active_parameters'])} per token")
    if t.get("num_experts"):
        shared = ", plus shared experts" if t.get("shared_width") else ""
        facts.append(f"{t['num_experts']} experts a layer, top-{t['top_k']}{shared}")
    if t.get("num_hidden_layers"):
        facts.append(f"{t['num_hidden_layers']} layers × {t['hidden_size']}")
    if t.get("bytes"):
        facts.append(f"{show_bytes(t['bytes'])} on disk")
    return facts


def _student_facts(s: dict[str, Any]) -> list[str]:
    facts = [f"{show_count(s['parameters'])} parameters, all of them per token"] if s.get("parameters") else []
    if s.get("width"):
        facts.append(f"one dense FFN a layer, {s['width']} wide")
    if s.get("moe_shaped"):
        facts.append("keeps an MoE wrapper around one expert")
    if s.get("method"):
        facts.append(f"built by {s['method']}")
    if s.get("bytes"):
        facts.append(f"{show_bytes(s['bytes'])} exported")
    return facts


def tiles(report: Report) -> list[dict[str, str]]:
    """The figures above the fold: value, what it is, and a small line under it."""
    row, cost = report["rows"]["student"], report.get("cost") or {}
    model = (report.get("transfer") or {}).get("model") or {}
    found = []
    if model.get("reproduced") is not None:
        before = model.get("reproduced_before")
        note = f"before training {percent(before)}" if before is not None else "given the same inputs"
        found.append(("of the expert blocks' output reproduced", percent(model["reproduced"]), note, "reproduced"))
    found.append(("KL to the teacher, nats/token", number(row["kl"]["value"]), _between(row["kl"]), "kl"))
    found.append(
        ("same first choice", percent(row["agreement"]["value"], 1), _between(row["agreement"], True), "agreement")
    )
    versus = f"teacher {number(row['teacher_perplexity']['value'])}"
    found.append(("perplexity", number(row["perplexity"]["value"]), versus, "perplexity"))
    if model.get("transferred") is not None:
        note = "coverage, weighted by output energy"
        found.append(("of single experts' function survives", percent(model["transferred"]), note, "transferred"))
    if cost.get("parameters_ratio") is not None:
        note = (
            f"compute per token {number(cost['active_ratio'])} × the teacher's"
            if cost.get("active_ratio") is not None
            else ""
        )
        found.append(("of the teacher's parameters", percent(cost["parameters_ratio"]), note, ""))
    return [{"label": a, "value": b, "note": c, "help": QUALITY.get(d, "")} for a, b, c, d in found]


def _between(x: dict[str, Any], as_percent: bool = False) -> str:
    if x.get("low") is None:
        return "no interval: one block"
    show = (lambda v: percent(v, 1)) if as_percent else number
    return f"95 %: {show(x['low'])} to {show(x['high'])}"


def quality_rows(report: Report) -> dict[str, Any] | None:
    """KL of every row but the teacher's own, placed on one logarithmic scale."""
    rows = [(name, r["kl"]) for name, r in report["rows"].items() if name != "teacher" and r["kl"]["value"]]
    if not rows:
        return None
    ends = [v for _, e in rows for v in (e["value"], e["low"], e["high"]) if v]
    scale = charts.Scale(min(ends) / 1.5, max(ends) * 1.5, log=True)
    drawn = [
        {
            "title": row_title(name),
            "style": STYLES.get(name, "s-baseline"),
            "at": scale(e["value"]),
            "low": scale(e["low"] or e["value"]),
            "high": scale(e["high"] or e["value"]),
            "text": number(e["value"]),
            "interval": estimate(e),
        }
        for name, e in rows
    ]
    return {"rows": drawn, "ticks": [(scale(t), charts.short(t)) for t in scale.ticks(4)]}


def _quality_table(report: Report) -> list[dict[str, Any]]:
    keys = ("kl", "rare_kl", "nll", "perplexity", "agreement", "top5", "correlation", "ece", "entropy_gap")
    lines = [(NAMES[k], k, "percent" if k in ("agreement", "top5") else "") for k in keys]
    apart = report.get("apart") or {}
    groups: list[tuple[str, str, dict[str, Any]]] = []
    for title, key, rows in (
        ("Held-out text", "held_out", report["rows"]),
        ("Out-of-distribution text", "ood", report.get("ood")),
    ):
        if rows:
            groups.append((title, "", rows))
        if parts := apart.get(key):
            lost = _listed(apart["domains"])
            groups.append((f"{title}, without {lost}", QUALITY["may_be_lost"], parts["kept"]))
            groups.append((f"{title}, {lost} alone: may be lost", QUALITY["may_be_lost"], parts["lost"]))
    return [
        {
            "title": title,
            "help": help,
            "lost": title.endswith("may be lost"),
            "head": [row_title(n) for n in rows],
            "rows": [
                (label, QUALITY.get(k, ""), [estimate(r.get(k), style) for r in rows.values()])
                for label, k, style in (lines if not help else lines[:3] + lines[4:5])
            ],
        }
        for title, help, rows in groups
    ]


def learning(report: Report) -> charts.Lines | None:
    """Validation KL over tokens: student, its rare tokens, control; the value before training at 0."""

    def series(name: str, style: str, records: list[dict[str, Any]], key: str, start: float | None) -> Series:
        points = [
            (float(r["tokens"]), r[key]) for r in records if r.get(key) is not None and r.get("tokens") is not None
        ]
        if points and start is not None and points[0][0] > 0:
            points.insert(0, (0.0, start))
        return Series(name, style, points, dots=len(points) < 40)

    history, control = report.get("history") or [], report.get("control_history") or []
    return charts.lines(
        "KL on validation text while training",
        "training tokens",
        "nats per token, log scale",
        [
            series("Student", "s-student", history, "valid_kl", None),
            series("Student, rare tokens", "s-before", history, "valid_rare_kl", None),
            series("Control", "s-control", control, "valid_kl", None),
        ],
        log=True,
    )


def loss_parts(report: Report) -> charts.Lines | None:
    """The parts of the training loss over tokens, smoothed over 1/40 of the run."""
    history = [r for r in report.get("history") or [] if r.get("tokens") is not None]
    names = list(dict.fromkeys(k for r in history for k in (r.get("parts") or {"loss": 0})))
    window = max(1, len(history) // 40)
    series = []
    for i, name in enumerate(names):
        points = [(float(r["tokens"]), (r.get("parts") or r).get(name)) for r in history]
        known = [(x, y) for x, y in points if y is not None]
        means = [
            (known[j][0], sum(y for _, y in known[max(0, j - window + 1) : j + 1]) / min(window, j + 1))
            for j in range(len(known))
        ]
        series.append(Series(name, ("s-student", "s-before", "s-control", "s-teacher", "s-baseline")[i % 5], means))
    return charts.lines("Parts of the training loss", "training tokens", "loss", series)


def depth(report: Report) -> charts.Lines | None:
    """Per layer: block error on the teacher's inputs and drift of the residual stream, before and after training."""
    layers = (report.get("transfer") or {}).get("layers") or []

    def series(name: str, style: str, key: str) -> Series:
        points = [(float(r["index"]), r["rollup"].get(key)) for r in layers]
        return Series(name, style, [(x, y) for x, y in points if y is not None], dots=len(points) < 60)

    return charts.lines(
        "Error by depth",
        "layer",
        "relative squared error",
        [
            series("Block error, before training", "s-before", "error_before"),
            series("Block error, after", "s-student", "error_after"),
            series("Residual stream, before", "s-before dashed", "stream_before"),
            series("Residual stream, after", "s-student dashed", "stream_after"),
        ],
    )


def domain_rows(report: Report) -> list[dict[str, Any]]:
    """Each domain: KL with interval, likelihood lost, share of the gap closed; domains allowed to be lost last."""
    rows = report["rows"]["student"].get("by_domain") or {}
    kept = (report.get("retention") or {}).get("by_domain") or {}
    allowed = (report.get("retention") or {}).get("allow_loss") or []
    top = max((r["kl"].get("high") or r["kl"]["value"] or 0 for r in rows.values()), default=0) or 1
    found = []
    for name, r in rows.items():
        e = r["kl"]
        found.append(
            {
                "name": name or "(no label)",
                "allowed": name in allowed,
                "tokens": r["tokens"],
                "kl": e,
                "at": 100 * (e["value"] or 0) / top,
                "low": 100 * (e["low"] if e.get("low") is not None else e["value"] or 0) / top,
                "high": 100 * (e["high"] if e.get("high") is not None else e["value"] or 0) / top,
                "lost": (r["nll"]["value"] or 0) - (r["teacher_nll"]["value"] or 0),
                "agreement": r["agreement"],
                "retention": kept.get(name),
            }
        )
    return sorted(found, key=lambda r: (r["allowed"], -(r["kl"]["value"] or 0)))


def decile_chart(report: Report) -> charts.Lines | None:
    """KL by how frequent the true next token is, for every row that has it."""
    series = []
    for name, r in report["rows"].items():
        if name != "teacher":
            cells = [d for d in r.get("by_decile") or [] if d["kl"]["value"] is not None]
            points = [(float(d["decile"]), d["kl"]["value"]) for d in cells]
            band = [(float(d["decile"]), d["kl"]["low"], d["kl"]["high"]) for d in cells if d["kl"]["low"] is not None]
            series.append(Series(row_title(name), STYLES.get(name, "s-baseline"), points, band, dots=True))
    return _kl_lines("KL by token frequency", "tenth of the tokens, rarest first", series)


def _kl_lines(title: str, x_label: str, series: list[Series]) -> charts.Lines | None:
    """Lines of KL; on a logarithmic scale where a control far away would press the others together."""
    means = [sum(y for _, y in s.points) / len(s.points) for s in series if s.points]
    log = bool(means) and max(means) > 4 * min(means) and min(y for s in series for _, y in s.points) > 0
    return charts.lines(title, x_label, "nats per token" + (", log scale" if log else ""), series, log=log)


def position_chart(report: Report) -> charts.Lines | None:
    """KL by position in the block (doubling ranges), for every row that has it."""
    series = []
    for name, r in report["rows"].items():
        if name != "teacher":
            cells = [d for d in r.get("by_position") or [] if d["kl"]["value"] is not None]
            points = [(float(i), d["kl"]["value"]) for i, d in enumerate(cells)]
            series.append(Series(row_title(name), STYLES.get(name, "s-baseline"), points, dots=True))
    chart = _kl_lines("KL by position in the block", "position", series)
    cells = [d for d in report["rows"]["student"].get("by_position") or [] if d["kl"]["value"] is not None]
    if chart and cells:
        last = max(len(cells) - 1, 1)
        labels = [str(d["start"]) if d["end"] - d["start"] == 1 else f"{d['start']}–{d['end'] - 1}" for d in cells]
        keep = max(1, -(-len(labels) // 5))
        chart.x_ticks = [(100 * i / last, text) for i, text in enumerate(labels) if i % keep == 0]
        for i, row in enumerate(chart.table["rows"]):
            row[0] = labels[i] if i < len(labels) else row[0]
    return chart


def _worst_tokens(report: Report) -> list[dict[str, Any]]:
    texts = report.get("tokens") or {}
    rows = report["rows"]["student"].get("worst_tokens") or []
    return [{**r, "text": texts.get(str(r["id"]), f"#{r['id']}")} for r in rows[:12]]
