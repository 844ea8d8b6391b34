"""The run folder: resolved config, stage manifest, lock, atomic writes, resume.

A stage's entry in run.json is written last, so an entry means that the stage's files are whole.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe2dense.common.files import atomic_write
from moe2dense.config.schema import RunConfig
from moe2dense.config.toml import differences, read_config, write_config
from moe2dense.errors import UserError

MANIFEST = "run.json"
CONFIG = "moe2dense.toml"
# what may differ between a run and its resumption: none of it changes the result
_FREE = ("teacher.memory", "teacher.device", "teacher.experts", "train.report_to")


class Run:
    """An open run folder. Use `open_run`; closing releases its lock."""

    def __init__(self, folder: Path, config: RunConfig, lock: Any):
        self.folder, self.config, self._lock = folder, config, lock
        manifest = folder / MANIFEST
        self.manifest: dict[str, Any] = json.loads(manifest.read_text()) if manifest.exists() else {"stages": {}}

    def finished(self, stage: str) -> dict[str, Any] | None:
        """The entry of a finished stage, or None."""
        return self.manifest["stages"].get(stage)

    def finish(self, stage: str, **entry: Any) -> None:
        """Record that a stage's files are whole. `entry` must be JSON."""
        self.manifest["stages"][stage] = {"finished": round(time.time(), 3), **entry}
        self.save()

    def save(self, **fields: Any) -> None:
        """Write run.json, with more top-level fields where given."""
        self.manifest |= fields
        atomic_write(self.folder / MANIFEST, json.dumps(self.manifest, indent=2) + "\n")

    def close(self) -> None:
        self._lock.release()
        with contextlib.suppress(OSError):
            (self.folder / ".lock").unlink()


def _lock(folder: Path) -> Any:
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"--out {folder} is in use by another run; wait for it or choose another --out") from None
    return lock


@contextlib.contextmanager
def open_run(folder: str | Path, config: RunConfig, resume: bool = False) -> Iterator[Run]:
    """Create a run folder, or reopen one with `resume`.

    Raises UserError: the folder exists and is not empty (naming both remedies), nothing to resume, the config differs from
    the run's (showing the difference), the folder is locked or cannot be written.
    """
    folder = Path(folder)
    exists = folder.exists() and (not folder.is_dir() or any(p.name != ".lock" for p in folder.iterdir()))
    if exists and not resume:
        raise UserError(f"--out {folder} exists; continue it with --resume, or choose another --out")
    if resume and not (folder / CONFIG).is_file():
        raise UserError(f"--resume: {folder} holds no run (no {CONFIG}); start it without --resume")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out {folder} cannot be created: {error.strerror}; choose a folder you can write to"
        ) from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"--out {folder} cannot be written; choose a folder you can write to")
    lock = _lock(folder)
    run = None
    try:
        if resume:
            changed = [d for d in differences(read_config(folder / CONFIG), config) if d.split(":")[0] not in _FREE]
            if changed:
                raise UserError(f"--resume: the settings differ from the run in {folder}: {'; '.join(changed)}")
        else:
            atomic_write(folder / CONFIG, write_config(config))
        run = Run(folder, config, lock)
        yield run
    except UserError:
        if not resume and {p.name for p in folder.iterdir()} <= {CONFIG, ".lock"}:
            (folder / CONFIG).unlink(missing_ok=True)  # nothing was done: the corrected command may use the same --out
        raise
    finally:
        if run is not None:
            run.close()
        else:
            lock.release()
