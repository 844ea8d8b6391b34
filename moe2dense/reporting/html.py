"""report.html: one self-contained page from the report dict. It needs no network and no other file."""

import json
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from moe2dense.common.files import atomic_write
from moe2dense.common.jsonable import clean
from moe2dense.common.numbers import show_number, show_percent
from moe2dense.common.units import show_count, show_seconds
from moe2dense.reporting import headline, line_charts, quality_section
from moe2dense.reporting.cost_section import cost_section
from moe2dense.reporting.definitions import EXPERT, EXPERT_METRICS, MODEL, MODEL_METRICS, NEURONS_HELP, NEURONS_TITLE
from moe2dense.reporting.heatmap import heatmap_data, heatmap_svg, ranked_rows
from moe2dense.reporting.report_file import SCHEMA, Report
from moe2dense.reporting.samples_section import samples_section
from moe2dense.reporting.score_tables import over_units
from moe2dense.reporting.skills_section import skill_table

TEXT_TITLES = {"train": "Training text", "valid": "Held-out text", "ood": "Out-of-distribution text"}


def save_report(report: Report, folder: str | Path) -> Path:
    """Write report.json and report.html into `folder`, each whole or not at all; return the page's path."""
    folder = Path(folder)
    report = clean(report)
    page = render_page(report)
    atomic_write(folder / "report.json", json.dumps(report, ensure_ascii=False, indent=1) + "\n")
    atomic_write(folder / "report.html", page)
    return folder / "report.html"


def render_page(report: Report) -> str:
    """Return the page as one string."""
    environment = Environment(
        loader=PackageLoader("moe2dense.reporting", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": show_number,
        "percent": show_percent,
        "estimate": quality_section.show_estimate,
        "seconds": show_seconds,
        "flags": unbroken_flags,
        "grouped": lambda n: f"{n:,}" if isinstance(n, int) else n,
    }
    environment.globals |= {"island": json_island, "source": lambda name: Markup(_source(environment, name))}
    return environment.get_template("report.html.j2").render(page_context(report))


def _source(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def unbroken_flags(text: str) -> Markup:
    """Return the text with every command-line flag kept on one line."""
    return Markup(re.sub(r"--[a-z][a-z-]*", r'<span class="flag">\g<0></span>', str(escape(text))))


def json_island(value: Any) -> Markup:
    """Return a value as JSON that cannot close its script element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def page_context(report: Report) -> dict[str, Any]:
    """Return everything the template shows, already worded and placed."""
    transfer = report.get("transfer")
    teacher, student = report["teacher"], report["student"]
    return {
        "report": report,
        "schema": SCHEMA,
        "title": f"{teacher.get('name') or 'teacher'} → dense\u00a0{show_count(student.get('parameters') or 0)}",
        "summary": headline.summary(report),
        "interval_unit": over_units(report["rows"]["student"]),
        "teacher_facts": headline.teacher_facts(teacher),
        "student_facts": headline.student_facts(student),
        "tiles": headline.tiles(report),
        "kl_by_row": quality_section.kl_by_row(report),
        "quality_tables": quality_section.quality_tables(report),
        "learning": line_charts.learning_curves(report),
        "parts": line_charts.loss_parts(report),
        "depth": line_charts.error_by_depth(report),
        "domains": quality_section.domain_rows(report),
        "deciles": line_charts.kl_by_frequency(report),
        "positions": line_charts.kl_by_position(report),
        "worst_tokens": quality_section.worst_tokens(report),
        "samples": samples_section(report),
        "skills": skill_table(report),
        "cost": cost_section(report),
        "transfer": transfer,
        "heatmap": heatmap_svg(transfer, "coverage") if transfer else None,
        "heatmap_data": heatmap_data(transfer) if transfer else None,
        "worst": ranked_rows(transfer, "worst") if transfer else [],
        "best": ranked_rows(transfer, "best") if transfer else [],
        "model_metrics": MODEL_METRICS,
        "expert_metrics": EXPERT_METRICS if transfer else (),
        "of_model": MODEL,
        "of_expert": EXPERT,
        "neurons": {"title": NEURONS_TITLE, "help": NEURONS_HELP},
        "text_titles": TEXT_TITLES,
        "config": json.dumps(report["run"].get("config") or {}, indent=2, ensure_ascii=False),
    }
