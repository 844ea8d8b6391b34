"""Check that a dense host computes what its teacher does outside the FFNs, before anything is built.

Small random models of both configs, with the same tensors and every FFN replaced by the identity, must have the same hidden states:
that covers masks, sliding windows, RoPE, norms, multipliers and how an FFN's output joins.
"""

import contextlib
import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from moe2dense.errors import UserError, first_line
from moe2dense.families.cards import StudentCard, TeacherCard
from moe2dense.modeling import internals
from moe2dense.modeling.decoder import decoder_layers
from moe2dense.modeling.gated_ffn import gated_linears
from moe2dense.modeling.small_model import random_model, random_text, relative_difference, small_config
from moe2dense.student.target.dense_config import dense_config, tensor_map

_WIDTH = 8
_TOLERANCE = 1e-4
_MISSING = "no such field"
# fields that are the host's own, or say nothing of what a layer outside its FFN computes
_OWN_FIELDS = ("model_type", "architectures", "transformers_version", "dtype", "auto_map", "id2label", "label2id")


def check_host(config: PreTrainedConfig, card: TeacherCard, host: StudentCard) -> str:
    """Check a host against a teacher's config; return a sentence where small models of them cannot be made, else ''.

    Raises UserError naming the layer and the config field that make the difference.
    """
    key = json.dumps(config.get_text_config().to_dict(), default=str, sort_keys=True)
    return _Checked(config, card, host, key).result()


class _Checked:
    """The arguments of a check, which is made once for each teacher's config and host."""

    def __init__(self, config: PreTrainedConfig, card: TeacherCard, host: StudentCard, key: str):
        self.config, self.card, self.host = config, card, host
        self.key = (key, repr(card), repr(host))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Checked) and self.key == other.key

    def result(self) -> str:
        """Return what `check_host` returns."""
        return _check(self)


@lru_cache(maxsize=32)
def _check(checked: _Checked) -> str:
    """Compare small models of a teacher's config and its host's."""
    card, host = checked.card, checked.host
    try:
        small = small_config(checked.config, card)
        teacher = random_model(small)
        student_config = dense_config(small, host, _WIDTH)
        wanted = _hidden_states(teacher, card.moe_block, card.shared, card.experts_path)
        states = _student_states(teacher, student_config, host)
    except UserError:
        raise
    except Exception as error:  # a family whose sizes cannot be cut fails in many ways; it is not known to be wrong
        return f"{host.title} host: it could not be tried out against the teacher's config ({first_line(error)})"
    differences = [relative_difference(a, b) for a, b in zip(states, wanted, strict=True)]
    first = next((i for i, d in enumerate(differences) if d > _TOLERANCE), None)
    if first is not None:
        raise _refusal(teacher, student_config, host, wanted, first, differences[first])
    return ""


def _student_states(teacher: PreTrainedModel, config: PreTrainedConfig, host: StudentCard) -> list[Tensor]:
    """Return the hidden states of the host with the teacher's tensors outside its FFNs."""
    student = random_model(config, seed=1)
    tensors = teacher.state_dict()
    sources = tensor_map(host, student, set(tensors))
    student.load_state_dict({name: tensors[source] for name, source in sources.items()}, strict=False)
    student.tie_weights()
    return _hidden_states(student, host.ffn, "", f"{host.ffn}.{host.experts}" if host.experts else host.ffn)


@torch.no_grad()
def _hidden_states(model: PreTrainedModel, ffn: str, shared: str, experts: str) -> list[Tensor]:
    """Return the output of every layer, and the logits, of a random text; each FFN returns its input."""
    states: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        states.append((output[0] if isinstance(output, tuple) else output).clone())

    with contextlib.ExitStack() as stack:
        for layer in decoder_layers(model):
            stack.enter_context(_identity_ffn(layer, ffn, shared, experts))
            stack.callback(layer.register_forward_hook(keep).remove)
        logits = model(input_ids=random_text(model.config), use_cache=False).logits
    return [*states, logits]


@contextlib.contextmanager
def _identity_ffn(layer: nn.Module, path: str, shared: str, experts: str) -> Iterator[None]:
    """Let a layer's FFN return its input within the context; a shared FFN beside it returns zeros, experts are not computed."""

    def same(_module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = cast(Tensor, inputs[0] if inputs else kwargs["hidden_states"])
        if isinstance(output, tuple):
            return (x.reshape(output[0].shape), *output[1:])
        return x.reshape(output.shape)

    def nothing(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    modules = dict(layer.named_modules())
    ffn = modules.get(path) or next(c for c in layer.children() if gated_linears(c) is not None)
    handles = [ffn.register_forward_hook(same, with_kwargs=True)]
    if shared and shared in modules:
        handles.append(modules[shared].register_forward_hook(nothing))
    stand_in = {modules[experts]: lambda x, *_: x} if experts in modules else {}
    try:
        with internals.forwards(stand_in):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _refusal(
    teacher: PreTrainedModel,
    student: PreTrainedConfig,
    host: StudentCard,
    wanted: list[Tensor],
    layer: int,
    difference: float,
) -> UserError:
    """Return the error for a host that differs: which layer, how far, and the config fields that make it differ."""
    config = teacher.config
    kinds = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    where = "its language-model head" if layer == len(wanted) - 1 else f"layer {layer}"
    where += f" ({kinds[layer]})" if layer < len(kinds) and kinds[layer] else ""
    fields = _differing_fields(config, student)
    causes = [name for name in fields if _mends(teacher, student, host, wanted, name)] or list(fields)
    named = ", ".join(f"{n} (teacher {fields[n][0]}, host {fields[n][1]})" for n in causes[:3])
    return UserError(
        f"the {host.title} host computes something else than the teacher outside the FFNs: on small models of both configs {where} "
        f"differs by {difference:.2g} of its size; config field at fault: {named or 'none that both have'}; "
        f"choose another host, or correct the student card {host.name!r}"
    )


def _differing_fields(teacher: PreTrainedConfig, student: PreTrainedConfig) -> dict[str, tuple[Any, Any]]:
    """Return {field: (teacher's value, host's)} of the fields whose values differ."""
    ours, theirs = teacher.to_dict(), student.to_dict()
    return {
        name: (ours.get(name, _MISSING), theirs.get(name, _MISSING))
        for name in sorted({*ours, *theirs})
        if name not in _OWN_FIELDS and not name.startswith("_") and ours.get(name) != theirs.get(name)
    }


def _mends(
    teacher: PreTrainedModel, student: PreTrainedConfig, host: StudentCard, wanted: list[Tensor], name: str
) -> bool:
    """Return whether the host agrees with the teacher's value of one field in the place of its own."""
    value = teacher.config.to_dict().get(name, _MISSING)
    if value is _MISSING:
        return False
    fields = {k: v for k, v in student.to_dict().items() if k not in _OWN_FIELDS and not k.startswith("_")}
    try:
        states = _student_states(teacher, type(student)(**{**fields, name: value}), host)
    except Exception:  # a value that the host cannot take is not the one that mends it
        return False
    return all(relative_difference(a, b) <= _TOLERANCE for a, b in zip(states, wanted, strict=True))
