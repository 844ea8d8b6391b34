"""Find the data files of a split, tell their format, and open what is compressed."""

import re
import shutil
import tempfile
from pathlib import Path
from typing import IO

import pyarrow

from moe2dense.errors import UserError, first_line

FORMATS = {
    ".jsonl": "json lines", ".ndjson": "json lines", ".json": "json", ".txt": "text", ".csv": "csv", ".tsv": "csv",
    ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
SPLIT_NAMES = {"train": ("train",), "valid": ("valid", "validation", "dev", "val"), "test": ("test",), "ood": ("ood",)}
_IN_MEMORY = 2**26  # bytes of a decompressed file that are held in memory; more goes to a temporary file
_POINTER = b"version https://git-lfs"


def file_format(path: Path) -> str | None:
    """Return the format of a file by its name, whatever it is compressed with; None for another."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


def compression(path: Path) -> str | None:
    """Return gzip or zstd for a compressed file, else None."""
    return _COMPRESSED.get(path.suffix.lower())


def split_files(folder: Path, split: str) -> list[Path]:
    """Return train.jsonl, or the shards train-00000-of-00004.parquet ..., of a folder or of its `data/`.

    Raises UserError where there are none, or files of several formats.
    """
    files, present = _of_split(folder, split), _data_files(folder)
    if not files and (folder / "data").is_dir():  # a cloned dataset repository
        files, present = _of_split(folder / "data", split), present + _data_files(folder / "data")
    if not files:
        names = ", ".join(p.name for p in present[:5]) or "no data files"
        raise UserError(f"data folder {folder} has no {split} file (found {names}); add {split}.jsonl or pass a file")
    if len({file_format(p) for p in files}) > 1:
        raise UserError(
            f"data folder {folder} has {split} files of several formats: {', '.join(p.name for p in files)}"
        )
    return files


def _data_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file() and file_format(p))


def _of_split(folder: Path, split: str) -> list[Path]:
    """Return the files of a folder whose names begin with one of the split's."""
    return [p for p in _data_files(folder) if split_pattern(split).match(p.name)]


def split_pattern(split: str) -> re.Pattern[str]:
    """Return what the names of a split's files begin with."""
    return re.compile(rf"({'|'.join(SPLIT_NAMES[split])})(-|\.)")


def open_plain(path: Path) -> IO[bytes]:
    """Open a file for reading at any place, decompressed. Raises UserError where it cannot be read."""
    kind = compression(path)
    try:
        if kind is None:
            file: IO[bytes] = path.open("rb")
        else:
            file = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # type: ignore[assignment]  # noqa: SIM115
            with pyarrow.input_stream(str(path), compression=kind) as packed:
                shutil.copyfileobj(packed, file, 2**20)
            file.seek(0)
        start = file.read(len(_POINTER))
        file.seek(0)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"data {path} cannot be read as {kind or 'a file'}: {first_line(error)}") from error
    if start == _POINTER:
        raise UserError(f"data {path} is a Git LFS pointer, not the data; fetch it with `git lfs pull`")
    return file
