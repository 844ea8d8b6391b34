"""Find the sizes of a student whose budget asks for fewer channels of the residual stream, layers or attention heads."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from moe2dense.errors import UserError
from moe2dense.families.cards import StudentCard
from moe2dense.modeling.empty import count_parameters, empty_model
from moe2dense.modeling.shape import Geometry
from moe2dense.student.target.dense_config import dense_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PRUNE_RULES = ("auto", "width", "depth", "heads")
CHANNEL_MULTIPLE = 32
Heads = tuple[int, int]  # query heads, KV groups


@dataclass(frozen=True)
class PrunedShape:
    """A student's sizes outside its FFNs, and the width of its FFN."""

    # share of the teacher's residual stream, layers and heads
    share_kept: float
    # sizes that differ from the teacher's
    geometry: dict[str, Any]
    width: int


def head_shapes(shape: Geometry) -> list[Heads]:
    """Return (query heads, KV groups) from all of the teacher's heads down to half, most first.

    Whole groups go, or as many heads of each group.
    """
    heads, groups = shape.num_attention_heads, shape.num_key_value_heads
    each = heads // max(1, groups)
    pairs = [(g * r, g) for g in range(1, groups + 1) for r in range(1, each + 1) if 2 * g * r >= heads]
    return sorted(pairs, key=lambda pair: (-pair[0], pair[1]))


def refused(teacher: "PreTrainedConfig", host: StudentCard, geometry: dict[str, Any]) -> bool:
    """Return whether the host's own config, or its card, refuses these sizes."""
    if "channels" in host.uncut and geometry.get("hidden_size", teacher.hidden_size) != teacher.hidden_size:
        return True
    try:
        dense_config(teacher, host, CHANNEL_MULTIPLE, **geometry)
    except UserError:
        raise
    except ValueError:  # such as: the hidden size is not a multiple of the heads
        return True
    return False


