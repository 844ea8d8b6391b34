from io import StringIO

from rich.console import Console

from moe2dense.common.progress import Bars, Lines, Pace


def test_lines_say_stage_rate_and_numbers():
    out = StringIO()
    with Lines(Console(file=out, width=200), every=0.0) as progress:
        progress("distill", 1, 4, tokens=2048, loss=0.5)
        progress("distill", 4, 4, tokens=8192, loss=0.25)
    lines = out.getvalue().splitlines()
    assert "distill 1/4" in lines[0]
    assert "loss 0.5" in lines[0]
    assert "distill 4/4" in lines[-1]
    assert "tokens/s" in lines[-1]


def test_pace_counts_from_the_first_report(monkeypatch):
    clock = iter([100.0, 102.0, 104.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    pace = Pace()
    pace.numbers("distill", 50, 60, {"tokens": 5000})  # a resumed run begins here
    assert pace.numbers("distill", 54, 60, {"tokens": 5400}) == ["200 tokens/s", "ETA 3 s"]
    assert pace.numbers("distill", 60, 60, {"tokens": 6000}) == ["250 tokens/s", "in 4 s"]


def test_quiet_between_lines_but_never_silent_at_the_end():
    out = StringIO()
    progress = Lines(Console(file=out, width=200), every=1000.0)
    for step in range(1, 101):
        progress("build", step, 100)
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["100/100"]


def test_bars():
    out = StringIO()
    with Bars(Console(file=out, force_terminal=True, width=120)) as progress:
        progress("build", 1, 2, error=0.5)
        progress("build", 2, 2, error=0.25)
    assert "2/2" in out.getvalue()
    assert "error 0.25" in out.getvalue()
