"""The rows of a captured set on disk: token ids, and of each position the packed log-probabilities and ids of its likeliest next tokens.

Parquet files, or a folder that `datasets` saved. Rows are memory-mapped by way of datasets' own cache.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, load_dataset, load_from_disk
from torch import Tensor

from moe2dense.common.files import content_errors
from moe2dense.common.object_store import is_url
from moe2dense.distillation.targets.captured.bits import id_bits, unpack, unpack_words
from moe2dense.distillation.targets.captured.log_probs import older_values, unpack_log_p
from moe2dense.distillation.targets.captured.settings import SETTINGS_FILE, OlderPacking, Packing, read_packing
from moe2dense.errors import UserError

_NEWER = ("compressed_logprobs", "bytepacked_indices")
_OLDER = ("packed_indices", "exact_values", "coeffs")
_IDS, _MASK = "input_ids", "attention_mask"
_REMEDY = "get the set again, or leave that file out"
_OFTEN = ("*.yaml", "*.yml")


def is_captured(folder: str | Path) -> bool:
    """Return whether a folder, or a parquet file, is a captured set: its columns say so. At a URL only our own stores are read."""
    if is_url(folder):
        return False
    path = Path(folder)
    if (path / "store.json").exists():
        return False
    try:
        return bool(_kind_of(_columns(path)))
    except (OSError, pa.ArrowException, ValueError):
        return False


def _files(path: Path) -> list[Path]:
    """Return the parquet files of a set: in its folder, or in `data/` as on the hub."""
    return [path] if path.is_file() else sorted((*path.glob("*.parquet"), *path.glob("data/*.parquet")))


def _columns(path: Path) -> set[str]:
    """Return the names of a set's columns; none for what is no set. Raises OSError or ArrowException for a damaged one."""
    if path.is_dir() and (path / "state.json").exists():
        return set(load_from_disk(str(path)).column_names)
    files = [f for f in _files(path) if f.suffix == ".parquet"]
    return set(pq.read_schema(files[0]).names) if files else set()


def _kind_of(columns: set[str]) -> str:
    """Return "newer" or "older", the way that a set with these columns is packed; "" for neither."""
    if columns >= {_IDS, *_NEWER}:
        return "newer"
    return "older" if columns >= {_IDS, *_OLDER} else ""


@dataclass(frozen=True)
class CapturedRow:
    """One row: ids [n] int64, mask [n] int64 (0 for padding, else the number of the document) or None."""

    ids: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class CapturedRows:
    """The rows of a set and how they are packed."""

    folder: Path
    data: Dataset
    packing: Packing | OlderPacking

    def __len__(self) -> int:
        return len(self.data)

    def row(self, number: int) -> CapturedRow:
        """Return the tokens of a row that have log-probabilities: without the last, where the capture has none of it."""
        with content_errors(self.folder, _REMEDY):
            table = self._table(number)
            lengths = [len(table[name][0]) for name in table.column_names if name in (*_NEWER, *_OLDER)]
            ids = _numbers(table, _IDS)[: min(lengths)].astype(np.int64)
            if len(ids) < min(lengths):
                raise ValueError(f"row {number} has {len(ids)} tokens and log-probabilities of {min(lengths)}")
            mask = _numbers(table, _MASK)[: len(ids)].astype(np.int64) if _MASK in table.column_names else None
            return CapturedRow(torch.from_numpy(ids), None if mask is None else torch.from_numpy(mask))

    def likeliest(self, number: int, positions: int) -> tuple[Tensor, Tensor]:
        """Return (ids [n, k] int64, values [n, k] float32) of the first `positions` of a row. Raises UserError for a damaged one."""
        packing = self.packing
        with content_errors(self.folder, _REMEDY):
            table = self._table(number)
            if isinstance(packing, Packing):
                values = unpack_log_p(_matrix(table, _NEWER[0], positions, np.uint8), packing)
                ids = unpack(_matrix(table, _NEWER[1], positions, np.uint8), id_bits(packing.d), packing.k)
            else:
                exact, coefficients = (_matrix(table, name, positions, np.float32) for name in _OLDER[1:])
                values = older_values(torch.from_numpy(exact), torch.from_numpy(coefficients), packing)
                ids = unpack_words(_matrix(table, _OLDER[0], positions, np.int64), id_bits(packing.d), packing.k)
            if ids.size and int(ids.max()) >= packing.d:
                raise ValueError(f"row {number} names token {int(ids.max())} of a vocabulary of {packing.d}")
            return torch.from_numpy(ids), values

    def _table(self, number: int) -> pa.Table:
        return self.data.with_format("arrow")[number : number + 1]


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    """Return the list [n] in the only row of a table."""
    return table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)


def _matrix(table: pa.Table, name: str, positions: int, dtype: type) -> np.ndarray:
    """Return the first rows [positions, m] of the nested list in the only row of a table. Raises ValueError where it is ragged."""
    outer = table[name].combine_chunks().flatten()
    count = len(outer)
    flat = outer.flatten().to_numpy(zero_copy_only=False)
    if count < positions or (count and len(flat) % count):
        raise ValueError(f"{name} holds {len(flat)} numbers in {count} positions")
    return flat.astype(dtype).reshape(count, -1)[:positions]


def open_rows(folder: str | Path, settings: str | Path = "", tokens: int | None = None) -> CapturedRows:
    """Open a captured set: its rows, and how they are packed.

    settings: a file that says how, by default the one beside the set. tokens: how much of it will be read; later files are left
    alone. Raises UserError for what is no captured set, and where nothing says how it is packed.
    """
    path = Path(folder)
    if not is_captured(path):
        raise UserError(
            f"{path} is no captured set: its columns are not DistillKit's ({_IDS} with {' and '.join(_NEWER)})"
        )
    kind = _kind_of(_columns(path))
    packing = read_packing(settings or _beside(path))
    if isinstance(packing, Packing) != (kind == "newer"):
        raise UserError(f"{settings or _beside(path)} is not of {path}: that is packed in the {kind} way")
    with content_errors(path, _REMEDY):
        if path.is_dir() and (path / "state.json").exists():
            data = load_from_disk(str(path))
        else:
            names = [str(f) for f in _first_files(_files(path), tokens)]
            data = load_dataset("parquet", data_files=names, split="train")
        if not isinstance(data, Dataset):
            raise ValueError("it holds several splits; name the folder of one")
    return CapturedRows(path, data, packing)


def _beside(path: Path) -> Path:
    """Return the file beside a set that says how it is packed. Raises UserError where there is none."""
    folder = path if path.is_dir() else path.parent
    for place in (folder, folder.parent):
        if (place / SETTINGS_FILE).is_file():
            return place / SETTINGS_FILE
    raise UserError(
        f"{path} has no {SETTINGS_FILE}, and without it nobody knows how it is packed; put the settings that its page names (logprob_compressor "
        "or legacy_logit_compression of DistillKit) into a file of that name in the folder"
    )


def _first_files(files: list[Path], tokens: int | None) -> list[Path]:
    """Return as many files as hold `tokens`, by the length of the first row."""
    if tokens is None:
        return files
    chosen, there = [], 0
    for file in files:
        chosen.append(file)
        opened = pq.ParquetFile(file)
        first = next(opened.iter_batches(batch_size=1, columns=[_IDS]), None)
        there += opened.metadata.num_rows * (len(first[0][0]) if first is not None and len(first) else 0)
        if there >= 2 * tokens:  # rows differ in length
            break
    return chosen
