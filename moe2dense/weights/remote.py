"""Read rows of the tensors in a safetensors file on an object store, by their byte ranges, without copying the file."""

import json

import torch
from torch import Tensor

from moe2dense.common.files import content_errors
from moe2dense.common.object_store import ObjectStore
from moe2dense.weights.checkpoint import DTYPES

_DTYPES = DTYPES | {"U16": torch.uint16}  # of token ids
_MAX_HEADER = 100_000_000  # the format's own bound


class RemoteSlice:
    """One tensor of a file, of which rows are read: `[3]` or `[3:5]` along its first axis, as of safetensors' slices."""

    def __init__(self, store: ObjectStore, file: str, dtype: torch.dtype, shape: list[int], start: int):
        """start: where its bytes begin in the file."""
        self._store, self._file, self._dtype, self._shape, self._start = store, file, dtype, shape, start
        self._row = dtype.itemsize * int(torch.Size(shape[1:]).numel())

    def __getitem__(self, rows: int | slice) -> Tensor:
        """Read some rows. Raises UserError where the store does not give them."""
        if isinstance(rows, int):
            return self[rows : rows + 1][0]
        start, stop, step = rows.indices(self._shape[0])
        if step != 1:
            raise ValueError("rows are read one after the other")
        shape = (max(0, stop - start), *self._shape[1:])
        if not torch.Size(shape).numel():
            return torch.empty(shape, dtype=self._dtype)
        data = self._store.read_part(self._file, self._start + start * self._row, self._start + stop * self._row)
        return torch.frombuffer(bytearray(data), dtype=self._dtype).view(shape)


class RemoteTensors:
    """The tensors of one file."""

    def __init__(self, store: ObjectStore, file: str):
        """Read the header. Raises UserError for a file that is missing or damaged."""
        with content_errors(f"{store.url}/{file}", "write it again"):
            length = int.from_bytes(store.read_part(file, 0, 8), "little")
            if length > _MAX_HEADER:
                raise ValueError(f"its header claims {length} bytes")
            header = json.loads(store.read_part(file, 8, 8 + length))
            self._slices = {
                name: RemoteSlice(
                    store, file, _DTYPES[entry["dtype"]], entry["shape"], 8 + length + entry["data_offsets"][0]
                )
                for name, entry in header.items()
                if name != "__metadata__"
            }

    def get_slice(self, name: str) -> RemoteSlice:
        """Return a tensor of which rows are read when they are asked for."""
        return self._slices[name]
