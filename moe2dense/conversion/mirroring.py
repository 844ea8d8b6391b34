"""The mirror of a run's folder: checked before a run, copied to after every stage and checkpoint, fetched from when resuming elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from moe2dense.common.mirror import Mirror, fetch_mirror, local_record, newest_manifest, same_place
from moe2dense.common.object_store import ObjectStore
from moe2dense.common.processes import from_first, world
from moe2dense.common.progress import Report
from moe2dense.config.schema import RunConfig
from moe2dense.config.toml import read_config, read_toml
from moe2dense.conversion.configure import CONFIG, resumed_folder
from moe2dense.conversion.run import Run, lock_folder
from moe2dense.distillation.targets.rolling import WINDOWS
from moe2dense.errors import UserError, first_line

_OPTION = "--mirror"
_COPY_EVERY = 600.0  # seconds, within a stage


def check_mirror(url: str, folder: Path, resume: bool) -> None:
    """Refuse a mirror that cannot be written or that holds another run, by writing and removing a small file. Raises UserError.

    url: '' for none.
    """
    if not url:
        return
    store = ObjectStore(url, _OPTION)
    if same_place(store, folder):
        raise UserError(f"{store.what} and --out {folder} lie one inside the other; choose another URL")
    store.probe()
    if resume:
        Mirror(store, folder)
    elif newest_manifest(store) is not None:
        raise UserError(f"{store.what} holds a run; continue it with --resume, or choose another URL")


def fetch_run(config: str | Path | None, options: dict[str, Any], console: Console) -> None:
    """Before --resume: copy the run from its mirror where there is no run folder here, or an older one.

    The mirror is the one of `options`, of --config, or of the run folder. Raises UserError as `fetch_folder`.
    """
    folder = resumed_folder(config, options)
    fetch_folder(_mirror_of(folder, config, options), folder, (folder / CONFIG).is_file(), console)


def fetch_folder(url: str, folder: Path, begun: bool, console: Console) -> None:
    """Copy what a mirror holds to `folder`, where that is not there or is older. begun: the folder holds a run; url: '' for none.

    Raises UserError where neither place holds the run, where they hold different ones, and for a mirror that is damaged.
    """
    if not url:
        return
    store = ObjectStore(url, _OPTION)
    newest = newest_manifest(store)
    if newest is None:
        if not begun:
            raise UserError(f"--resume: {store.what} holds no run, nor does {folder}; check the URL and --out")
        return
    record = local_record(folder)
    if record is not None and record[0] == newest.run:
        if record[1] >= newest.revision:
            return
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {folder} is not the run that {store.what} holds; choose another --out")
    size = sum(file.size for file in newest.files.values())
    console.print(f"fetching {len(newest.files)} files ({size / 1e6:,.1f} MB) of the run from {url}", highlight=False)
    with contextlib.ExitStack() as stack:
        if folder.exists():
            stack.callback(lock_folder(folder).release)
        fetch_mirror(store, newest, folder)


def _mirror_of(folder: Path, config: str | Path | None, options: dict[str, Any]) -> str:
    """Return the URL of a run's mirror, '' where it has none."""
    if "mirror" in options:
        return str(options["mirror"])
    named = read_toml(config).get("mirror") if config else None
    if named is None and (folder / CONFIG).is_file():
        named = read_config(folder / CONFIG).mirror
    return str(named or "")


class RunMirror:
    """A run's mirror, which never stops the run: what cannot be copied is said and tried again the next time."""

    def __init__(self, mirror: Mirror, console: Console):
        """Keep `mirror` like the run's folder, and say on `console` what goes wrong."""
        self._mirror, self._console = mirror, console
        self._problem = ""

    def update(self) -> None:
        """Copy what has changed."""
        try:
            self._mirror.update()
            self._problem = ""
        except (UserError, OSError) as error:  # of the store, or of the local disk
            self._problem = first_line(error)
            self._warn(f"the mirror could not be brought up to date: {self._problem}; the run goes on")

    def close(self) -> None:
        """Say where the mirror is not what the folder is."""
        if self._problem:
            self._warn(
                f"the mirror is not complete ({self._problem}); it holds an earlier state of the run, and --resume tries again"
            )

    def _warn(self, text: str) -> None:
        self._console.print(f"warning: {text}", style="yellow", highlight=False, markup=False)


def copying(progress: Report, copy: Callable[[], None] | None, every: float = _COPY_EVERY) -> Report:
    """Return a report of progress that also copies what is there, every so many seconds, for a stage that takes hours.

    copy: what copies the run's folder, None for no mirror. Of several processes none does so: the others would write meanwhile.
    """
    if copy is None or world()[1] > 1:
        return progress
    last = time.monotonic()

    def report(stage: str, done: int, total: int, **numbers: Any) -> None:
        nonlocal last
        progress(stage, done, total, **numbers)
        if time.monotonic() - last >= every:
            copy()
            last = time.monotonic()

    return report


@contextlib.contextmanager
def mirrored(run: Run, settings: RunConfig, console: Console) -> Iterator[None]:
    """Mirror a run's folder within the context: after each stage and checkpoint, and at the end as `mirrored_folder` does."""
    with mirrored_folder(settings.mirror, run.folder, console) as run.after_change:
        yield


@contextlib.contextmanager
def mirrored_folder(url: str, folder: Path, console: Console) -> Iterator[Callable[[], None] | None]:
    """Yield what copies a folder to its mirror, None without one (url ''), and copy at the end unless an error ends the context.

    The first of several processes copies, so all must see one folder. After a stage the others wait for it, so that nothing changes
    meanwhile; a checkpoint is copied while training goes on.
    """
    if not url:
        yield None
        return
    copies = None
    if world()[0] == 0:
        # windows of targets come and go while a checkpoint is copied, and the teacher answers them again
        copies = RunMirror(Mirror(ObjectStore(url, _OPTION), folder, leave_out=WINDOWS), console)

    def update() -> None:
        if copies is not None:
            copies.update()

    try:
        yield update
        from_first(update)
    finally:
        if copies is not None:
            copies.close()
