"""Where the files of a store of targets are written: to a folder, or below a URL. In both a file is whole or absent."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any, Protocol

import xxhash
from filelock import FileLock

from moe2dense.common.files import atomic_write, content_errors, read_json_object
from moe2dense.common.object_store import ObjectStore, is_url
from moe2dense.data.remote import cache_folder
from moe2dense.errors import UserError

REMEDY = "write the targets again"


class Place(Protocol):
    """The files of one store, by relative name with `/`."""

    @property
    def name(self) -> str:
        """How the user named it."""
        ...

    def begin(self) -> None:
        """Get ready to write. Raises UserError where that cannot be."""
        ...

    def names(self) -> list[str]:
        """Return the names of what lies directly there."""
        ...

    def has(self, name: str) -> bool:
        """Return whether a file is there."""
        ...

    def read_object(self, name: str) -> dict[str, Any]:
        """Return the object in a JSON file. Raises UserError."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Write a file, or replace it, as a whole. Raises UserError."""
        ...

    def lock(self) -> contextlib.AbstractContextManager[object]:
        """Keep the other processes of this machine from writing within the context."""
        ...

    def stored_bytes(self, names: list[str]) -> int:
        """Return the bytes of some files."""
        ...


class FolderPlace:
    """A store in a folder."""

    def __init__(self, folder: str | Path):
        self.folder, self.name = Path(folder), str(folder)

    def begin(self) -> None:
        """Make the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def read_object(self, name: str) -> dict[str, Any]:
        return read_json_object(self.folder / name, REMEDY)

    def write(self, name: str, data: bytes) -> None:
        atomic_write(self.folder / name, data)

    def lock(self) -> contextlib.AbstractContextManager[object]:
        return FileLock(self.folder / ".lock")

    def stored_bytes(self, names: list[str]) -> int:
        return sum((self.folder / name).stat().st_size for name in names)


class RemotePlace:
    """A store below a URL. Nothing of it lies on this machine, but a lock."""

    def __init__(self, url: str, option: str = "targets"):
        self.store, self.name = ObjectStore(url.rstrip("/"), option), url.rstrip("/")

    def begin(self) -> None:
        """Write and remove a small file. Raises UserError also for processes on several machines, which share no lock."""
        if int(os.environ.get("WORLD_SIZE", 1)) > int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 0:
            raise UserError(
                f"{self.store.what}: processes on several machines cannot write one store to a URL; write to a disk that they share, "
                "or start them on one machine"
            )
        self.store.probe()

    def names(self) -> list[str]:
        return self.store.names()

    def has(self, name: str) -> bool:
        return self.store.size(name) is not None

    def read_object(self, name: str) -> dict[str, Any]:
        with content_errors(f"{self.name}/{name}", REMEDY):
            value = json.loads(self.store.read(name))
            if not isinstance(value, dict):
                raise TypeError(f"it holds {type(value).__name__}, not an object")
            return value

    def write(self, name: str, data: bytes) -> None:
        self.store.write_whole(name, data)

    def lock(self) -> contextlib.AbstractContextManager[object]:
        folder = cache_folder() / "targets"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{xxhash.xxh3_128_hexdigest(self.name.encode())}.lock")

    def stored_bytes(self, names: list[str]) -> int:
        return sum(self.store.size(name) or 0 for name in names)


def place_of(folder: str | Path) -> Place:
    """Return the place that a path or a URL names. Raises UserError for a URL that cannot be used."""
    return RemotePlace(str(folder)) if is_url(folder) else FolderPlace(folder)
