"""Training checkpoints: whole or absent, in safetensors and JSON, so nothing is unpickled.

A checkpoint is a folder `step-000050` with weights.safetensors (what trains), optimizer.safetensors and state.json. It
is written under another name, synced and renamed.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe2dense.common.files import whole_folder
from moe2dense.distillation.fsdp import full_tensor, shard_like
from moe2dense.distillation.tensorwise import TensorwiseOptimizer
from moe2dense.errors import UserError

_NAME = re.compile(r"^step-(\d+)$")


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> dict[str, Tensor]:
    """Return the optimiser's state as `parameter/field` tensors."""
    tensors = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"{names[parameter]}/{key}"] = full_tensor(torch.as_tensor(value)).cpu()
    return tensors


def restore_optimizer(optimizer: torch.optim.Optimizer, names: dict[Tensor, str], saved: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave, bit by bit."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in saved.items():
        name, _, field = key.rpartition("/")
        by_name.setdefault(name, {})[field] = value
    optimizer.state.clear()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = by_name.get(names[parameter], {})
            home = optimizer.home(parameter) if isinstance(optimizer, TensorwiseOptimizer) else parameter.device
            optimizer.state[parameter] = {
                k: v.to(home, copy=True)
                if k == "step" or isinstance(optimizer, TensorwiseOptimizer)
                else shard_like(v.to(home, copy=True), parameter)
                for k, v in state.items()
            }


class Checkpoints:
    """The checkpoints of one run in a folder; keeps the last and the best."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(m[1]) for p in self.folder.iterdir() if (m := _NAME.match(p.name)))

    def path(self, step: int) -> Path:
        """Return the folder of a checkpoint."""
        return self.folder / f"step-{step:06d}"

    def save(self, step: int, weights: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write a checkpoint whole or not at all. Raises UserError when the disk does not take it."""
        with whole_folder(self.path(step), overwrite=True) as temporary:
            save_file({k: v.detach().contiguous() for k, v in weights.items()}, temporary / "weights.safetensors")
            save_file({k: v.contiguous() for k, v in optimizer.items()}, temporary / "optimizer.safetensors")
            (temporary / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))

    def keep(self, *steps: int | None) -> None:
        """Remove all checkpoints but these."""
        for step in set(self.steps()) - set(steps):
            shutil.rmtree(self.path(step), ignore_errors=True)

    def load_weights(self, model: torch.nn.Module, step: int | None = None) -> None:
        """Put the weights of a checkpoint (default: the last) into a model: after training in shards, into a whole one."""
        weights, _, _ = self.load(self.steps()[-1] if step is None else step)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])

    def state(self, step: int) -> dict[str, Any]:
        """Read the plain values of a checkpoint."""
        return json.loads((self.path(step) / "state.json").read_text())

    def load(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        """Read weights, optimizer and state. Raises UserError naming the file that cannot be read."""
        try:
            weights = load_file(self.path(step) / "weights.safetensors")
            optimizer = load_file(self.path(step) / "optimizer.safetensors")
            return weights, optimizer, self.state(step)
        except Exception as error:
            raise UserError(
                f"checkpoint {self.path(step)} cannot be read ({error}); remove that folder to go on from an earlier one"
            ) from error
