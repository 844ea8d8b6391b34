"""Put an exported folder on an object store: the file that makes it a model last, so that an upload that is cut never looks whole."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from moe2dense.common.files import WEIGHT_SUFFIXES, free_bytes
from moe2dense.common.object_store import ObjectStore, is_url
from moe2dense.common.units import show_bytes
from moe2dense.errors import UserError

_OPTION = "--out"
_WEIGHTS = (*WEIGHT_SUFFIXES, ".safetensors.index.json")


def _makes_it_a_model(name: str) -> bool:
    """Return whether programs take a folder for a model once this file is there."""
    return name == "config.json" or name.endswith(".gguf")


@contextlib.contextmanager
def export_folder(out: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield the folder to export to: `out` itself, or for a URL a temporary one, which is uploaded when the context ends without an error.

    A URL is tried before, by a small file that is written and removed. overwrite: replace the model that lies there, which is none
    from the first change on until all is replaced; other files stay. Raises UserError for a URL that cannot be written or holds files, and where the upload fails.
    """
    if not is_url(out):
        yield Path(out)
        return
    url = str(out).rstrip("/")
    store = ObjectStore(url, _OPTION)
    if not overwrite and (names := store.names()):
        raise UserError(f"{store.what} holds files ({names[0]}); choose another URL, or add --overwrite")
    store.probe()
    with tempfile.TemporaryDirectory(prefix="moe2dense-export-") as place:
        folder = Path(place) / (PurePosixPath(url).name or "model")
        yield folder
        _upload(folder, store)


def check_room(out: str | Path, needed: int) -> None:
    """Raise UserError where the temporary folder of an export to a URL has no room for `needed` bytes."""
    place = Path(tempfile.gettempdir())
    if is_url(out) and (free := free_bytes(place)) < needed:
        raise UserError(
            f"{_OPTION} {out} is written to {place} first, which has {show_bytes(free)} free of {show_bytes(needed)}; set TMPDIR to a larger disk"
        )


def _upload(folder: Path, store: ObjectStore) -> None:
    """Copy a folder to a store, and remove weights that lay there before and are not in the folder."""
    before = [name for name in store.names() if _makes_it_a_model(name) or name.endswith(_WEIGHTS)]
    for name in filter(_makes_it_a_model, before):
        store.remove(name)
    new = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    for name in sorted(new, key=lambda name: (_makes_it_a_model(name), name)):
        store.put_whole(new[name], name)
    for name in set(before) - set(new):
        store.remove(name)
