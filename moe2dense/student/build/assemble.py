"""Assemble the student's tensors: an empty host, what is copied from the teacher, and FFNs put into their place."""

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe2dense.common.devices import CPU
from moe2dense.errors import UserError
from moe2dense.families.cards import StudentCard
from moe2dense.modeling import internals
from moe2dense.modeling.gated_ffn import expert_layout
from moe2dense.student.ffn.dense import DenseFFN, Gating
from moe2dense.student.prune.cut import Cut
from moe2dense.student.target.dense_config import tensor_map
from moe2dense.student.target.resolve import Target
from moe2dense.teacher.parameters import assign

if TYPE_CHECKING:
    from moe2dense.teacher.model import Teacher


def empty_student(target: Target, device: torch.device = CPU) -> PreTrainedModel:
    """Return the host without storage, its rotary tables real; an MoE wrapper's router is zero, on `device`."""
    model, card = internals.build_skeleton(target.config, torch.get_default_dtype()), target.card
    if card.moe_shaped:
        model.set_experts_implementation("eager")
        for layer in internals.decoder(model)[1].layers:
            fill_constants(layer, card, device)
            module = layer.get_submodule(card.ffn)
            for name, tensor in internals.saved_tensors(module).items():
                if name.rpartition(".")[0] != card.experts:
                    _set(module, name, torch.zeros(tensor.shape, device=device))
    return model


def fill_constants(layer: nn.Module, card: StudentCard, device: torch.device) -> None:
    """Set the tensors of a host's layer that its card gives as numbers."""
    tensors = internals.saved_tensors(layer)
    for name, value in card.constants.items():
        _set(layer, name, torch.full(tensors[name].shape, value, device=device))


class CopiedTensors:
    """What the student copies from the teacher: everything outside its FFNs, read when it is needed, in what `cut` keeps.

    Layers and norms are read to `device`, where the student is built; embedding and head to the CPU.
    Raises UserError for a tensor of either side that has no counterpart.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        target: Target,
        teacher: "Teacher",
        cut: Cut | None = None,
        device: torch.device = CPU,
    ):
        self.model, self.target, self.teacher, self.cut, self.device = model, target, teacher, cut, device
        sources = tensor_map(target.card, model, set(teacher.shapes))
        self.sources = {name: cut.source(source) if cut else source for name, source in sources.items()}
        decoder = internals.decoder(model)[0]
        self.layers_prefix = f"{decoder}.layers." if decoder else "layers."
        check_teacher_used(set(self.sources.values()), target, teacher, cut)

    def in_layer(self, name: str, index: int | None = None) -> bool:
        """Return whether a student's tensor belongs to a layer, or to layer `index`."""
        return name.startswith(self.layers_prefix if index is None else f"{self.layers_prefix}{index}.")

    def fill(self, wanted: Callable[[str], bool]) -> None:
        """Read the student's tensors whose names are `wanted`."""
        for name, source in self.sources.items():
            if wanted(name):
                assign(self.model, name, self._read(name, source))

    def fill_missing(self, without: str = " ") -> None:
        """Read what lies outside the layers and is not in memory, except names that begin with `without`."""

        def wanted(name: str) -> bool:
            return not (self.in_layer(name) or name.startswith(without)) and self._tensor(name).is_meta

        self.fill(wanted)

    def outside_layers(self) -> dict[str, Tensor]:
        """Return what lies outside the layers, by name; tied tensors once."""
        return {name: self._tensor(name).data for name in self.sources if not self.in_layer(name)}

    def _tensor(self, name: str) -> Tensor:
        """Return a parameter or saved buffer of the student."""
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        return module.get_buffer(leaf) if leaf in module._buffers else module.get_parameter(leaf)

    def _read(self, name: str, source: str) -> Tensor:
        shape = self._tensor(name).shape
        rows = shape[0] if len(shape) == 2 else 0  # a norm may be as long as the vocabulary
        table = rows == self.target.config.vocab_size and not self.in_layer(name)
        value = self.teacher.tensor(source).to(CPU if table else self.device, torch.get_default_dtype())
        if self.cut:
            value = self.cut.tensor(source, value, shape)
        if value.shape != shape:
            raise UserError(
                f"the student's tensor {name!r} has shape {list(shape)} and its source {source!r} {list(value.shape)}; "
                f"correct the student card {self.target.card.name!r}"
            )
        return value.clone()


def unload(module: nn.Module) -> None:
    """Free a module's tensors; their shapes stay."""
    for name, value in internals.saved_tensors(module).items():
        assign(module, name, torch.empty_like(value, device="meta"))


