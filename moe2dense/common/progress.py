"""Show progress: bars with rate and ETA on a terminal, plain lines elsewhere.

Stages call `progress(stage, done, total, **numbers)`; nothing in the stages knows how it is shown.
"""

import sys
import time
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from moe2dense.common.units import show_count, show_seconds


class Report(Protocol):
    """What a stage calls: its name, units done, units in all, and numbers worth showing (tokens= gives a rate)."""

    def __call__(self, stage: str, done: int, total: int, **numbers: Any) -> None: ...


def _show(name: str, value: Any) -> str:
    """Return a number with its name, four digits of it where it is a float."""
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"


class Pace:
    """Rates of the stages. A stage's clock starts at its first report, so that what a resumed run skipped does not count."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[float, int, int]] = {}

    def numbers(self, stage: str, done: int, total: int, numbers: dict[str, Any]) -> list[str]:
        """Return what to show beside done/total: tokens/s, the stage's own numbers, the time left or taken."""
        tokens = numbers.pop("tokens", 0)
        now = time.perf_counter()
        start, done_then, tokens_then = self._first.setdefault(stage, (now, done, tokens))
        spent, more = now - start, done - done_then
        shown = [f"{show_count((tokens - tokens_then) / spent)} tokens/s"] if tokens > tokens_then and spent > 0 else []
        shown += [_show(k, v) for k, v in numbers.items()]
        if done < total and more > 0:
            shown.append(f"ETA {show_seconds(spent / more * (total - done))}")
        elif done >= total and spent >= 1:
            shown.append(f"in {show_seconds(spent)}")
        if done >= total:
            del self._first[stage]
        return shown


class Lines:
    """One line per stage every few seconds, for logs."""

    def __init__(self, console: Console, every: float = 5.0):
        self.console, self.every, self._pace = console, every, Pace()
        self._last: dict[str, float] = {}

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __call__(self, stage: str, done: int, total: int, **numbers: Any) -> None:
        now = time.perf_counter()
        shown = self._pace.numbers(stage, done, total, numbers)
        if done < total and now - self._last.setdefault(stage, now) < self.every:
            return
        self._last[stage] = now
        self.console.print("  ".join([f"  {stage} {done}/{total}", *shown]), highlight=False, soft_wrap=True)


class Bars:
    """A bar per stage with tokens/s, the latest numbers and the time left."""

    def __init__(self, console: Console):
        columns = (TextColumn("  {task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        self.bars = Progress(*columns, TextColumn("{task.fields[numbers]}"), console=console)
        self._pace = Pace()
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "Bars":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def __call__(self, stage: str, done: int, total: int, **numbers: Any) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self.bars.add_task(stage, total=total, numbers="")
        shown = self._pace.numbers(stage, done, total, numbers)
        self.bars.update(self._tasks[stage], completed=done, total=total, numbers="  ".join(shown))


def progress_for(console: Console) -> Lines | Bars:
    """Return bars on a terminal, lines elsewhere."""
    return Bars(console) if console.is_terminal and sys.stdout.isatty() else Lines(console)
