"""Keep the finished layers of a build on disk, so that an interrupted build continues where it stopped."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from moe2dense.common.devices import CPU
from moe2dense.common.files import whole_file
from moe2dense.common.processes import from_first, world
from moe2dense.config.schema import BuildConfig
from moe2dense.errors import UserError, first_line
from moe2dense.modeling import internals
from moe2dense.student.target.resolve import Target
from moe2dense.student.types import LayerProvenance
from moe2dense.teacher.model import Teacher
from moe2dense.teacher.parameters import assign
from moe2dense.weights.fingerprint import checkpoint_fingerprint

if TYPE_CHECKING:
    from moe2dense.data.blocks import Blocks

_PROVENANCE = "provenance."  # names of these tensors in a layer's file begin with it


class LayerStore:
    """A folder of built layers, `layer-0003.safetensors` each. Layers of another build, or another teacher, are refused by their key."""

    def __init__(
        self,
        folder: str | Path,
        teacher: Teacher,
        data: "Blocks",
        init: str,
        config: BuildConfig,
        seed: int,
        target: Target,
    ):
        self.folder = Path(folder)
        source = [checkpoint_fingerprint(teacher.path), teacher.quantize]
        settings = [init, dataclasses.asdict(config), seed, target.config.to_dict()]
        text = json.dumps([source, data.keys(), *settings], default=str)
        self.key = xxhash.xxh3_128_hexdigest(text.encode())
        self._make_folder()

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be made: {error.strerror}; choose another --out") from error

    def sweep(self, number: int) -> "LayerStore":
        """Return the store of a further sweep, a folder inside this one."""
        store = copy.copy(self)
        store.folder = self.folder / f"sweep-{number}"
        store._make_folder()
        return store

    def path(self, index: int) -> Path:
        """Return the file of one layer."""
        return self.folder / f"layer-{index:04d}.safetensors"

    def write(self, index: int, layer: nn.Module, provenance: LayerProvenance | None, record: dict[str, Any]) -> None:
        """Write a finished layer, of several processes the first one; the file appears whole or not at all.

        Raises UserError when it cannot be written.
        """
        if world()[0] > 0:
            return
        tensors = {name: p.detach().cpu().contiguous() for name, p in internals.saved_tensors(layer).items()}
        if provenance is not None:
            names = [f.name for f in dataclasses.fields(provenance)]
            tensors |= {_PROVENANCE + name: getattr(provenance, name).contiguous() for name in names}
        with whole_file(self.path(index)) as temporary:
            save_file(tensors, temporary, metadata={"key": self.key, "record": json.dumps(record)})

    def read(
        self, index: int, layer: nn.Module, device: torch.device = CPU
    ) -> tuple[LayerProvenance | None, dict[str, Any]] | None:
        """Fill `layer` from its file, on `device`, and return its provenance and record; None when it is not built yet.

        Several processes read it together. Raises UserError when the file is damaged, or of a build with another teacher, data,
        settings or target.
        """
        if not from_first(self.path(index).exists):
            return None
        try:
            opened = safe_open(str(self.path(index)), "pt")
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{self.path(index)} cannot be read: {first_line(error)}; remove it to build that layer again"
            ) from error
        with opened as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != self.key:
                raise UserError(
                    f"{self.path(index)} was built from another teacher, data or settings; give the same ones or choose another --out"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        provenance = {n.removeprefix(_PROVENANCE): t for n, t in tensors.items() if n.startswith(_PROVENANCE)}
        for name, value in tensors.items():
            if not name.startswith(_PROVENANCE):
                assign(layer, name, value.to(device, torch.get_default_dtype()))
        return (LayerProvenance(**provenance) if provenance else None), json.loads(metadata["record"])