def check_teacher_used(used: set[str], target: Target, teacher: "Teacher", cut: Cut | None) -> None:
    """Refuse a teacher with a tensor outside its FFNs and dropped layers that the host has no place for.

    Raises UserError naming the tensor.
    """
    card = teacher.card
    blocks = {target.card.ffn, *(x for x in (card.moe_block, card.shared) if x)} if card else {target.card.ffn}
    tied = set(internals.tied_names(teacher.model))
    layers = range(len(teacher.body.layers))
    replaced = [f"{teacher.layers_prefix}{i}.{path}." for i in layers for path in blocks]
    replaced += [f"{teacher.layers_prefix}{i}.{name}" for i in layers for name in target.card.constants]
    dropped = [f"{teacher.layers_prefix}{i}." for i in layers if cut and i not in cut.layers]
    for name in teacher.shapes:
        if name not in used and name not in tied and not name.startswith((*replaced, *dropped)):
            raise UserError(
                f"the teacher's tensor {name!r} has no place in the host {target.card.name!r}; choose another host for this family"
            )


def linear_of(module: nn.Module, path: str) -> nn.Linear:
    """Return the linear layer `path` of a host's FFN."""
    return cast(nn.Linear, module.get_submodule(path))


def _linears(card: StudentCard, ffn: DenseFFN) -> list[tuple[str, Tensor, Tensor | None]]:
    """Return (path, weight, bias) of each linear layer of a host's FFN; gate and up may be one."""
    down = (card.down, ffn.down, ffn.down_bias)
    if card.up:
        return [(card.gate, ffn.gate, ffn.gate_bias), (card.up, ffn.up, ffn.up_bias), down]
    both = ffn.gate_bias, ffn.up_bias
    bias = None if both[0] is None or both[1] is None else torch.cat((both[0], both[1]))
    return [(card.gate, torch.cat((ffn.gate, ffn.up)), bias), down]


def present_ffn(module: nn.Module, card: StudentCard, gating: Gating) -> DenseFFN:
    """Return a host's FFN as it is, sharing its tensors; `gating` is its gated activation."""
    weights: list[Tensor] = []
    biases: list[Tensor | None] = []
    for path in filter(None, (card.gate, card.up, card.down)):
        part = linear_of(module, path)
        count = 1 if card.up or path == card.down else 2
        weights += part.weight.detach().chunk(count)
        biases += [None] * count if part.bias is None else part.bias.detach().chunk(count)
    return DenseFFN(*weights, *biases, gating=gating)


def put_ffn(module: nn.Module, card: StudentCard, ffn: DenseFFN) -> None:
    """Make `ffn` the weights of a host's FFN module. Raises UserError when sizes differ, or biases have no place."""
    if card.moe_shaped:
        _put_stacked(module, card, ffn)
        return
    for path, weight, bias in _linears(card, ffn):
        linear = linear_of(module, path)
        if linear.weight.shape != weight.shape:
            raise UserError(
                f"the host's {path} has shape {list(linear.weight.shape)}, the FFN that was built {list(weight.shape)}"
            )
        if bias is not None and linear.bias is None:
            raise UserError(
                f"the experts have biases and the host {card.name!r} has none in {path}; choose another host"
            )
        _set(linear, "weight", weight)
        if linear.bias is not None:
            _set(linear, "bias", weight.new_zeros(len(linear.bias)) if bias is None else bias)


def _put_stacked(module: nn.Module, card: StudentCard, ffn: DenseFFN) -> None:
    """Make `ffn` every expert of an MoE wrapper, in the wrapper's own layout; router and corrections become zero."""
    experts = module.get_submodule(card.experts)
    transposed, interleaved = expert_layout(experts, False)
    values = {"gate_up_proj": _gate_and_up(ffn.gate, ffn.up, interleaved), "down_proj": ffn.down}
    if transposed:
        values = {name: value.T for name, value in values.items()}
    if ffn.gate_bias is not None and ffn.up_bias is not None and ffn.down_bias is not None:
        values |= {
            "gate_up_proj_bias": _gate_and_up(ffn.gate_bias, ffn.up_bias, interleaved),
            "down_proj_bias": ffn.down_bias,
        }
    for name, tensor in internals.saved_tensors(module).items():
        path, _, leaf = name.rpartition(".")
        if path != card.experts:
            _set(module, name, ffn.down.new_zeros(tensor.shape))
            continue
        value = values.pop(leaf) if leaf in values else ffn.down.new_zeros(tensor.shape[1:])
        scale = card.output_scale if leaf.startswith("down") else 1.0
        if tensor.shape[1:] != value.shape:
            raise UserError(
                f"the host's {name} has shape {list(tensor.shape[1:])}, the FFN that was built {list(value.shape)}"
            )
        _set(module, name, (value / scale).expand(tensor.shape))
    if values:
        raise UserError(
            f"the host {card.name!r} has no place for the experts' {next(iter(values))}; choose another host"
        )


def _gate_and_up(gate: Tensor, up: Tensor, interleaved: bool) -> Tensor:
    """Return gate and up rows as one tensor: in turn, or one after the other."""
    return torch.stack([gate, up], 1).flatten(0, 1) if interleaved else torch.cat([gate, up])


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    assign(module, name, value.detach().to(torch.get_default_dtype()).contiguous().clone())
