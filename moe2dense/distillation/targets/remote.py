"""Read a store of targets below a URL: each shard is copied here when it is first needed, as long as there is room.

What the room does not hold is read from the store block by block, each time it is needed. Training sees blocks in a random order, so
dropping one shard for another would have a whole shard copied for each block.
"""

from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock
from safetensors import safe_open

from moe2dense.common.files import free_bytes, whole_file
from moe2dense.common.object_store import ObjectStore
from moe2dense.data.remote import cache_folder
from moe2dense.errors import UserError
from moe2dense.weights.remote import RemoteTensors

_SPARE = 2**30  # bytes of the disk that are left free
_CHUNK = 2**24


def file_checksum(path: Path) -> str:
    """Return the XXH3-64 of a file, in hex, read in pieces."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


class RemoteShards:
    """The shards of a store below a URL. room: bytes that their copies may take here; None = as much as the disk has.

    Copies are named by their checksums, so that one of an earlier store at this URL is never taken for a present one. They stay for
    the next run; where they take more than `room`, the oldest are removed.
    """

    def __init__(self, url: str, room: int | None = None):
        self.url, self.room = url.rstrip("/"), room
        self.store = ObjectStore(self.url, "targets")
        self.folder = cache_folder() / "targets" / xxhash.xxh3_128_hexdigest(self.url.encode())
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock():
            copies = sorted(self._copies(), key=lambda path: path.stat().st_mtime)
            while room is not None and copies and sum(path.stat().st_size for path in copies) > room:
                copies.pop(0).unlink()

    def small_file(self, name: str) -> Path:
        """Return the local copy of a file that is no shard, copied again when it has changed."""
        return self.store.copy_of(name, (self.folder / name).parent)

    def small_folder(self, name: str) -> Path | None:
        """Return the local copy of a folder, None where there is none."""
        names = self.store.names(name)
        for file in names:
            self.small_file(file)
        return self.folder / name if names else None

    def open(self, file: str, checksum: str) -> Any:
        """Return an open shard, as `safe_open` does: of its copy here, else of the store. Raises UserError for a damaged one."""
        path = self.folder / f"shard-{checksum}.safetensors"
        with self._lock():
            if path.is_file() or self._copied(file, path, checksum):
                return safe_open(path, "pt")
        return RemoteTensors(self.store, file)

    def _copied(self, file: str, path: Path, checksum: str) -> bool:
        """Copy a shard where there is room for it, and return whether there was."""
        size = self.store.size(file)
        if size is None:
            raise UserError(f"targets {self.url}/{file} is missing; write the targets again")
        taken = sum(copy.stat().st_size for copy in self._copies())
        if free_bytes(self.folder) - size < _SPARE or (self.room is not None and taken + size > self.room):
            return False
        with whole_file(path) as temporary:
            self.store.get(file, temporary)
            if file_checksum(temporary) != checksum:
                raise UserError(
                    f"targets {self.url}/{file} are damaged (its checksum differs); write the targets again"
                )
        return True

    def _copies(self) -> list[Path]:
        return list(self.folder.glob("shard-*.safetensors"))

    def _lock(self) -> FileLock:
        return FileLock(self.folder / ".shards.lock")
