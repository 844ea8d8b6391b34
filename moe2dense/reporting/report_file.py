"""report.json: the schema's version, and reading it back."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from moe2dense.common.files import content_errors
from moe2dense.errors import UserError, first_line

SCHEMA = 1
Report = dict[str, Any]
Finding = dict[str, str]


def read_report(path: str | Path) -> Report:
    """Read a report from its folder or its report.json.

    Raises UserError where there is none, it is not JSON, or a newer version wrote it.
    """
    path = Path(path)
    file = path / "report.json" if path.is_dir() else path
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} holds no report.json; run `moe2dense report {path}` on a finished run") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({error}); write it again with `moe2dense report`") from error
    if not isinstance(report, dict) or "rows" not in report:
        raise UserError(f"{file} is not a moe2dense report")
    if report.get("schema") != SCHEMA:
        raise UserError(f"{file} has report schema {report.get('schema')!r}; this version reads {SCHEMA}")
    return report


@contextlib.contextmanager
def report_errors(path: str | Path) -> Iterator[None]:
    """Turn what a damaged report makes its page or tables raise into one UserError that names its file."""
    file = Path(path) / "report.json" if Path(path).is_dir() else Path(path)
    remedy = "restore it, or convert again"
    try:
        with content_errors(file, remedy):
            yield
    except TemplateError as error:  # a value that the page needs is not there
        raise UserError(f"{file} is damaged or was changed by hand ({first_line(error)}); {remedy}") from error


def score_value(scores: dict[str, Any] | None, key: str) -> float | None:
    """Return the value of one number of a row of scores; None where the row or the number is missing."""
    return ((scores or {}).get(key) or {}).get("value")


def transfer_totals(report: Report) -> dict[str, Any]:
    """Return what the transfer section says of the whole model; empty where experts were not measured."""
    return (report.get("transfer") or {}).get("model") or {}


def ood_path(report: Report) -> str:
    """Return where the out-of-distribution text comes from; "" where the report does not say."""
    text = ((report.get("run") or {}).get("data") or {}).get("ood")
    return str(text.get("path") or "") if isinstance(text, dict) else ""


def finding(id: str, severity: str, title: str, finding: str, remedy: str) -> Finding:
    """Return a diagnosis as the report has it; severity: "error" or "warning"."""
    return {"id": id, "severity": severity, "title": title, "finding": finding, "remedy": remedy}
