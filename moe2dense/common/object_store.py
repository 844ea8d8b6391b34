"""Object stores (s3://, gs://, file://, ...): files put there, read back, listed and removed through fsspec, with retries."""

import contextlib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TypeVar

import fsspec
from filelock import FileLock
from fsspec.implementations.local import LocalFileSystem

from moe2dense.common.files import atomic_write, whole_file
from moe2dense.common.http import RequestFailed, with_retries
from moe2dense.errors import UserError, first_line

TRIES = 4  # of one request to a store
_VERSION = ".version"  # beside a copy: what told the remote file's version when it was copied
WAIT = 2.0  # seconds before the second try, and twice as long before each further one

T = TypeVar("T")


def is_url(place: str | Path) -> bool:
    """Return whether a place is a URL such as s3://bucket/text or https://host/train.jsonl."""
    return isinstance(place, str) and "://" in place


@contextlib.contextmanager
def _store_errors(what: str) -> Iterator[None]:
    """Turn whatever a file system raises into one UserError. what: the option and the URL, such as `--mirror s3://bucket/run`."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f"{what}: a package is missing ({first_line(error)}); install it, or use another URL"
        ) from error
    except Exception as error:  # each file system has its own
        reason = first_line(error)
        reason = reason if reason == type(error).__name__ else f"{type(error).__name__}: {reason}"
        raise UserError(
            f"{what} cannot be used ({reason}); check the URL, your credentials and your access to it"
        ) from error


def local_copy(files: fsspec.AbstractFileSystem, name: str, folder: Path) -> Path:
    """Return the copy of one remote file in `folder`, made where it is not there as the store has it."""
    copy = folder / PurePosixPath(name).name
    version, note = str(files.ukey(name)), folder / f"{copy.name}{_VERSION}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{copy.name}.lock"):
        if not (copy.is_file() and note.is_file() and note.read_text() == version):
            with whole_file(copy) as temporary:
                files.get_file(name, str(temporary))
            atomic_write(note, version)
    return copy


class ObjectStore:
    """The files below one URL. Names are relative, with `/`; every method raises UserError after the last try."""

    def __init__(self, url: str, option: str):
        """Open a URL. option: the flag that named it, for errors. Raises UserError for a protocol that cannot be used."""
        self.url, self.what = url, f"{option} {url}"
        if not is_url(url):
            raise UserError(f"{self.what} is no URL; give one such as s3://bucket/run or file:///disk/run")
        with _store_errors(self.what):
            self._files, root = fsspec.core.url_to_fs(url)
        self._root = root.rstrip("/")

    def local_path(self) -> Path | None:
        """Return the folder on this machine that the URL names, or None."""
        return Path(self._root) if isinstance(self._files, LocalFileSystem) else None

    def probe(self) -> None:
        """Write and remove a small file, at once and without retries. Raises UserError where that is not possible."""
        name = f"probe-{uuid.uuid4().hex}"
        with _store_errors(self.what):
            self._write(name, b"probe")
            self._files.rm_file(self._path(name))

    def put(self, local: Path, name: str) -> None:
        """Copy a local file there, and compare the sizes. A name that is there already is replaced."""

        def copy() -> None:
            self._make_parent(name)
            self._files.put_file(str(local), self._path(name))
            self._files.invalidate_cache()
            if (size := self._files.size(self._path(name))) != local.stat().st_size:
                raise OSError(f"{size} of {local.stat().st_size} bytes of {name} arrived")

        self._try(copy)

    def put_whole(self, local: Path, name: str) -> None:
        """Copy a local file there; no reader sees a part of it under its name."""
        self._whole(name, lambda place: self.put(local, place))

    def write(self, name: str, data: bytes) -> None:
        """Write a small file in one request."""
        self._try(lambda: self._write(name, data))

    def write_whole(self, name: str, data: bytes) -> None:
        """Write a file from memory; no reader sees a part of it under its name, and of one that is replaced the old or the new."""
        self._whole(name, lambda place: self.write(place, data))

    def _whole(self, name: str, write: Callable[[str], None]) -> None:
        """Have a file written. Object stores show it once all is there; other file systems rename it then."""
        if self._files.async_impl:
            write(name)
            return
        folder, _, file = name.rpartition("/")
        partial = f"{folder}/.{file}.partial" if folder else f".{file}.partial"
        write(partial)
        self._try(lambda: self._files.mv(self._path(partial), self._path(name)))

    def get(self, name: str, local: Path) -> None:
        """Copy a file from there. A file that is not there is tried once."""
        local.parent.mkdir(parents=True, exist_ok=True)
        self._try(lambda: self._files.get_file(self._path(name), str(local)))

    def copy_of(self, name: str, folder: Path) -> Path:
        """Return the local copy of a file, in `folder`: made where there is none, or the store says that the file has changed."""
        return self._try(lambda: local_copy(self._files, self._path(name), folder))

    def read(self, name: str) -> bytes:
        """Return the content of a small file."""
        return self._try(lambda: self._files.cat_file(self._path(name)))

    def read_part(self, name: str, start: int, stop: int) -> bytes:
        """Return the bytes [start, stop) of a file."""

        def part() -> bytes:
            data: bytes = self._files.cat_file(self._path(name), start=start, end=stop)
            if len(data) != stop - start:
                raise OSError(f"{len(data)} of the bytes {start} to {stop} of {name} arrived")
            return data

        return self._try(part)

    def size(self, name: str) -> int | None:
        """Return the bytes of a file as the store has it now, None where there is none."""

        def size() -> int | None:
            self._files.invalidate_cache()
            try:
                return int(self._files.size(self._path(name)))
            except FileNotFoundError:
                return None

        return self._try(size)

    def names(self, folder: str = "") -> list[str]:
        """Return the names of the files that lie directly in a folder; [] where there is no such folder."""
        path = self._path(folder) if folder else self._root

        def listed() -> list[str]:
            self._files.invalidate_cache()
            try:
                entries = self._files.ls(path, detail=True)
            except FileNotFoundError:
                return []
            names = [PurePosixPath(entry["name"]).name for entry in entries if entry["type"] == "file"]
            return sorted(f"{folder}/{name}" if folder else name for name in names)

        return self._try(listed)

    def remove(self, name: str) -> None:
        """Remove a file; one that is gone already is no error."""

        def remove() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._files.rm_file(self._path(name))

        self._try(remove)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _write(self, name: str, data: bytes) -> None:
        self._make_parent(name)
        self._files.pipe_file(self._path(name), data)

    def _make_parent(self, name: str) -> None:
        """Make the folder of a file where the store has folders. Object stores have none: s3fs would make a missing bucket."""
        if not self._files.async_impl:
            self._files.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)

    def _try(self, work: Callable[[], T]) -> T:
        """Return work(), tried again after whatever may be a fault of the network. Raises UserError."""

        def ask() -> T:
            try:
                return work()
            except (FileNotFoundError, PermissionError, ImportError, UserError):
                raise  # waiting would not help
            except Exception as error:  # each file system has its own
                raise RequestFailed(f"{type(error).__name__}: {first_line(error)}") from error

        with _store_errors(self.what):
            try:
                return with_retries(ask, TRIES, WAIT)
            except RequestFailed as error:
                raise UserError(
                    f"{self.what} cannot be used after {TRIES} tries ({first_line(error)}); check your access to it"
                ) from error
