"""Text on object stores and web servers: what a URL names is copied here once, by fsspec, and read from the copy."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import fsspec
import xxhash

from moe2dense.common.object_store import local_copy
from moe2dense.data.files import file_format, split_pattern
from moe2dense.errors import UserError, first_line


def cache_folder() -> Path:
    """Return where tokenised and copied texts lie: $MOE2DENSE_CACHE, else moe2dense/ in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("MOE2DENSE_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe2dense"


@contextlib.contextmanager
def _remote_errors(url: str) -> Iterator[None]:
    """Turn whatever a remote file system raises into one UserError about the URL."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each file system has its own
        raise UserError(
            f"data {url} cannot be read ({type(error).__name__}: {first_line(error)}); check the URL and your access to it, and "
            "install what fsspec needs for it (s3fs, gcsfs, adlfs, ...)"
        ) from error


def remote_is_file(url: str) -> bool:
    """Return whether a URL names one file. Raises UserError where that cannot be asked."""
    with _remote_errors(url):
        files, place = fsspec.core.url_to_fs(url)
        return bool(files.isfile(place))


def remote_files(url: str, split: str) -> list[Path]:
    """Return local copies of the files of a split that a URL of a folder has, or of the one file that it names.

    A file is copied again when the store says that it has changed. Raises UserError where there are none or they cannot be read.
    """
    with _remote_errors(url):
        files, place = fsspec.core.url_to_fs(url)
        if files.isfile(place):
            names = [place]
        elif files.isdir(place):
            listed = [
                n
                for folder in (place, f"{place.rstrip('/')}/data")
                if files.isdir(folder)
                for n in _listed(files, folder)
            ]
            names = [n for n in listed if split_pattern(split).match(PurePosixPath(n).name)]
            if not names:
                names_there = ", ".join(PurePosixPath(n).name for n in listed[:5]) or "no data files"
                raise UserError(
                    f"data folder {url} has no {split} file (found {names_there}); add {split}.jsonl or name a file"
                )
        else:
            raise UserError(f"data {url} does not exist")
        folder = cache_folder() / "remote" / xxhash.xxh3_128_hexdigest(url.encode())
        return [local_copy(files, name, folder) for name in sorted(names)]


def _listed(files: fsspec.AbstractFileSystem, folder: str) -> list[str]:
    """Return the data files of a remote folder."""
    names = [entry["name"] for entry in files.ls(folder, detail=True) if entry["type"] == "file"]
    return sorted(n for n in names if file_format(Path(PurePosixPath(n).name)))
