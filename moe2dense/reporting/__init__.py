"""The transfer report: measured (transfer), assembled (report.json), drawn (report.html, terminal), compared."""

from moe2dense.reporting.assemble import assemble, read_report
from moe2dense.reporting.compare import compare, print_comparison
from moe2dense.reporting.html import render, write
from moe2dense.reporting.terminal import print_report

__all__ = ["assemble", "compare", "print_comparison", "print_report", "read_report", "render", "write"]
