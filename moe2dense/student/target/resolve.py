"""Resolve what `--to` asks for, a named target, a parameter count, a share or a dense checkpoint, to a student's shape."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2dense.common.hub import hub_unreachable
from moe2dense.common.units import parse_count, show_count
from moe2dense.errors import UserError, first_line, nearest
from moe2dense.families.cards import StudentCard, TeacherCard, student_cards, student_host
from moe2dense.modeling.empty import count_parameters, empty_model
from moe2dense.modeling.shape import Geometry, teacher_geometry
from moe2dense.student.target.dense_config import dense_config
from moe2dense.student.target.pruned import pruned_shape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

WHOLE_EXPERT_TOLERANCE = 0.05  # a width of whole experts is preferred within this share of the budget
WIDTH_MULTIPLE = 64


@dataclass(frozen=True)
class Target:
    """The student's shape."""

    # as it was asked for, and as it is shown
    to: str
    label: str
    card: StudentCard
    # neurons of an FFN
    width: int
    config: "PreTrainedConfig"
    # tied tensors counted once
    parameters: int
    teacher: Geometry
    # sizes that differ from the teacher's
    geometry: dict[str, Any] = field(default_factory=dict)
    # a pretrained dense model to start from
    checkpoint: str = ""

    @property
    def whole_experts(self) -> float:
        """How many routed experts fit in the width, after the shared ones."""
        return (self.width - self.teacher.shared_width) / self.teacher.expert_width


def _parameters(teacher: "PreTrainedConfig", card: StudentCard, width: int, geometry: dict[str, Any]) -> int:
    return count_parameters(empty_model(dense_config(teacher, card, width, **geometry)))


def width_line(teacher: "PreTrainedConfig", card: StudentCard, geometry: dict[str, Any]) -> tuple[int, int]:
    """Return (parameters at width 0, parameters per neuron of width): a student's size is linear in its FFN width."""
    low, high = (_parameters(teacher, card, w, geometry) for w in (WIDTH_MULTIPLE, 2 * WIDTH_MULTIPLE))
    slope = (high - low) // WIDTH_MULTIPLE
    return low - slope * WIDTH_MULTIPLE, slope


