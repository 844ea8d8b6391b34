"""Rehearse a training step at full size on fake tensors, which have shapes and no memory, and measure what it would hold.

The step is the trainer's own: the same objective, loss, optimiser and activation checkpointing. Memory is the sum of all storages
that are alive, at its highest over two steps (the second has the optimiser's states from its beginning).
"""

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from moe2dense.config.training import TrainConfig
from moe2dense.distillation.objective import Objective
from moe2dense.distillation.optimizers import make_optimizer, muon_matrices
from moe2dense.distillation.setup import prepare_model
from moe2dense.losses.teacher_rows import HiddenRows
from moe2dense.modeling.attention import unmasked
from moe2dense.modeling.empty import count_parameters, empty_model
from moe2dense.modeling.head import Head
from moe2dense.modeling.shape import Geometry
from moe2dense.optimizers.footprint import activation_bytes, standing_bytes
from moe2dense.optimizers.tensorwise import TensorwiseOptimizer

_FEW, _MORE = 2, 4  # layers of a rehearsal
_STANDARD = TrainConfig()
_MATTERS = (
    "batch", "micro_batch", "lora", "dora", "gradient_checkpointing", "weights", "optimizer", "step_in_backward", "offload",
)  # fmt: skip
_COPIES = 5  # of the states of a matched layer


@dataclass(frozen=True)
class Rehearsal:
    """Bytes that training would hold on its device. model: the weights as training keeps them; peak: the most of two steps."""

    model: int
    peak: int


_made: dict[tuple[Any, ...], Rehearsal] = {}


@dataclass
class _Phases:
    """Bytes of a model's weights, and the most that was alive in each part of the second step: passes, what they leave, the optimiser."""

    model: int = 0
    passes: int = 0
    left: int = 0
    optimizer: int = 0


class _Alive(TorchDispatchMode):
    """Adds up the storages of the tensors that exist, and keeps the highest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._see(value)
        return result

    def _see(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def rehearse(
    student: PreTrainedConfig, teacher: Geometry, config: TrainConfig, length: int, matched: int = 0, half: bool = False
) -> Rehearsal:
    """Return what training a student of this config would hold, in steps as `config` says, on blocks of `length` tokens.

    matched: layers whose hidden states are matched. half: passes compute in bfloat16 (on a GPU). The operations are those of a CPU,
    some of which keep a little more than a GPU's. Students of many layers are rehearsed with a few, and what each further one adds is
    added for the rest. Masks of attention are left out (`mask_memory.mask_bytes` counts them). A rehearsal is made once for the same sizes.
    """
    step = replace(_STANDARD, **{name: getattr(config, name) for name in _MATTERS})
    key = (student.to_json_string(use_diff=False), teacher.hidden_size, teacher.vocab_size, step, length, matched, half)
    if key not in _made:
        _made[key] = _rehearsed(student, teacher, step, length, matched, half)
    return _made[key]


def _rehearsed(
    student: PreTrainedConfig, teacher: Geometry, config: TrainConfig, length: int, matched: int, half: bool
) -> Rehearsal:
    rows, layers = min(config.micro_batch, max(1, config.batch // length)), student.num_hidden_layers
    try:
        if layers <= _MORE:
            only = _two_steps(student, teacher, config, (rows, length), matched, half)
            return Rehearsal(only.model, max(astuple(only)))
        few, more = (
            _two_steps(_with_layers(student, n), teacher, config, (rows, length), matched, half) for n in (_FEW, _MORE)
        )
    except Exception:  # an architecture may look at values, which fake tensors have not, and each fails in its own way
        return _counted(student, config, rows * length, matched)
    each = [(b - a) / (_MORE - _FEW) for a, b in zip(astuple(few), astuple(more), strict=True)]
    whole = [round(b + (layers - _MORE) * n) for b, n in zip(astuple(more), each, strict=True)]
    return Rehearsal(whole[0], max(whole))


def _with_layers(student: PreTrainedConfig, number: int) -> PreTrainedConfig:
    """Return a config with the first layers alone."""
    fields, layers = copy.deepcopy(vars(student)), student.num_hidden_layers
    cut = {name: value[:number] for name, value in fields.items() if isinstance(value, list) and len(value) == layers}
    result = copy.deepcopy(student)
    for name, value in cut.items():
        setattr(result, name, value)
    result.num_hidden_layers = number
    return result


@contextmanager
def _nothing_moves() -> Iterator[None]:
    """Let modules stay where and as they are within the context: peft moves new adapters, and fake parameters cannot be swapped."""
    apply = nn.Module._apply
    nn.Module._apply = lambda module, *_, **__: module  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = apply  # type: ignore[method-assign]


def _two_steps(
    student: PreTrainedConfig,
    teacher: Geometry,
    config: TrainConfig,
    shape: tuple[int, int],
    matched: int,
    half: bool,
) -> _Phases:
    """Make a model and two steps on blocks of `shape`; return what was alive in the second, which has what the first left."""
    phases = _Phases()
    with unmasked(), FakeTensorMode(), _Alive() as alive:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(student, dtype=getattr(torch, config.weights))
        with _nothing_moves():
            model = prepare_model(model, config)
        model.train()
        phases.model = alive.now
        objective = Objective(model)
        optimizer = make_optimizer(objective, config, muon_matrices(model, config))
        if isinstance(optimizer, TensorwiseOptimizer):
            _without_looking(optimizer, config)
        for _ in range(2):
            alive.peak = alive.now
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                _step(objective, teacher, *shape, matched)
            phases.passes, phases.left = alive.peak, alive.now
            alive.peak = alive.now
            optimizer.step()  # of what the backward pass has not stepped
            phases.optimizer = alive.peak
            optimizer.zero_grad(set_to_none=True)
    return phases


def _counted(student: PreTrainedConfig, config: TrainConfig, tokens: int, matched: int) -> Rehearsal:
    """Return an estimate for an architecture whose forward pass looks at values, which fake tensors have not (MoE wrappers)."""
    model = prepare_model(empty_model(student, getattr(torch, config.weights)), config)
    weights, parameters = sum(p.nbytes for p in model.parameters()), count_parameters(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers, hidden = student.num_hidden_layers, student.hidden_size
    width = parameters // (3 * hidden * layers)
    activations = activation_bytes(config, tokens, layers, hidden, width)
    states = matched * _COPIES * tokens * hidden * 4
    return Rehearsal(weights, standing_bytes(config, parameters, trained) + activations + states)


def _without_looking(optimizer: TensorwiseOptimizer, config: TrainConfig) -> None:
    """Put a rule without state in the place of one that looks at values, which fake tensors have not: Adafactor's state is small."""
    for group in optimizer.param_groups:
        if group["rule"] == "adafactor":
            group["rule"] = "none"
    if config.step_in_backward:
        optimizer.step_in_backward(config.clip)


def _step(objective: Objective, teacher: Geometry, rows: int, length: int, matched: int) -> None:
    """Make the forward and the backward pass of one micro-batch."""
    tokens, width = rows * length, teacher.hidden_size
    ids = torch.zeros(rows, length, dtype=torch.int64)
    head = Head(torch.empty(teacher.vocab_size, width))
    answers = HiddenRows(torch.empty(tokens, width, dtype=torch.bfloat16), head)
    # the states that are matched: the teacher's, the difference, both squared, and the gradient
    states = [torch.empty(tokens, width) for _ in range(matched * _COPIES)]
    total, *_ = objective({"input_ids": ids}, answers, denominator=float(tokens), label_denominator=float(tokens))
    total.backward()
    del states
