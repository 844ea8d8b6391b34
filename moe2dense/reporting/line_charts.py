"""The page's line charts: learning curves, loss parts, error by depth, KL by token frequency and by position."""

import statistics
from typing import Any

from moe2dense.reporting.charts import LineChart, Series, line_chart
from moe2dense.reporting.definitions import row_title
from moe2dense.reporting.report_file import Report

ROW_STYLES = {"teacher": "s-teacher", "student": "s-student", "before": "s-before", "control": "s-control"}
FAR_OUT = 20  # times the median error, from which on errors by depth are on a logarithmic scale
PART_STYLES = ("s-student", "s-before", "s-control", "s-teacher", "s-baseline")


def row_style(name: str) -> str:
    """Return the CSS class of a row's colour; baselines share one."""
    return ROW_STYLES.get(name, "s-baseline")


def learning_curves(report: Report) -> LineChart | None:
    """Draw validation KL over training tokens: student, its rare tokens, control."""

    def series(name: str, style: str, records: list[dict[str, Any]], key: str) -> Series:
        known = [r for r in records if r.get(key) is not None and r.get("tokens") is not None]
        points = [(float(r["tokens"]), r[key]) for r in known]
        return Series(name, style, points, dots=len(points) < 40)

    history, control = report.get("history") or [], report.get("control_history") or []
    return line_chart(
        "KL on validation text while training",
        "training tokens",
        "nats per token, log scale",
        [
            series("Student", "s-student", history, "valid_kl"),
            series("Student, rare tokens", "s-before", history, "valid_rare_kl"),
            series("Control", "s-control", control, "valid_kl"),
        ],
        log=True,
    )


def loss_parts(report: Report) -> LineChart | None:
    """Draw the parts of the training loss over tokens, smoothed over 1/40 of the run."""
    history = [r for r in report.get("history") or [] if r.get("tokens") is not None]
    names = list(dict.fromkeys(k for r in history for k in (r.get("parts") or {"loss": 0})))
    window = max(1, len(history) // 40)
    series = []
    for i, name in enumerate(names):
        values = [(float(r["tokens"]), (r.get("parts") or r).get(name)) for r in history]
        points = [(x, y) for x, y in values if y is not None]
        series.append(Series(name, PART_STYLES[i % len(PART_STYLES)], _smoothed(points, window)))
    return line_chart("Parts of the training loss", "training tokens", "loss", series)


def _smoothed(points: list[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Return the mean of each value and the `window` - 1 values before it."""
    return [
        (points[i][0], sum(y for _, y in points[max(0, i - window + 1) : i + 1]) / min(window, i + 1))
        for i in range(len(points))
    ]


def error_by_depth(report: Report) -> LineChart | None:
    """Draw, per layer, block error on the teacher's inputs and drift of the residual stream, before and after training."""
    layers = (report.get("transfer") or {}).get("layers") or []

    def series(name: str, style: str, key: str) -> Series:
        values = [(float(r["index"]), r["rollup"].get(key)) for r in layers]
        return Series(name, style, [(x, y) for x, y in values if y is not None], dots=len(values) < 60)

    lines = [
        series("Block error, before training", "s-before", "error_before"),
        series("Block error, after", "s-student", "error_after"),
        series("Residual stream, before", "s-before dashed", "stream_before"),
        series("Residual stream, after", "s-student dashed", "stream_after"),
    ]
    errors = [y for line in lines for _, y in line.points]
    # one layer that got lost would press all others to the ground
    log = bool(errors) and max(errors) > FAR_OUT * statistics.median(errors) and min(errors) > 0
    unit = "relative squared error" + (", log scale" if log else "")
    return line_chart("Error by depth", "layer", unit, lines, log=log)


def kl_by_frequency(report: Report) -> LineChart | None:
    """Draw KL by how frequent the true next token is, for every row that has it."""
    series = []
    for name, row in report["rows"].items():
        if name != "teacher":
            cells = _with_kl(row.get("by_decile"))
            points = [(float(d["decile"]), d["kl"]["value"]) for d in cells]
            band = [(float(d["decile"]), d["kl"]["low"], d["kl"]["high"]) for d in cells if d["kl"]["low"] is not None]
            series.append(Series(row_title(name), row_style(name), points, band, dots=True))
    return _kl_chart("KL by token frequency", "tenth of the tokens, rarest first", series)


def kl_by_position(report: Report) -> LineChart | None:
    """Draw KL by position in the block (doubling ranges), for every row that has it."""
    series = []
    for name, row in report["rows"].items():
        if name != "teacher":
            points = [(float(i), d["kl"]["value"]) for i, d in enumerate(_with_kl(row.get("by_position")))]
            series.append(Series(row_title(name), row_style(name), points, dots=True))
    chart = _kl_chart("KL by position in the block", "position", series)
    ranges = _with_kl(report["rows"]["student"].get("by_position"))
    if chart and ranges:
        last = max(len(ranges) - 1, 1)
        labels = [str(d["start"]) if d["end"] - d["start"] == 1 else f"{d['start']}–{d['end'] - 1}" for d in ranges]
        every = max(1, -(-len(labels) // 5))
        chart.x_ticks = [(100 * i / last, text) for i, text in enumerate(labels) if i % every == 0]
        for i, row in enumerate(chart.table["rows"]):
            row[0] = labels[i] if i < len(labels) else row[0]
    return chart


def _with_kl(cells: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    return [d for d in cells or [] if d["kl"]["value"] is not None]


def _kl_chart(title: str, x_label: str, series: list[Series]) -> LineChart | None:
    """Draw lines of KL; on a logarithmic scale where a control far away would press the others together."""
    means = [sum(y for _, y in s.points) / len(s.points) for s in series if s.points]
    log = bool(means) and max(means) > 4 * min(means) and min(y for s in series for _, y in s.points) > 0
    return line_chart(title, x_label, "nats per token" + (", log scale" if log else ""), series, log=log)
