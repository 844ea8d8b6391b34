"""What a training run writes down while it goes: metrics.jsonl, memory, and the wish to stop."""

import json
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from moe2dense.common.files import atomic_write


class MetricsFile:
    """One JSON record per line, flushed at once; also kept as `records`. path None keeps them in memory only."""

    def __init__(self, path: Path | None):
        self.path = path
        self.records: list[dict[str, Any]] = []

    def truncate(self, step: int) -> None:
        """Keep the records up to `step`; a line cut short by a crash goes too."""
        if self.path is None:
            self.records = [r for r in self.records if r["step"] <= step]
            return
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.records = []
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if record["step"] <= step:
                self.records.append(record)
        atomic_write(self.path, "".join(json.dumps(r) + "\n" for r in self.records))

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")


class Interrupts:
    """Ctrl-C asks for a stop after the step in hand; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("stopping after this step; once more to stop at once", file=sys.stderr)

    def __exit__(self, *_: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


def memory_bytes() -> int:
    """Memory in use: of this process, or allocated at most on its GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import psutil

    return psutil.Process().memory_info().rss
