"""Read feature losses as users write them, `KIND:MAP@WEIGHT` joined with `+`, and say which layers they need.

The kinds and the layer maps are listed in losses/registry.py. No torch is loaded here, so plans can count what is stored.
"""

import functools
from dataclasses import dataclass

from moe2dense.config.schedules import scheduled
from moe2dense.errors import UserError, nearest
from moe2dense.losses.registry import FEATURE_KINDS


@dataclass(frozen=True)
class Feature:
    """One term of a feature loss: its kind, its layer map and its weight ("" = the default weight)."""

    kind: str
    layer_map: str
    weight: str

    def reads(self, layer: int) -> tuple[str, ...]:
        """Return the names of what it reads of a layer."""
        return tuple(f"{what}-{layer}" for what in FEATURE_KINDS[self.kind].reads)

    def pairs(self, student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
        """Return the pairs of student and teacher layers that it compares; all of them where the map is learned."""
        if self.layer_map == "learned":
            return [(s, t) for s in range(student_layers) for t in range(teacher_layers)]
        return layer_pairs(self.layer_map, student_layers, teacher_layers)


@functools.lru_cache(maxsize=8)
def parse_features(text: str) -> tuple[Feature, ...]:
    """Return the terms of a text such as `mse:uniform@0.1+attention:last`; without a map, a term's map is uniform.

    Raises UserError for an unknown kind, a learned map where the kind cannot mix layers, or a weight that is no schedule.
    """
    features = []
    for part in text.split("+"):
        body, _, weight = part.strip().partition("@")
        kind, _, layer_map = body.partition(":")
        if kind not in FEATURE_KINDS:
            known = list(FEATURE_KINDS)
            raise UserError(
                f"features {text!r} must be KIND:MAP, such as mse:uniform, or several joined with +; {kind!r} is no kind"
                f"{nearest(kind, known)}; the kinds are {', '.join(known)}"
            )
        if layer_map == "learned" and not FEATURE_KINDS[kind].mixes_layers:
            raise UserError(f"features {text!r}: a learned map mixes hidden states; use mse:learned or cosine:learned")
        if weight:
            scheduled(weight, 0, 1)
        features.append(Feature(kind, layer_map or "uniform", weight))
    return tuple(features)


def feature_weights(text: str, default: str, step: int, steps: int) -> tuple[float, ...]:
    """Return the weight of every term at a step; () when all are zero."""
    weights = tuple(scheduled(f.weight or default, step, steps) for f in parse_features(text)) if text else ()
    return weights if any(weights) else ()


def student_features(text: str, student_layers: int, teacher_layers: int) -> tuple[str, ...]:
    """Return the names of what the terms read of the student (modeling/hooks.py).

    Raises UserError for layers that do not exist.
    """
    pairs = _pairs_by_feature(text, student_layers, teacher_layers)
    return tuple(dict.fromkeys(name for feature, s, _ in pairs for name in feature.reads(s)))


def teacher_features(text: str, student_layers: int, teacher_layers: int) -> tuple[str, ...]:
    """Return the names of what must be known of the teacher (modeling/hooks.py).

    Raises UserError for layers that do not exist.
    """
    pairs = _pairs_by_feature(text, student_layers, teacher_layers)
    return tuple(dict.fromkeys(name for feature, _, t in pairs for name in feature.reads(t)))


def _pairs_by_feature(text: str, student_layers: int, teacher_layers: int) -> list[tuple[Feature, int, int]]:
    features = parse_features(text) if text else ()
    return [(f, s, t) for f in features for s, t in f.pairs(student_layers, teacher_layers)]


def layer_pairs(layer_map: str, student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """Return which student layer learns from which teacher layer, both counted from 0.

    `uniform`: every student layer, spread evenly up to the last of both. `even:k`: k of these, spread evenly up to the
    last. `last:k`: the last k of both. `0=1,3=7`: as written; -1 is the last layer.
    Raises UserError for anything else, or for layers that do not exist.
    """
    everywhere = [(i, round((i + 1) * teacher_layers / student_layers) - 1) for i in range(student_layers)]
    if layer_map == "uniform":
        return everywhere
    name, _, count = layer_map.partition(":")
    try:
        if name == "even":
            k = min(int(count), student_layers)
            pairs = [everywhere[round((i + 1) * student_layers / k) - 1] for i in range(k)]
        elif name == "last":
            k = int(count or 1)
            pairs = [(student_layers - 1 - i, teacher_layers - 1 - i) for i in reversed(range(k))]
        else:
            written = [part.split("=") for part in layer_map.split(",")]
            pairs = [(int(s) % student_layers if int(s) < 0 else int(s), int(t)) for s, t in written]
            pairs = [(s, t % teacher_layers if t < 0 else t) for s, t in pairs]
    except ValueError:
        raise UserError(
            f"layer map {layer_map!r} must be uniform, learned, even:K, last:K or pairs such as 0=1,3=7"
        ) from None
    if not pairs or any(not (0 <= s < student_layers and 0 <= t < teacher_layers) for s, t in pairs):
        raise UserError(
            f"layer map {layer_map!r} names layers outside {student_layers} (student) and {teacher_layers} (teacher)"
        )
    return pairs
