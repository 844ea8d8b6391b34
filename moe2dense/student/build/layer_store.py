"""Finished layers of a build on disk, so that an interrupted one continues where it stopped."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from moe2dense.common.files import whole_file
from moe2dense.config.schema import BuildConfig
from moe2dense.errors import UserError
from moe2dense.modeling import internals
from moe2dense.student.target.resolve import Target
from moe2dense.student.types import LayerProvenance
from moe2dense.teacher.layers import assign

if TYPE_CHECKING:
    from moe2dense.data.blocks import Blocks

_FATE = "provenance."


class LayerStore:
    """Folder of built layers, `layer-0003.safetensors` each, tied to what they were built from: another build's are refused."""

    def __init__(self, folder: str | Path, data: "Blocks", init: str, config: BuildConfig, seed: int, target: Target):
        self.folder = Path(folder)
        text = json.dumps([data.keys(), init, dataclasses.asdict(config), seed, target.config.to_dict()], default=str)
        self.key = xxhash.xxh3_128_hexdigest(text.encode())
        self._make()

    def _make(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be made: {error.strerror}; choose another --out") from error

    def sweep(self, number: int) -> "LayerStore":
        """Where the layers of a further sweep are kept: a folder in this sweep's."""
        other = copy.copy(self)
        other.folder = self.folder / f"sweep-{number}"
        other._make()
        return other

    def path(self, index: int) -> Path:
        """The file of one layer."""
        return self.folder / f"layer-{index:04d}.safetensors"

    def write(self, index: int, layer: nn.Module, provenance: LayerProvenance | None, record: dict[str, Any]) -> None:
        """Keep a finished layer; the file appears whole or not at all."""
        tensors = {n: p.detach().contiguous() for n, p in internals.saved_tensors(layer).items()}
        if provenance is not None:
            tensors |= {
                _FATE + f.name: getattr(provenance, f.name).contiguous() for f in dataclasses.fields(provenance)
            }
        with whole_file(self.path(index)) as temporary:
            save_file(tensors, temporary, metadata={"key": self.key, "record": json.dumps(record)})

    def read(self, index: int, layer: nn.Module) -> tuple[LayerProvenance | None, dict[str, Any]] | None:
        """Fill `layer` from its file and return its provenance and record; None when it is not built yet.

        Raises UserError when the file is of a build with other data, settings or target.
        """
        if not self.path(index).exists():
            return None
        with safe_open(str(self.path(index)), "pt") as file:
            about = file.metadata() or {}
            if about.get("key") != self.key:
                raise UserError(
                    f"{self.path(index)} was built from other data or settings; give the same ones or choose another --out"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        provenance = {n.removeprefix(_FATE): t for n, t in tensors.items() if n.startswith(_FATE)}
        for name, value in tensors.items():
            if not name.startswith(_FATE):
                assign(layer, name, value.to(torch.float32))
        return (LayerProvenance(**provenance) if provenance else None), json.loads(about["record"])
