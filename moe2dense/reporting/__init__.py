"""Turn what a run measured into its report: report.json, one self-contained page, and tables in a terminal.

Scores, transfer measurements and the run's settings come in; a report dict, report.html, a diagnosis with remedies, and the
comparison of two reports go out.
"""

from typing import TYPE_CHECKING

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "assemble": ["assemble_report"],
        "compare": ["compare_reports", "print_comparison"],
        "diagnosis": ["diagnose"],
        "html": ["render_page", "save_report"],
        "report_file": ["read_report"],
        "show": ["report"],
        "terminal": ["print_report"],
    },
)

if TYPE_CHECKING:
    from moe2dense.reporting.assemble import assemble_report as assemble_report
    from moe2dense.reporting.compare import compare_reports as compare_reports
    from moe2dense.reporting.compare import print_comparison as print_comparison
    from moe2dense.reporting.diagnosis import diagnose as diagnose
    from moe2dense.reporting.html import render_page as render_page
    from moe2dense.reporting.html import save_report as save_report
    from moe2dense.reporting.report_file import read_report as read_report
    from moe2dense.reporting.show import report as report
    from moe2dense.reporting.terminal import print_report as print_report
