"""What a run cost, in the page and in the terminal."""

import io
from dataclasses import replace

from rich.console import Console

from moe2dense.common.costs import Cost, cost_of_all
from moe2dense.reporting.cost_section import cost_in_terminal, cost_rows, cost_section
from moe2dense.reporting.html import render_page

BUILD = Cost(
    {"cpu": 1e12, "cuda": 3e12}, disk=2_000_000, bus=5_000_000, memory=9_000, gpu_memory=7_000_000, seconds=4.0
)


def test_stages_and_their_sum(made_up_report):
    report = made_up_report(2, 2)
    report["run"]["cost"] = {"build": BUILD.to_dict(), "export": Cost(memory=5_000, seconds=1.0).to_dict()}
    build, export, whole = cost_rows(report)
    assert build["flops"] == "4 TFLOP (25% on the CPU)" and build["rate"] == "1 TFLOP/s" and build["memory"] == "7 MB"
    assert export["flops"] == "0 FLOP" and export["memory"] == "5 kB" and whole["time"] == "5 s"
    section = cost_section(report)
    assert "Over the bus" in section["head"] and all(len(row) == len(section["head"]) for row in section["rows"])
    page = render_page(report)
    assert 'id="cost"' in page and "4 TFLOP (25% on the CPU)" in page
    out = io.StringIO()
    Console(file=out, width=80).print(cost_in_terminal(report))
    assert "what it cost" in out.getvalue() and "…" not in out.getvalue()


def test_how_much_of_a_known_gpu_was_used(made_up_report):
    report = made_up_report(2, 2)
    known = replace(BUILD, peak=3e12)
    report["run"]["cost"] = {"build": known.to_dict(), "export": Cost(seconds=1.0, peak=3e12).to_dict()}
    build, export, whole = cost_rows(report)
    assert (build["peak"], export["peak"], whole["peak"]) == ("25%", "–", "20%")
    assert "Of the GPU's peak" in cost_section(report)["head"]
    out = io.StringIO()
    Console(file=out, width=80).print(cost_in_terminal(report))
    assert "of peak" in out.getvalue() and "…" not in out.getvalue()
    report["run"]["cost"] = {"build": BUILD.to_dict()}
    assert "Of the GPU's peak" not in cost_section(report)["head"]


def test_several_processes_are_told_apart_by_their_memory(made_up_report):
    report = made_up_report(2, 2)
    both = cost_of_all([Cost({"cpu": 1e12}, memory=9_000, seconds=4.0), Cost({"cpu": 3e12}, memory=6_000, seconds=2.0)])
    report["run"]["cost"] = {"build": both.to_dict(), "export": Cost(memory=5_000, seconds=1.0).to_dict()}
    build, export, whole = cost_rows(report)
    assert (build["flops"], build["rate"], build["memory"]) == ("4 TFLOP", "1 TFLOP/s", "9 kB")
    assert (build["each"], export["each"], whole["each"]) == ("9 kB, 6 kB", "", "9 kB, 6 kB")
    section = cost_section(report)
    assert section["head"][-1] == "Of each process" and all(len(row) == len(section["head"]) for row in section["rows"])
    assert "9 kB, 6 kB" in render_page(report)
    report["run"]["cost"] = {"build": BUILD.to_dict()}
    assert "Of each process" not in cost_section(report)["head"]


def test_a_report_that_does_not_know(made_up_report):
    report = made_up_report(2, 2)
    report["run"].pop("cost", None)
    assert cost_section(report) is None and cost_in_terminal(report) is None
    assert 'id="cost"' not in render_page(report)