class Sizes:
    """Parameters of the host for any depth, channels and width, counted on a few empty models.

    Every tensor has at most two dimensions that grow with the channels, so counts are exact quadratics of the channels, and
    linear in the width.
    """

    def __init__(self, teacher: "PreTrainedConfig", host: StudentCard, fixed: dict[str, Any], channels: Sequence[int]):
        self.points: dict[int, tuple[list[int], list[int]]] = {}
        for c in dict.fromkeys((channels[0], channels[len(channels) // 2], channels[-1])):
            low, high = (self._counts(dense_config(teacher, host, w, hidden_size=c, **fixed)) for w in (64, 128))
            slopes = [(b - a) // 64 for a, b in zip(low, high, strict=True)]
            self.points[c] = [a - 64 * s for a, s in zip(low, slopes, strict=True)], slopes

    @staticmethod
    def _counts(config: "PreTrainedConfig") -> list[int]:
        """Return the parameters of the model when it ends after 0, 1, 2, ... layers."""
        from moe2dense.modeling.decoder import decoder_layers

        model = empty_model(config)
        layers = [count_parameters(layer) for layer in decoder_layers(model)]
        return list(accumulate(layers, initial=count_parameters(model) - sum(layers)))

    def width(self, budget: int, depth: int, channels: int) -> int:
        """Return the widest FFN, a multiple of 32, with which the model stays within the budget; below 0 if none does."""
        base = slope = Fraction(0)
        for c, (bases, slopes) in self.points.items():
            others = [o for o in self.points if o != c]
            weight = Fraction(math.prod(channels - o for o in others), math.prod(c - o for o in others))
            base, slope = base + weight * bases[depth], slope + weight * slopes[depth]
        return int((budget - base) // slope) // CHANNEL_MULTIPLE * CHANNEL_MULTIPLE


@dataclass(frozen=True)
class _Search:
    """A search for the shape that keeps most of the teacher within a budget of parameters."""

    budget: int
    teacher: "PreTrainedConfig"
    shape: Geometry
    host: StudentCard

    def best(self, depths: Sequence[int], heads: Heads, floor: int, narrow: bool) -> PrunedShape | None:
        """Return the shape within the budget that keeps most of the teacher, or None.

        Its FFN is at least `floor` wide for a residual stream of the teacher's hidden size, and in proportion for a narrower
        one. narrow: whether channels may go.
        """
        shape, hidden = self.shape, self.shape.hidden_size
        full = (shape.num_attention_heads, shape.num_key_value_heads)
        fixed = {} if heads == full else {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
        fewest = hidden // 4 if narrow else hidden - 1
        wanted = [hidden, *range((hidden - 1) // CHANNEL_MULTIPLE * CHANNEL_MULTIPLE, fewest, -CHANNEL_MULTIPLE)]
        channels = [c for c in wanted if not refused(self.teacher, self.host, fixed | {"hidden_size": c})]
        if not channels:
            return None
        sizes = Sizes(self.teacher, self.host, fixed, channels)
        best: PrunedShape | None = None
        for depth in depths:
            for c in channels:
                share_kept = depth * c * heads[0] / (shape.num_hidden_layers * hidden * full[0])
                if best and share_kept <= best.share_kept:
                    break
                width = sizes.width(self.budget, depth, c)
                if width >= max(1, floor * c / hidden):
                    changed = fixed | {"hidden_size": c, "num_hidden_layers": depth}
                    geometry = {k: v for k, v in changed.items() if v != getattr(self.teacher, k)}
                    best = PrunedShape(share_kept, geometry, width)
                    break
        return best

    def most_heads(self, shapes: Sequence[Heads], floor: int) -> PrunedShape | None:
        """Return the first of `shapes`, most heads first, that reaches the budget by itself, searched by bisection."""
        layers: list[int] = [self.shape.num_hidden_layers]
        most: PrunedShape | None = None
        low, high = 0, len(shapes)
        while low < high:
            middle = (low + high) // 2
            tried = self.best(layers, shapes[middle], floor, narrow=False)
            most, low, high = (tried, low, middle) if tried else (most, middle + 1, high)
        return most


def pruned_shape(
    budget: int, teacher: "PreTrainedConfig", shape: Geometry, host: StudentCard, prune: str = "auto"
) -> PrunedShape | None:
    """Return the student's shape for a budget in parameters; None when the budget is too small for any.

    auto: channels and layers go, whichever keeps more of both, under an FFN of one expert's proportion. width, depth, heads:
    channels, layers or attention heads go, as few as leave the FFN the proportion of the experts that a token passes. Where
    half of the layers or heads are not enough for that, half go, and channels as far as the budget asks. At least a quarter
    of the channels stays.
    Raises UserError for another `prune`, and for heads where the host's card does not say how to cut them.
    """
    if prune not in PRUNE_RULES:
        raise UserError(f"build.prune is {prune!r}; choose one of {', '.join(PRUNE_RULES)}")
    if prune == "heads" and not host.heads:
        raise UserError(
            f"build.prune = 'heads' is not possible with the host {host.name!r}, whose norms run over all heads; choose width or depth"
        )
    if (what := {"width": "channels", "depth": "layers"}.get(prune)) in host.uncut:
        raise UserError(
            f"build.prune = {prune!r} is not possible with the host {host.name!r}, which needs all {what} of its teacher"
        )
    layers, all_heads = shape.num_hidden_layers, (shape.num_attention_heads, shape.num_key_value_heads)
    depths = range(layers, layers - 1 if "layers" in host.uncut else (layers + 1) // 2 - 1, -1)
    search, one = _Search(budget, teacher, shape, host), shape.expert_width
    if prune == "auto":
        return search.best(depths, all_heads, one, narrow=True)
    if prune == "width":
        wide = search.best([layers], all_heads, shape.active_width, narrow=True)
        return wide or search.best([layers], all_heads, one, narrow=True)
    if prune == "depth":
        deep = search.best(depths, all_heads, shape.active_width, narrow=False)
        return deep or search.best([depths[-1]], all_heads, one, narrow=True)
    heads = head_shapes(shape)
    return search.most_heads(heads, shape.active_width) or search.best([layers], heads[-1], one, narrow=True)


def scored(geometry: dict[str, Any], depth: str) -> bool:
    """Return whether a pruned shape needs a pass of the teacher before the build, to score channels, heads or layers."""
    fewer = geometry.keys() & {"hidden_size", "num_attention_heads"}
    return bool(fewer) or ("num_hidden_layers" in geometry and depth == "influence")


def pruning_text(shape: Geometry, geometry: dict[str, Any], depth: str) -> str:
    """Say what of the teacher a pruned student keeps outside its FFNs; '' when everything."""
    parts = []
    if "num_hidden_layers" in geometry:
        by = "evenly spaced" if depth == "alternate" else "by influence"
        parts.append(f"{geometry['num_hidden_layers']} of {shape.num_hidden_layers} layers ({by})")
    if "hidden_size" in geometry:
        parts.append(f"{geometry['hidden_size']} of {shape.hidden_size} channels (by mean activation)")
    if "num_attention_heads" in geometry:
        parts.append(
            f"{geometry['num_attention_heads']} of {shape.num_attention_heads} heads in "
            f"{geometry.get('num_key_value_heads', shape.num_key_value_heads)} of {shape.num_key_value_heads} KV groups (by output energy)"
        )
    return ", ".join(parts)
