"""The run folder: resolved config, stage manifest, lock, atomic writes, resume.

A stage's entry in run.json is written last, so an entry means that the stage's files are whole.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from moe2dense.common.costs import Cost
from moe2dense.common.files import atomic_write, content_errors, read_json_object
from moe2dense.common.object_store import is_url
from moe2dense.common.processes import from_first
from moe2dense.config.schema import RunConfig
from moe2dense.config.toml import differences, read_config, write_config
from moe2dense.conversion.configure import CONFIG, FREE_KEYS
from moe2dense.errors import UserError

MANIFEST = "run.json"
_LOCK = ".lock"
_REMEDY = "restore it, or convert again with another --out"


class Run:
    """An open run folder. Use `open_run`; closing releases its lock."""

    def __init__(self, folder: Path, config: RunConfig, manifest: dict[str, Any], lock: BaseFileLock | None):
        """Open a folder. lock: None for a process that leaves writing to the first one."""
        self.folder, self.config, self.manifest, self._lock = folder, config, manifest, lock
        self.inner_costs: list[Cost] = []  # of each stage that is being measured: what stages inside it have cost
        # what the first process does after each stage and, in a thread, after each checkpoint
        self.after_change: Callable[[], None] | None = None

    def finished(self, stage: str) -> dict[str, Any] | None:
        """Return the entry of a finished stage, or None."""
        return self.manifest["stages"].get(stage)

    def finish(self, stage: str, **entry: Any) -> None:
        """Record that a stage's files are whole. `entry` must be JSON; every process gets that of the first."""
        entry = from_first(lambda: {"finished": round(time.time(), 3), **entry})
        self.manifest["stages"][stage] = entry
        self.save()
        if self.after_change is not None:
            from_first(self.after_change)

    def cost(self) -> dict[str, Cost]:
        """Return what each stage has cost so far, over all starts of the run."""
        return {stage: Cost.from_dict(entry) for stage, entry in self.manifest.get("cost", {}).items()}

    def spend(self, stage: str, cost: Cost) -> None:
        """Add what was spent on a stage, finished or not."""
        total = self.cost().get(stage, Cost()) + cost
        self.save(cost=self.manifest.get("cost", {}) | {stage: total.to_dict()})

    def save(self, **fields: Any) -> None:
        """Write run.json, with more top-level fields where given."""
        self.manifest |= fields
        if self._lock is not None:
            atomic_write(self.folder / MANIFEST, json.dumps(self.manifest, indent=2) + "\n")

    def check_inputs(self, **hashes: str) -> None:
        """Note what the run is made from, or compare with what it was made from so far.

        hashes: of the teacher's weights and the texts. Raises UserError for one that is another than when the run began: later stages
        would not fit those that are finished.
        """
        began = self.manifest.get("inputs") or {}
        changed = next((name for name, value in hashes.items() if began.get(name, value) != value), None)
        if changed is not None:
            raise UserError(
                f"--resume: the {changed.replace('_', ' ')} changed since the run in {self.folder} began; put it back as it was, or "
                f"start another run with another --out"
            )
        self.save(inputs=hashes)

    def close(self) -> None:
        """Let others use the folder."""
        if self._lock is None:
            return
        self._lock.release()
        with contextlib.suppress(OSError):
            (self.folder / _LOCK).unlink()


def _read_manifest(file: Path) -> dict[str, Any]:
    """Read run.json. Raises UserError where it is not as `finish` writes it."""
    manifest = read_json_object(file, _REMEDY)
    with content_errors(file, _REMEDY):
        for stage, entry in manifest["stages"].items():
            for name in ("finished", "seconds"):
                if not math.isfinite(entry.get(name, 0)):
                    raise ValueError(f"{name} of stage {stage!r} is {entry[name]!r}")
            if not all(isinstance(row, dict) for row in entry.get("history", [])) or not isinstance(
                entry.get("kl", {}), dict
            ):
                raise ValueError(f"the record of stage {stage!r} is not as it is written")
        extra = manifest.get("extra_text", 0.0)
        if isinstance(extra, bool) or not isinstance(extra, int | float) or not 0 <= extra < math.inf:
            raise ValueError(f"extra_text is {extra!r}")
        for entry in manifest.get("cost", {}).values():
            Cost.from_dict(entry)
    return manifest


