"""Write files and folders whole: under another name first, then renamed. Nothing half-written is left looking finished."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from moe2dense.errors import UserError

# Errors of the place that was chosen, not of the program: each gets one sentence.
_PLACE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "writing there is not permitted",
    errno.EPERM: "writing there is not permitted",
    errno.EFBIG: "a file would be larger than this place allows",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "a part of the path is a file, not a folder",
    errno.ENAMETOOLONG: "the path is too long",
}


@contextlib.contextmanager
def place_errors(out: Path) -> Iterator[None]:
    """Turn a full disk, a read-only folder and the like into one UserError about `out`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = _place_reason(error)
        if reason is None:
            raise
        raise UserError(f"out: {out} cannot be written: {reason}; free some space or choose another --out") from error


def _place_reason(error: BaseException) -> str | None:
    if isinstance(error, OSError) and error.errno in _PLACE:
        return _PLACE[error.errno]
    # safetensors reports the operating system's error as text, in its own exception type.
    for number, reason in _PLACE.items():
        if f"os error {number})" in str(error):
            return reason
    return None


def _flush(folder: Path) -> None:
    """fsync every file and folder below `folder`, so that the rename never precedes the data."""
    for path in [folder, *folder.rglob("*")]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove_leftovers(out: Path) -> None:
    """Delete what an export of `out` that was killed has left: temporary folders whose process is gone."""
    for path in out.parent.glob(f".{out.name}.partial-*"):
        pid = path.name.removeprefix(f".{out.name}.partial-").split("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def whole_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `out`; on success it becomes `out`, on any error or interrupt it is deleted.

    A process that is killed leaves only a hidden `.NAME.partial-PID-...` folder, removed by the next export of `out`.
    Raises UserError when `out` exists (and `overwrite` is off) or its place cannot be written.
    """
    if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out: {out} already exists; choose another --out or remove it")
    with place_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-{os.getpid()}-", dir=out.parent))
        try:
            os.chmod(partial, 0o777 & ~_umask())
            yield partial
            _flush(partial)
            _rename(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _rename(partial: Path, out: Path) -> None:
    old = out.with_name(f".{out.name}.replaced-{os.getpid()}")
    if out.exists():
        out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    parent = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.unlink()


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write a file so that it is either absent, as before, or whole: temporary name, fsync, rename.

    Raises UserError when the place cannot be written or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}; free the disk or choose another --out"
        ) from error


def free_bytes(folder: str | Path) -> int:
    """Free disk space where `folder` is or will be."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
