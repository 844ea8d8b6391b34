"""Training checkpoints: whole or absent, in safetensors and JSON, so nothing is unpickled.

A checkpoint is a folder `step-000050` with weights.safetensors (what trains), optimizer.safetensors and state.json. It
is written under another name, synced and renamed. What trains on a GPU is copied first and written by a thread, while training
goes on. Of a sharded training each process writes its own part, always behind the training: weights/ and optimizer/ are folders
then (weights/sharded.py).
"""

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from moe2dense.common.files import place_errors, put_folder, whole_folder
from moe2dense.common.processes import writers_group
from moe2dense.distillation.fsdp import full_tensor, shard_like
from moe2dense.errors import UserError
from moe2dense.optimizers.tensorwise import TensorwiseOptimizer
from moe2dense.weights.sharded import load_into, load_sharded, save_sharded, sharded_sizes, wait_for_saves

_NAME = re.compile(r"^step-(\d+)$")


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: dict[Tensor, str], keep: bool = True
) -> dict[str, Tensor]:
    """Return the optimiser's state as `parameter/field` tensors, see `on_cpu`."""
    return on_cpu(optimizer_fields(optimizer, names), keep)


def optimizer_fields(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> dict[str, Tensor]:
    """Return the optimiser's state as `parameter/field` tensors where they are, spread or not."""
    return {
        f"{names[parameter]}/{key}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def on_cpu(tensors: dict[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Return tensors as they are on the CPU, gathered one after the other where they are spread over processes.

    keep: False for a process that only helps to gather: it gets none, and holds one whole tensor at a time.
    """
    values = {}
    for name, value in tensors.items():
        if keep or isinstance(value, DTensor):
            whole = full_tensor(value.detach())
            if keep:
                values[name] = whole.cpu()
    return values


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


def _number(name: str, value: Tensor) -> Tensor:
    """Return an optimiser's count of steps without the dimension that it was written with."""
    return value.reshape(()) if name.endswith("/step") else value


def _own_shards(folder: Path, names: dict[Tensor, str]) -> dict[str, Tensor]:
    """Fill the parameters `names` from the folder of a sharded checkpoint and return the optimiser's state, see `load_shards`."""
    parameters = {name: p.detach() for p, name in names.items()}
    load_into(dict(parameters), folder / "weights")
    state: dict[str, Tensor] = {}
    for key, (size, dtype) in sharded_sizes(folder / "optimizer").items():
        like = parameters.get(key.rpartition("/")[0])
        spread = like is not None and size == like.shape
        state[key] = torch.zeros_like(like, dtype=dtype) if spread else torch.zeros(size, dtype=dtype)  # type: ignore[arg-type]
    load_into(state, folder / "optimizer")
    return {key: _number(key, value) for key, value in state.items()}


def written_behind(device: torch.device) -> bool:
    """Return whether checkpoints are written while training goes on: from a GPU, whose tensors are copied to be written anyway."""
    return device.type != "cpu"


class Checkpoints:
    """The checkpoints of one run in a folder; keeps the last and the best.

    after_save: what a thread does, while training goes on, with each checkpoint that has been written, such as a copy of it
    elsewhere. Nothing is written or removed here until it returns.
    """

    def __init__(self, folder: str | Path, after_save: Callable[[], None] | None = None):
        self.folder, self._after_save = Path(folder), after_save
        self._writer: Future[None] | None = None
        self._groups: dict[str, dist.ProcessGroup] = {}  # in which processes talk while they write a folder of shards

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

    def save_shards(
        self,
        step: int,
        parts: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        best: int | None,
        first: bool,
        wait: Callable[[], None],
    ) -> None:
        """Begin to write a checkpoint of which each process has a part; all call it. A thread writes copies of the tensors.

        Once every process has written its part, the first one renames the folder and removes all checkpoints but it and that of step
        `best`. A run that is killed before leaves a hidden folder, which the next save removes.
        parts: tensors by name, for each folder of the checkpoint. wait: returns once every process has come there. Raises UserError
        where the checkpoint before this one could not be written.
        """
        self.wait()
        place = self.folder / f".{self.path(step).name}.partial-0-shards"
        if first:
            with place_errors(self.folder):
                for leftover in self.folder.glob(".step-*.partial-0-shards"):
                    shutil.rmtree(leftover, ignore_errors=True)
                place.mkdir(parents=True)
        wait()
        if not self._groups:
            self._groups = {name: writers_group() for name in sorted(parts)}  # in the same order on every process
        saves = [save_sharded(tensors, place / name, self._groups[name]) for name, tensors in parts.items()]

        def finish() -> None:
            with place_errors(self.folder):
                wait_for_saves(saves)
                if first:
                    (place / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
                    put_folder(place, self.path(step))
                    self.keep(step, best)
            if first:
                self._saved()

        self._write_behind(finish)

    def is_sharded(self, step: int) -> bool:
        """Return whether a checkpoint was written in parts."""
        return (self.path(step) / "weights").is_dir()

    def save_last(
        self,
        step: int,
        weights: dict[str, Tensor],
        optimizer: dict[str, Tensor],
        state: dict[str, Any],
        best: int | None,
        behind: bool,
    ) -> None:
        """Write a checkpoint as `save` does, and then remove all but it and that of step `best`.

        behind: in a thread; tensors must not change meanwhile. Raises UserError where it, or the one before it, could not be written.
        """
        self.wait()

        def write() -> None:
            self.save(step, weights, optimizer, state)
            self.keep(step, best)

        if not behind:
            write()
            if self._after_save is not None:
                self._write_behind(self._after_save)
            return

        def write_behind() -> None:
            write()
            self._saved()

        self._write_behind(write_behind)

    def _saved(self) -> None:
        """Do what is to be done with a checkpoint that has been written."""
        if self._after_save is not None:
            self._after_save()

    def _write_behind(self, write: Callable[[], None]) -> None:
        """Let a thread write, for which `wait` waits."""
        pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writer = pool.submit(write)
        pool.shutdown(wait=False)

    def wait(self) -> None:
        """Return once what is being written is written, and `after_save` done. Raises UserError where it could not be."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.result()

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
        """Read the plain values of a checkpoint. Raises UserError where they cannot be read."""
        with self._read_errors(step):
            return json.loads((self.path(step) / "state.json").read_text())

    def load(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        """Read weights, optimizer and state, all whole. Raises UserError naming the file that cannot be read."""
        folder = self.path(step)
        with self._read_errors(step):
            if self.is_sharded(step):
                weights = load_sharded(folder / "weights")
                optimizer = {n: _number(n, v) for n, v in load_sharded(folder / "optimizer").items()}
            else:
                weights = load_file(folder / "weights.safetensors")
                optimizer = load_file(folder / "optimizer.safetensors")
        return weights, optimizer, self.state(step)

    def load_shards(self, step: int, names: dict[Tensor, str]) -> dict[str, Tensor]:
        """Fill the parameters `names` with this process's part of a sharded checkpoint; return its part of the optimiser's state.

        Every process calls it. Raises UserError where the checkpoint cannot be read.
        """
        with self._read_errors(step):
            return _own_shards(self.path(step), names)

    @contextlib.contextmanager
    def _read_errors(self, step: int) -> Iterator[None]:
        """Turn whatever reading a checkpoint raises into one UserError."""
        try:
            yield
        except Exception as error:
            raise UserError(
                f"checkpoint {self.path(step)} cannot be read ({error}); remove that folder to go on from an earlier one"
            ) from error