def lock_folder(folder: Path) -> BaseFileLock:
    """Return the lock of a run folder, taken. Raises UserError where another run has it."""
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"--out {folder} is in use by another run; wait for it or choose another --out") from None
    return lock


def _left_over(path: Path) -> bool:
    """Return whether a file is what a run leaves that was killed before it wrote anything: its lock, or a file half-written."""
    return path.name == _LOCK or (path.name.startswith(".") and path.name.endswith(".tmp"))


def check_out(folder: str | Path, resume: bool = False) -> None:
    """Refuse a run folder before anything is computed; creates nothing.

    Raises UserError: the folder exists and is not empty (naming both remedies), it cannot be created or written, or there is nothing
    to resume.
    """
    if is_url(folder):
        raise UserError(
            f"--out {folder} is a URL, and a run needs a folder of this machine; add --mirror {folder} to copy that to an object store"
        )
    folder = Path(folder)
    exists = folder.exists() and (not folder.is_dir() or any(not _left_over(p) for p in folder.iterdir()))
    if exists and not resume:
        raise UserError(f"--out {folder} exists; continue it with --resume, or choose another --out")
    if resume and not (folder / CONFIG).is_file():
        raise UserError(f"--resume: {folder} holds no run (no {CONFIG}); start it without --resume")
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not place.is_dir():
        raise UserError(f"--out {folder} cannot be created: {place} is a file; choose a folder you can write to")
    if not os.access(place, os.W_OK):
        raise UserError(f"--out {folder} cannot be written; choose a folder you can write to")


@contextlib.contextmanager
def open_run(folder: str | Path, config: RunConfig, resume: bool = False) -> Iterator[Run]:
    """Create a run folder, or reopen one with `resume`.

    Of several processes the first one holds and writes it. A run that is refused (UserError) before any stage has finished leaves no
    folder behind. Raises UserError as `check_out` does, where the config differs from the run's (showing the difference), and where
    another run has the folder.
    """
    folder = Path(folder)
    own: list[Run] = []
    created = not folder.exists()

    def begin() -> dict[str, Any]:
        own.append(_begin(folder, config, resume, created))
        return own[0].manifest

    manifest = from_first(begin)
    run = own[0] if own else Run(folder, config, manifest, None)
    refused = False
    try:
        yield run
    except UserError:
        refused = True
        raise
    finally:
        run.close()
        if refused and own and not resume:
            _remove_if_unused(folder, created)


def _begin(folder: Path, config: RunConfig, resume: bool, created: bool) -> Run:
    """Lock a run folder and read it, or write its config. Raises UserError, as `open_run`, leaving what was there."""
    check_out(folder, resume)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out {folder} cannot be created: {error.strerror}; choose a folder you can write to"
        ) from error
    lock = lock_folder(folder)
    try:
        for path in folder.glob(".*.tmp"):  # of a process that was killed: the lock says that no other is at work
            path.unlink(missing_ok=True)
        if resume:
            stored = read_config(folder / CONFIG)
            changed = [d for d in differences(stored, config) if d.split(":")[0] not in FREE_KEYS]
            if changed:
                raise UserError(f"--resume: the settings differ from the run in {folder}: {'; '.join(changed)}")
        else:
            atomic_write(folder / CONFIG, write_config(config))
        manifest = folder / MANIFEST
        return Run(folder, config, _read_manifest(manifest) if manifest.exists() else {"stages": {}}, lock)
    except UserError:
        lock.release()
        if not resume:
            _remove_if_unused(folder, created)
        raise
    except BaseException:
        lock.release()
        raise


def _without_stages(file: Path) -> bool:
    """Return whether a file is the manifest of a run that has finished no stage."""
    return file.name == MANIFEST and not _read_manifest(file)["stages"]


def _remove_if_unused(folder: Path, created: bool) -> None:
    """Leave no trace of a run that was refused before it did anything: the corrected command may use the same --out."""
    files = list(folder.iterdir())
    if all(p.name == CONFIG or _left_over(p) or _without_stages(p) for p in files):
        for path in files:
            path.unlink(missing_ok=True)
        if created:
            folder.rmdir()
