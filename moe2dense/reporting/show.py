"""`moe2dense report`: write a run's page again, or compare two runs."""

from pathlib import Path
from typing import Annotated

from rich.console import Console

from moe2dense.config.flags import argument
from moe2dense.reporting.compare import compare_reports, print_comparison
from moe2dense.reporting.html import save_report
from moe2dense.reporting.report_file import read_report, report_errors
from moe2dense.reporting.terminal import print_report


def report(
    run: Annotated[Path, argument("Folder of a run.", example="out/first")],
    other: Annotated[Path | None, argument("Folder of another run, to compare with.", example="out/second")] = None,
    /,
    *,
    json: Annotated[bool, argument("Print JSON instead of tables.")] = False,
) -> None:
    """Write report.html of a run again from its report.json, or compare two runs."""
    console = Console()
    content = read_report(run)
    if other is not None:
        second = read_report(other)
        with report_errors(run if other == run else f"{run}'s or {other}'s report.json"):
            comparison = compare_reports(content, second)
            console.print_json(data=comparison) if json else print_comparison(comparison, console)
        return
    with report_errors(run):
        save_report(content, run)
        if json:
            console.print_json(data=content)
        else:
            print_report(content, console)
            console.print(f"report: {run / 'report.html'}")
