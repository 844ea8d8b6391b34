"""A folder mirrored on an object store: a manifest names every file with its size and hash, and a reader believes only the manifest.

Layout below the URL: `objects/HASH-SIZE`, a file's content under a name that follows from it, and `manifest-REVISION-HASH.json`,
whose name holds the hash of its own bytes. Nothing that a manifest names is ever overwritten. A new manifest is written after all its
objects, and only then are the old manifest and what it alone named removed. A copy that is cut in the middle, in the manifest itself
included, leaves the manifest before it valid and whole; stores need no atomic replacement for that.
"""

import fnmatch
import json
import re
import uuid
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from moe2dense.common.files import atomic_write, content_errors, read_json_object, whole_folder
from moe2dense.common.object_store import ObjectStore
from moe2dense.errors import UserError

RECORD = ".mirror.json"  # in the local folder: which run and revision of a mirror it is
_MANIFEST = re.compile(r"^manifest-(\d{8})-([0-9a-f]{32})\.json$")
_OBJECTS = "objects"
_CHUNK = 1 << 22
_SMALL = 1 << 24  # bytes of a file that is read once and stored as it was then, although it is written to meanwhile
_TRIES = 3  # to copy a larger file that changes meanwhile


@dataclass(frozen=True)
class MirroredFile:
    """Content of one file: bytes and XXH3-128 hash, 32 hex digits."""

    size: int
    digest: str

    @property
    def object(self) -> str:
        """The name of the object that holds it."""
        return f"{_OBJECTS}/{self.digest}-{self.size}"


@dataclass(frozen=True)
class Manifest:
    """What a mirror holds. run: 32 hex digits, of one run wherever it goes on; revision: counts its manifests; files by relative name."""

    run: str
    revision: int
    files: dict[str, MirroredFile]

    def to_bytes(self) -> bytes:
        """Return the manifest as it is stored."""
        files = {name: {"size": f.size, "xxh3_128": f.digest} for name, f in sorted(self.files.items())}
        return json.dumps({"run": self.run, "revision": self.revision, "files": files}, indent=1).encode()

    @property
    def name(self) -> str:
        """The name it is stored under."""
        return f"manifest-{self.revision:08d}-{xxhash.xxh3_128_hexdigest(self.to_bytes())}.json"


def file_digest(path: Path) -> MirroredFile:
    """Return size and hash of a file, read in pieces."""
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
            size += len(piece)
    return MirroredFile(size, digest.hexdigest())


def newest_manifest(store: ObjectStore) -> Manifest | None:
    """Return the newest whole manifest of a mirror, None where it has none. Raises UserError where none of several is whole."""
    found = sorted((name for name in store.names() if _MANIFEST.match(name)), reverse=True)
    for name in found:
        data = store.read(name)
        match = _MANIFEST.match(name)
        if match and xxhash.xxh3_128_hexdigest(data) == match[2]:
            return _parsed(data, f"{store.url}/{name}")
    if found:
        raise UserError(f"{store.what}: {found[0]} is damaged and there is no older one; remove the mirror")
    return None


def _parsed(data: bytes, where: str) -> Manifest:
    """Return a manifest from its bytes. Raises UserError for content or names of files that no mirror writes."""
    with content_errors(where, "remove the mirror"):
        value = json.loads(data)
        files = {name: MirroredFile(int(f["size"]), str(f["xxh3_128"])) for name, f in value["files"].items()}
        for name, file in files.items():
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or not re.fullmatch("[0-9a-f]{32}", file.digest):
                raise ValueError(f"it names {name!r}")
        return Manifest(str(value["run"]), int(value["revision"]), files)


