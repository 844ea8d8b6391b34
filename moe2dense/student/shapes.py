"""The sizes of a student whose budget takes more than the FFN's width: fewer channels of the residual stream, layers or attention heads."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from moe2dense.cards import StudentCard
from moe2dense.errors import UserError
from moe2dense.geometry import Geometry
from moe2dense.student.host import count_parameters, dense_config, empty_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PRUNE = ("auto", "width", "depth", "heads")
CHANNEL_MULTIPLE = 32
Heads = tuple[int, int]  # query heads, KV groups


@dataclass(frozen=True)
class Found:
    """A shape: what of the teacher's is kept (a share), the sizes that differ from the teacher's, and the FFN's width."""

    kept: float
    geometry: dict[str, Any]
    width: int


def head_shapes(shape: Geometry) -> list[Heads]:
    """(query heads, KV groups) from all of the teacher's down to half of its heads, most first: whole groups go, or as many heads of each."""
    heads, groups = shape.num_attention_heads, shape.num_key_value_heads
    each = heads // max(1, groups)
    found = [(g * r, g) for g in range(1, groups + 1) for r in range(1, each + 1) if 2 * g * r >= heads]
    return sorted(found, key=lambda pair: (-pair[0], pair[1]))


def refused(teacher: "PreTrainedConfig", host: StudentCard, geometry: dict[str, Any]) -> bool:
    """Whether the host's own config refuses these sizes."""
    try:
        dense_config(teacher, host, CHANNEL_MULTIPLE, **geometry)
    except UserError:
        raise
    except ValueError:  # such as: the hidden size is not a multiple of the heads
        return True
    return False


class Sizes:
    """Parameters of the host for any depth, channels and width, from a few empty models: every tensor has at most two
    dimensions that grow with the channels, so counts are exact quadratics of these, and linear in the width."""

    def __init__(self, teacher: "PreTrainedConfig", host: StudentCard, fixed: dict[str, Any], channels: Sequence[int]):
        self.points: dict[int, tuple[list[int], list[int]]] = {}
        for c in dict.fromkeys((channels[0], channels[len(channels) // 2], channels[-1])):
            low, high = (self._counts(dense_config(teacher, host, w, hidden_size=c, **fixed)) for w in (64, 128))
            slopes = [(b - a) // 64 for a, b in zip(low, high, strict=True)]
            self.points[c] = [a - 64 * s for a, s in zip(low, slopes, strict=True)], slopes

    @staticmethod
    def _counts(config: "PreTrainedConfig") -> list[int]:
        """Parameters of the model when it ends after 0, 1, 2, ... layers."""
        from moe2dense.teacher.adapter import decoder

        model = empty_model(config)
        layers = [count_parameters(layer) for layer in decoder(model)[1].layers]
        return list(accumulate(layers, initial=count_parameters(model) - sum(layers)))

    def width(self, budget: int, depth: int, channels: int) -> int:
        """The widest FFN, a multiple of 32, with which the model stays within the budget; below 0 if none does."""
        base = slope = Fraction(0)
        for c, (bases, slopes) in self.points.items():
            others = [o for o in self.points if o != c]
            weight = Fraction(math.prod(channels - o for o in others), math.prod(c - o for o in others))
            base, slope = base + weight * bases[depth], slope + weight * slopes[depth]
        return int((budget - base) // slope) // CHANNEL_MULTIPLE * CHANNEL_MULTIPLE


def _search(
    budget: int,
    teacher: "PreTrainedConfig",
    shape: Geometry,
    host: StudentCard,
    depths: Iterable[int],
    heads: Sequence[Heads],
    floor: int,
    narrow: bool,
) -> Found | None:
    """Of the shapes within the budget whose FFN keeps the proportion `floor` : hidden size to the residual stream, the one that keeps most."""
    best: Found | None = None
    full, hidden = (shape.num_attention_heads, shape.num_key_value_heads), shape.hidden_size
    fewest = hidden // 4 if narrow else hidden - 1
    for pair in heads:
        fixed = {} if pair == full else {"num_attention_heads": pair[0], "num_key_value_heads": pair[1]}
        wanted = [hidden, *range((hidden - 1) // CHANNEL_MULTIPLE * CHANNEL_MULTIPLE, fewest, -CHANNEL_MULTIPLE)]
        channels = [c for c in wanted if not refused(teacher, host, fixed | {"hidden_size": c})]
        if not channels:
            continue
        sizes = Sizes(teacher, host, fixed, channels)
        for depth in depths:
            for c in channels:
                kept = depth * c * pair[0] / (shape.num_hidden_layers * hidden * max(1, full[0]))
                if best and kept <= best.kept:
                    break
                width = sizes.width(budget, depth, c)
                if width >= floor * c / hidden and width > 0:
                    changed = fixed | {"hidden_size": c, "num_hidden_layers": depth}
                    best = Found(kept, {k: v for k, v in changed.items() if v != getattr(teacher, k)}, width)
                    break
    return best


def pruned_shape(
    budget: int, teacher: "PreTrainedConfig", shape: Geometry, host: StudentCard, prune: str = "auto"
) -> Found | None:
    """The student's shape for a budget in parameters; None when it is too small for any.

    auto: channels, and layers where both together keep more, under an FFN of one expert's proportion. width, depth, heads: only channels, layers
    or attention heads go, under an FFN of the active experts' proportion, else of one expert's; where layers or heads alone do not
    reach the budget, channels go too. At least half of the layers, half of the heads and a quarter of the channels stay.
    Raises UserError for another `prune`, and for heads where the host's card does not say how to cut them.
    """
    if prune not in PRUNE:
        raise UserError(f"walk.prune is {prune!r}; choose one of {', '.join(PRUNE)}")
    if prune == "heads" and not host.heads:
        raise UserError(
            f"walk.prune = 'heads' is not possible with the host {host.name!r}, whose norms run over all heads; choose width or depth"
        )
    layers = shape.num_hidden_layers
    whole = [(shape.num_attention_heads, shape.num_key_value_heads)]
    depths = range(layers, (layers + 1) // 2 - 1, -1) if prune in ("auto", "depth") else [layers]
    heads = head_shapes(shape) if prune == "heads" else whole
    floors = [shape.expert_width] if prune == "auto" else [shape.active_width, shape.expert_width]
    for narrow in (True,) if prune in ("auto", "width") else (False, True):
        for floor in floors:
            found = _search(budget, teacher, shape, host, depths, heads, floor, narrow)
            if found:
                return found
    return None


def pruning_text(shape: Geometry, geometry: dict[str, Any], depth: str) -> str:
    """What of the teacher a pruned student keeps outside its FFNs; '' when everything."""
    parts = []
    if "num_hidden_layers" in geometry:
        by = "at equal distances" if depth == "alternate" else "by influence"
        parts.append(f"{geometry['num_hidden_layers']} of {shape.num_hidden_layers} layers ({by})")
    if "hidden_size" in geometry:
        parts.append(f"{geometry['hidden_size']} of {shape.hidden_size} channels (by mean activation)")
    if "num_attention_heads" in geometry:
        parts.append(
            f"{geometry['num_attention_heads']} of {shape.num_attention_heads} heads in "
            f"{geometry['num_key_value_heads']} of {shape.num_key_value_heads} KV groups (by output energy)"
        )
    return ", ".join(parts)