def width_for(budget: int, base: int, slope: int, shape: Geometry) -> int:
    """Return the FFN width for a budget in parameters; 0 if none fits.

    It is that of whole experts when this is within 5% of the budget, else the largest multiple of 64 within it.
    """
    shared, one = shape.shared_width, shape.expert_width
    fewest = 0 if shared else 1
    nearest_k = max(fewest, round(((budget - base) / slope - shared) / one))
    whole = shared + nearest_k * one
    if abs(base + slope * whole - budget) <= WHOLE_EXPERT_TOLERANCE * budget:
        return whole
    return max(0, int((budget - base) // slope) // WIDTH_MULTIPLE * WIDTH_MULTIPLE)


def parameter_budget(to: str, shape: Geometry) -> int:
    """Return `to` in parameters: a count, or a share of the teacher.

    Raises UserError for anything else, and for what is not smaller than the teacher.
    """
    if to.strip().endswith("%"):
        try:
            share = float(to.strip()[:-1]) / 100
        except ValueError:
            raise UserError(f"--to must be a fraction such as 25%; found {to!r}") from None
        if not 0 < share < 1:
            raise UserError(f"--to {to} must be more than 0% and less than 100% of the teacher")
        return round(share * shape.parameters)
    budget = _count(to)
    if budget >= shape.parameters:
        raise UserError(
            f"--to {to} is not smaller than the teacher ({show_count(shape.parameters)} parameters); choose a smaller target"
        )
    return budget


def _count(to: str) -> int:
    """`to` as a number of parameters. Raises UserError that names every form it may have."""
    try:
        return parse_count(to)
    except UserError:
        raise UserError(
            f"--to must be a size such as 7b or 350m, a share of the teacher such as 25%, a named target "
            f"({', '.join(named_targets())}) or the folder of a dense checkpoint; found {to!r}"
        ) from None


def named_targets() -> list[str]:
    """Return the names of the shipped targets."""
    return [name for name, card in student_cards().items() if card.host]


def resolve_target(
    to: str, config: "PreTrainedConfig", card: TeacherCard, prune: str = "auto", host: str = ""
) -> Target:
    """Return the student that `--to` asks for, for a teacher of this config.

    prune: what goes besides neurons (see `pruned_shape`); auto prunes only where fewer neurons are not enough. host: name of
    a student card in place of the one that the teacher's card names. Raises UserError for an unknown form, a student that is
    not smaller than the teacher or too small for it, or a named target whose sizes contradict the teacher's.
    """
    config = config.get_text_config()
    shape = teacher_geometry(config, card)
    if to in student_cards() and student_cards()[to].host:
        return _named(to, config, shape)
    if Path(to).is_dir() or "/" in to:
        return _checkpoint(to, config, shape)
    dense_host = student_host(host or card.host)
    if to and to[0].isalpha():
        raise UserError(
            f"--to {to!r} is no known target{nearest(to, named_targets())}; give a size (7b, 350m), a share (25%), "
            f"a named target ({', '.join(named_targets())}) or the path of a dense checkpoint"
        )
    budget = parameter_budget(to, shape)
    base, slope = width_line(config, dense_host, {})
    width = width_for(budget, base, slope, shape)
    if width == 0 or prune != "auto":
        pruned = pruned_shape(budget, config, shape, dense_host, prune)
        if pruned is None:
            raise UserError(
                f"--to {to} ({show_count(budget)} parameters) is too small for this teacher: {show_count(base)} lie outside its FFNs, and "
                f"a quarter of its hidden size, half of its layers or half of its heads is the least that is kept; choose a larger target"
            )
        if pruned.geometry or width == 0:
            return _target(to, config, shape, dense_host, pruned.width, pruned.geometry, budget)
    if base + slope * width >= shape.parameters:
        raise UserError(f"--to {to} gives a student as large as the teacher; choose a smaller target")
    return _target(to, config, shape, dense_host, width, {}, budget)


def _target(
    to: str, config: "PreTrainedConfig", shape: Geometry, host: StudentCard, width: int, geometry: dict, budget: int = 0
) -> Target:
    student = dense_config(config, host, width, **geometry)
    parameters = count_parameters(empty_model(student))
    label = f"{show_count(parameters)} {host.title}"
    if budget and abs(parameters - budget) > WHOLE_EXPERT_TOLERANCE * budget:
        label += f" (asked {show_count(budget)})"
    return Target(to, label, host, width, student, parameters, shape, geometry)


def _named(to: str, config: "PreTrainedConfig", shape: Geometry) -> Target:
    card = student_cards()[to]
    host = student_host(card.host)
    geometry = dict(card.geometry)
    width = geometry.pop(host.width)
    for key, value in geometry.items():
        if getattr(config, key, value) != value:
            raise UserError(
                f"--to {to} has {key} = {value}, but the teacher has {getattr(config, key)}; give a size such as 40% instead"
            )
    target = _target(to, config, shape, host, width, {})
    if target.parameters >= shape.parameters:
        raise UserError(f"--to {to} is not smaller than the teacher ({show_count(shape.parameters)} parameters)")
    return dataclasses.replace(target, label=card.title)


def _checkpoint(to: str, config: "PreTrainedConfig", shape: Geometry) -> Target:
    from transformers import AutoConfig

    if not Path(to).is_dir() and (reason := hub_unreachable()):
        raise UserError(
            f"--to {to} is no folder here, and the hub cannot be reached ({reason}); give a size such as 40% instead"
        )
    try:
        dense = AutoConfig.from_pretrained(to, trust_remote_code=False).get_text_config()
    except Exception as error:  # each architecture's config checks its fields in its own way
        raise UserError(f"--to {to}: no dense checkpoint can be read there ({first_line(error)})") from error
    by_type = {c.model_type: c for c in student_cards().values() if not c.host}
    if dense.model_type not in by_type:
        raise UserError(
            f"--to {to} is a {dense.model_type!r} model, which has no student card; known: {', '.join(by_type)}"
        )
    card = by_type[dense.model_type]
    if dense.vocab_size != config.vocab_size:
        raise UserError(
            f"--to {to} has a vocabulary of {dense.vocab_size} tokens and the teacher one of {config.vocab_size}; "
            f"distilling logits needs the same tokenizer"
        )
    model = empty_model(dense)
    return Target(
        to, Path(to).name, card, getattr(dense, card.width), dense, count_parameters(model), shape, checkpoint=to
    )
