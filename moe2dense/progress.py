"""Progress for people: bars with rate and ETA on a terminal, plain lines elsewhere.

Stages call `progress(stage, done, total, **numbers)`; nothing in the stages knows how it is shown.
"""

import sys
import time
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from moe2dense.units import show_count, show_seconds


class Report(Protocol):
    """What a stage calls: its name, units done, units in all, and numbers worth showing (tokens= gives a rate)."""

    def __call__(self, stage: str, done: int, total: int, **numbers: Any) -> None: ...


def _show(name: str, value: Any) -> str:
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"


class Lines:
    """One line per stage every few seconds, for logs."""

    def __init__(self, console: Console, every: float = 5.0):
        self.console, self.every = console, every
        self._start: dict[str, float] = {}
        self._last: dict[str, float] = {}

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __call__(self, stage: str, done: int, total: int, **numbers: Any) -> None:
        now = time.perf_counter()
        start = self._start.setdefault(stage, now)
        if done < total and now - self._last.get(stage, start) < self.every:
            return
        self._last[stage] = now
        spent = now - start
        parts = [f"{stage} {done}/{total}"]
        tokens = numbers.pop("tokens", None)
        if tokens and spent > 0:
            parts.append(f"{show_count(tokens / spent)} tokens/s")
        parts += [_show(k, v) for k, v in numbers.items()]
        if done and done < total:
            parts.append(f"ETA {show_seconds(spent / done * (total - done))}")
        elif spent >= 1:
            parts.append(f"in {show_seconds(spent)}")
        self.console.print("  " + "  ".join(parts), highlight=False)
        if done >= total:
            self._start.pop(stage, None)


class Bars:
    """A bar per stage with tokens/s, the latest numbers and the time left."""

    def __init__(self, console: Console):
        columns = (TextColumn("  {task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        self.bars = Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[numbers]}"), console=console)
        self._tasks: dict[str, TaskID] = {}
        self._start: dict[str, float] = {}

    def __enter__(self) -> "Bars":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def __call__(self, stage: str, done: int, total: int, **numbers: Any) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self.bars.add_task(stage, total=total, numbers="")
            self._start[stage] = time.perf_counter()
        tokens = numbers.pop("tokens", None)
        spent = time.perf_counter() - self._start[stage]
        shown = [f"{show_count(tokens / spent)} tokens/s"] if tokens and spent > 0 else []
        shown += [_show(k, v) for k, v in numbers.items()]
        self.bars.update(self._tasks[stage], completed=done, total=total, numbers="  ".join(shown))


def progress_for(console: Console) -> Lines | Bars:
    """Bars on a terminal, lines elsewhere."""
    return Bars(console) if console.is_terminal and sys.stdout.isatty() else Lines(console)
