"""Write files and folders whole: under another name first, then renamed. Nothing half-written is left looking finished.

What reads such a file back says in one sentence when its content is not what was written.
"""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from moe2dense.errors import UserError, first_line

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
    errno.EIO: "the device reports an error",
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
    """Return what is wrong with the place, in words, or None for an error of another kind."""
    if isinstance(error, OSError) and error.errno in _PLACE:
        return _PLACE[error.errno]
    # safetensors reports the operating system's error as text, in its own exception type.
    for number, reason in _PLACE.items():
        if f"os error {number})" in str(error):
            return reason
    return None


WEIGHT_SUFFIXES = (".safetensors", ".gguf")

# What the reader of damaged content raises, whatever the content is.
_CONTENT = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError, RecursionError)


@contextlib.contextmanager
def content_errors(file: str | Path, remedy: str) -> Iterator[None]:
    """Turn what damaged content of `file` makes its reader raise into one UserError that ends in the remedy."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or first_line(error)}; {remedy}") from error
    except _CONTENT as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{file} is damaged or was changed by hand ({reason}); {remedy}") from error


def read_json_object(file: str | Path, remedy: str) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises UserError naming the file and the remedy."""
    try:
        value = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {first_line(error)}; {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} cannot be read: it holds {type(value).__name__}, not an object; {remedy}")
    return value


def outside_links(folder: str | Path) -> list[Path]:
    """Return the symbolic links in a checkpoint's folder that lead out of it, or to nothing.

    In the hub's cache a snapshot's files are links to blobs beside it, which belong to it.
    """
    own = Path(folder).resolve()
    bounds = own.parents[1] if own.parent.name == "snapshots" else own
    links = []
    for path in (p for p in (*own.glob("*"), *own.glob("*/*")) if p.is_symlink()):
        try:
            outside = not path.resolve().is_relative_to(bounds)
        except (OSError, RuntimeError):  # links that lead back to themselves
            outside = True
        if outside:
            links.append(path)
    return links


def refuse_outside_links(folder: str | Path) -> None:
    """Raise UserError for a symbolic link that leads out of a checkpoint's folder, files of weights excepted.

    What a folder from elsewhere links to would be read, and copied into exports, as if it were part of it. Shards on another
    disk are common and are read as nothing but numbers (`weights.remarks` says that they lie elsewhere).
    """
    for path in outside_links(folder):
        if path.suffix in WEIGHT_SUFFIXES and path.is_file():
            continue
        raise UserError(
            f"{folder}: {path.name} is a link that leads out of the folder; put the file itself there (cp -L), or remove the link"
        )


def _flush(folder: Path) -> None:
    """Give every file below `folder` its mode and fsync all, so that the rename never precedes the data."""
    mode = 0o666 & ~_umask()
    for path in [folder, *folder.rglob("*")]:
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)  # some libraries, safetensors among them, make files that only their owner can read
        _sync(path)


def _sync(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_leftovers(out: Path) -> None:
    """Delete what a killed process has left of `out`: temporary folders whose process is gone."""
    for path in out.parent.glob(f".{out.name}.partial-*"):
        pid = path.name.removeprefix(f".{out.name}.partial-").split("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def whole_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `out`; on success it becomes `out`, on any error or interrupt it is deleted.

    A process that is killed leaves only a hidden `.NAME.partial-PID-...` folder, removed when `out` is written next.
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
            put_folder(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def put_folder(partial: Path, out: Path) -> None:
    """Put a finished folder in the place of `out`, beside which it lies, once all of it is on disk."""
    _flush(partial)
    _rename(partial, out)


def _umask() -> int:
    """Return the process's umask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _rename(partial: Path, out: Path) -> None:
    """Put `partial` in the place of `out`; the old `out` is there until the rename, and comes back if it fails."""
    old = out.with_name(f".{out.name}.replaced-{os.getpid()}")
    if out.exists():
        out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    _sync(out.parent)
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.unlink()


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success its file becomes `path`, on any error it is deleted.

    The file is synced before it is renamed, so `path` is absent, as before, or whole.
    Raises UserError when the place cannot be written or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        _sync(temporary)
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = _place_reason(error) or (error.strerror or str(error) if isinstance(error, OSError) else None)
        if reason is None:
            raise
        raise UserError(f"{path} cannot be written: {reason}; free the disk or choose another --out") from error


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write a file so that it is absent, as before, or whole. Raises UserError when it cannot be written."""
    with whole_file(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def free_bytes(folder: str | Path) -> int:
    """Return the free disk space in bytes where `folder` is or will be."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
