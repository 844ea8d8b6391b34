"""What a training run records while it goes: metrics.jsonl, memory, and whether it was asked to stop."""

import json
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import torch

from moe2dense.common.files import atomic_write


class MetricsFile:
    """One JSON record per line, written at once, and all of them as `records`. With path None they are in memory only."""

    def __init__(self, path: Path | None):
        self.path = path
        self.records: list[dict[str, Any]] = []

    def truncate(self, step: int) -> None:
        """Drop the records after `step`, and lines that are none: one may have been cut short by a crash."""
        if self.path is None:
            self.records = [r for r in self.records if r["step"] <= step]
            return
        lines = self.path.read_text(errors="replace").splitlines() if self.path.exists() else []
        self.records = []
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] <= step:
                self.records.append(record)
        atomic_write(self.path, "".join(json.dumps(r) + "\n" for r in self.records))

    def add(self, record: dict[str, Any]) -> None:
        """Write one record."""
        self.records.append(record)
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")


class Interrupts:
    """Within the context Ctrl-C, or SIGTERM, asks for a stop after the present step; a second one stops at once.

    SIGTERM is what schedulers send before they take a machine away.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("stopping after this step; once more to stop at once", file=sys.stderr)

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def memory_bytes() -> int:
    """Return the memory in use: of this process, or allocated at most on its GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss
