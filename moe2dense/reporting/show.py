"""`moe2dense report`: write a run's page again, or compare two runs."""

from pathlib import Path

from rich.console import Console

from moe2dense.reporting.compare import compare_reports, print_comparison
from moe2dense.reporting.html import save_report
from moe2dense.reporting.report_file import read_report
from moe2dense.reporting.terminal import print_report


def show_report(run: Path, other: Path | None = None, /, *, json: bool = False) -> None:
    """Write report.html of a run again from its report.json, or compare two runs.

    Parameters
    ----------
    run: folder of a run
    other: folder of another run, to compare with
    json: print JSON instead of tables
    """
    console = Console()
    report = read_report(run)
    if other is not None:
        comparison = compare_reports(report, read_report(other))
        console.print_json(data=comparison) if json else print_comparison(comparison, console)
        return
    save_report(report, run)
    if json:
        console.print_json(data=report)
    else:
        print_report(report, console)
        console.print(f"report: {run / 'report.html'}")