def _version(path: Path) -> tuple[int, int]:
    """Return (bytes, time of the last change in ns) of a file."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def local_record(folder: Path) -> tuple[str, int] | None:
    """Return (run, revision) of the mirror that a local folder is as new as, None where it was never mirrored. Raises UserError."""
    file = folder / RECORD
    if not file.is_file():
        return None
    remedy = "remove it to mirror the folder anew, to another URL"
    value: dict[str, Any] = read_json_object(file, remedy)
    with content_errors(file, remedy):
        return str(value["run"]), int(value["revision"])


def _write_record(folder: Path, manifest: Manifest) -> None:
    atomic_write(folder / RECORD, json.dumps({"run": manifest.run, "revision": manifest.revision}))


def fetch_mirror(store: ObjectStore, manifest: Manifest, folder: Path) -> None:
    """Copy what a manifest names into `folder`, replacing it as a whole once every file is there and checked.

    Raises UserError naming the first file whose object is missing or is not what the manifest says; `folder` is then as before.
    """
    with whole_folder(folder, overwrite=True) as partial:
        for name, file in manifest.files.items():
            store.get(file.object, partial / name)
            if file_digest(partial / name) != file:
                raise UserError(
                    f"{store.what}: {file.object}, which holds {name}, is damaged; restore that object, or begin the run again"
                )
        _write_record(partial, manifest)


class Mirror:
    """The writing side: keeps a mirror like a local folder. Hidden files (locks, files half-written) stay out."""

    def __init__(self, store: ObjectStore, folder: Path, leave_out: str = ""):
        """Take up the mirror at `store` for a folder. Raises UserError where it holds another run, or a newer state of this one.

        leave_out: pattern of the names of folders, at any depth, that stay out too.
        """
        self.store, self.folder, self._leave_out = store, folder, leave_out
        self._digests: dict[str, tuple[tuple[int, int], MirroredFile]] = {}  # by name: (size, time), content
        self._attempted: set[str] = (
            set()
        )  # manifests that were begun to be written; a request that failed may have arrived
        record = local_record(folder)
        self._run, self._revision = record or (uuid.uuid4().hex, 0)
        newest = self._checked(newest_manifest(store))
        self._stored = {file.object for file in newest.files.values()} if newest else set()

    def _checked(self, newest: Manifest | None) -> Manifest | None:
        """Return the mirror's manifest. Raises UserError where it is not what this folder was mirrored as."""
        if newest is not None and newest.run != self._run:
            raise UserError(f"{self.store.what} holds another run than {self.folder}; choose another URL")
        if newest is not None and newest.revision > self._revision and newest.name not in self._attempted:
            raise UserError(
                f"{self.store.what} is newer than {self.folder}: the run went on elsewhere; stop one of the two"
            )
        return newest

    def update(self) -> None:
        """Make the mirror like the folder now. Raises UserError where it cannot be; the manifest before then still holds.

        What is written to meanwhile is stored as it was at one moment, and what is removed meanwhile is left out. Files that mean
        something only together must rest.
        """
        newest = self._checked(newest_manifest(self.store))
        files = {name: file for name in self._names() if (file := self._copied(name)) is not None}
        if newest is not None and newest.files == files and newest.revision == self._revision:
            return
        revision = max(self._revision, newest.revision if newest else 0) + 1
        manifest = Manifest(self._run, revision, files)
        self._attempted.add(manifest.name)
        self.store.write(manifest.name, manifest.to_bytes())
        self._revision = manifest.revision
        _write_record(self.folder, manifest)
        self._remove_old(manifest)

    def _names(self) -> list[str]:
        """Return the relative names of the folder's files."""
        paths = [path for path in sorted(self.folder.rglob("*")) if path.is_file()]
        relative = [path.relative_to(self.folder) for path in paths]
        return [name.as_posix() for name in relative if not self._stays_out(name)]

    def _stays_out(self, name: Path) -> bool:
        """Return whether a file is not copied."""
        hidden = any(part.startswith(".") for part in name.parts)
        return hidden or any(fnmatch.fnmatch(part, self._leave_out) for part in name.parts[:-1])

    def _copied(self, name: str) -> MirroredFile | None:
        """Return what a file holds, once that is in the store; only what changed since the last time is read. None if it is gone."""
        path = self.folder / name
        for _ in range(_TRIES):
            try:
                version = _version(path)
                file = self._copied_as_it_is(path, name, version)
                if version[0] <= _SMALL or version == _version(path):
                    self._digests[name] = version, file
                    self._stored.add(file.object)
                    return file
            except (FileNotFoundError, UserError):
                if path.exists():
                    raise
                return None
        raise UserError(f"{path} changes while it is copied to {self.store.what}")

    def _copied_as_it_is(self, path: Path, name: str, version: tuple[int, int]) -> MirroredFile:
        """Return the content of a file of this version, and see that the store has it."""
        known = self._digests.get(name)
        if known is not None and known[0] == version and known[1].object in self._stored:
            return known[1]
        if version[0] <= _SMALL:
            data = path.read_bytes()
            file = MirroredFile(len(data), xxhash.xxh3_128_hexdigest(data))
            if file.object not in self._stored:
                self.store.write(file.object, data)
            return file
        file = file_digest(path)
        if file.object not in self._stored:
            self.store.put(path, file.object)
        return file

    def _remove_old(self, manifest: Manifest) -> None:
        """Remove manifests before this one first, then objects that it does not name: what a manifest names is there."""
        for name in self.store.names():
            if _MANIFEST.match(name) and name != manifest.name:
                self.store.remove(name)
        named = {file.object for file in manifest.files.values()}
        self._stored &= named
        for name in self.store.names(_OBJECTS):
            if name not in named:
                self.store.remove(name)


def same_place(store: ObjectStore, folder: Path) -> bool:
    """Return whether a mirror and a folder lie one inside the other, so that a copy would copy itself."""
    place = store.local_path()
    if place is None:
        return False
    mirror, local = place.resolve(), folder.resolve()
    return mirror == local or mirror in local.parents or local in mirror.parents
