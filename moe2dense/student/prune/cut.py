"""Choose what a student keeps of the teacher outside its FFNs: channels of the residual stream, layers, attention heads.

The channels that stay have the largest mean activation behind the norms (Minitron: Muralidharan et al., arXiv 2407.14679).
Layers are ranked by how much they turn the residual stream, 1 - cos (ShortGPT: Men et al., arXiv 2403.03853).
"""

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from moe2dense.errors import UserError
from moe2dense.student.prune.heads import HeadEnergy, KeptHeads, best_heads, split_layer
from moe2dense.student.prune.norms import norm_factors, scale_norms
from moe2dense.student.prune.views import CutExperts, CutLayerFFNs
from moe2dense.student.target.pruned import scored
from moe2dense.teacher.layer_pass import LayerPass
from moe2dense.teacher.observer import Observer

if TYPE_CHECKING:
    from moe2dense.data.blocks import Blocks
    from moe2dense.student.target.resolve import Target
    from moe2dense.teacher.model import Teacher

# N blocks, S block length, T = N * S tokens, H hidden, C channels kept, L layers
DEPTH_RULES = ("influence", "alternate")


class Importance(Observer):
    """Scores over the real tokens, collected while the teacher runs.

    channels [H]: mean |input of the FFN|, summed over layers. influence [L]: 1 - cos(layer's input, layer's output).
    """

    def __init__(self) -> None:
        self.channels: Tensor | None = None
        self.influence: list[float] = []

    def layer(self, layer: LayerPass) -> None:
        """Add one layer."""
        mean = layer.x[layer.token_mask].abs().double().mean(0).cpu()
        self.channels = mean if self.channels is None else self.channels + mean
        before, after = (h.reshape(-1, h.shape[-1])[layer.token_mask] for h in (layer.hidden_in, layer.hidden_out))
        similarity = cosine_similarity(before, after.to(before.device), dim=-1)
        self.influence.append(1 - float(similarity.double().mean()))


def importance(teacher: "Teacher", data: "Blocks", heads: HeadEnergy | None = None) -> Importance:
    """Return scores of channels and layers, and fill `heads` with those of attention heads, in one pass over `data`."""
    scores = Importance()
    with heads.watching(teacher) if heads else contextlib.nullcontext():
        observers = [scores, *([heads] if heads else [])]
        teacher.run(data.input_ids, data.attention_mask, data.document_ids, observers=observers, logits=False)
    return scores


def best_layers(influence: list[float], count: int) -> list[int]:
    """Return the `count` layers of most influence, in order; the first and the last always stay."""
    inner = sorted(range(1, len(influence) - 1), key=lambda i: influence[i], reverse=True)
    ends = [0, len(influence) - 1][: max(1, min(2, count))]
    return sorted({*ends, *inner[: max(0, count - len(ends))]})


def alternate_layers(layers: int, count: int) -> list[int]:
    """Return `count` of `layers` at equal distances, the first and the last included (DistilBERT, arXiv 1910.01108)."""
    if count == 1:
        return [0]
    return [round(i * (layers - 1) / (count - 1)) for i in range(count)]


@dataclass(frozen=True)
class Cut:
    """What of the teacher the student keeps."""

    # [C] channels of the residual stream, ascending
    keep: Tensor
    # layers, ascending
    layers: tuple[int, ...]
    # attention heads by teacher layer
    heads: dict[int, KeptHeads] = field(default_factory=dict)
    # the host card's `heads`: which tensors have heads, and along which axis
    rules: Mapping[str, str] = field(default_factory=dict)

    def source(self, name: str) -> str:
        """Return the teacher's name of a student's tensor, whose layer is counted among those that stay."""
        return re.sub(r"\blayers\.(\d+)\.", lambda m: f"layers.{self.layers[int(m[1])]}.", name)

    def tensor(self, source: str, value: Tensor, shape: torch.Size) -> Tensor:
        """Cut a teacher's tensor to the student's `shape`: to the kept heads by the host's rules, then to the kept channels.

        Channels are cut along every dimension whose size still differs.
        """
        place = split_layer(source)
        if place and place[0] in self.heads:
            value = self.heads[place[0]].cut(place[1], value, self.rules)
        for dim, (size, teacher_size) in enumerate(zip(shape, value.shape, strict=True)):
            if size != teacher_size:
                assert size == len(self.keep), f"no rule takes {source} from {list(value.shape)} to {list(shape)}"
                value = value.index_select(dim, self.keep.to(value.device))
        return value

    def layer(self, layer_pass: LayerPass) -> LayerPass:
        """Return a layer's pass as the student sees it: residual stream, block and experts in the kept channels."""
        if self.keeps_all_channels(layer_pass):
            return layer_pass
        changes: dict[str, Any] = {
            name: getattr(layer_pass, name)[..., self.keep] for name in ("hidden_in", "hidden_out", "x", "y")
        }
        if layer_pass.experts is not None:
            changes["experts"] = CutExperts(layer_pass.experts, self.keep)
        return replace(layer_pass, ffns=CutLayerFFNs(layer_pass, self.keep), **changes)

    def keeps_all_channels(self, layer_pass: LayerPass) -> bool:
        """Return whether the student has all channels of the teacher."""
        return len(self.keep) == layer_pass.hidden_in.shape[-1]

    def scale_norms(self, layer: nn.Module, layer_pass: LayerPass) -> None:
        """Scale the norms of a student's layer for the channels that stay."""
        if not self.keeps_all_channels(layer_pass):
            scale_norms(layer, len(self.keep), norm_factors(layer_pass.hidden_in, self.keep, layer_pass.token_mask))


def cut_for(target: "Target", teacher: "Teacher", data: "Blocks", depth: str = "influence") -> Cut | None:
    """Return what to keep for a target's `geometry`: its hidden size, layers and heads. None where it takes nothing away.

    depth: which layers stay, those of most `influence` or `alternate` ones. Costs one pass of the teacher over `data`,
    unless alternate layers are all that is asked for. Raises UserError for another `depth`.
    """
    if depth not in DEPTH_RULES:
        raise UserError(f"build.depth is {depth!r}; choose one of {', '.join(DEPTH_RULES)}")
    geometry, layers, shape = target.geometry, len(teacher.body.layers), target.teacher
    width, count = geometry.get("hidden_size", teacher.hidden_size), geometry.get("num_hidden_layers", layers)
    queries = geometry.get("num_attention_heads", shape.num_attention_heads)
    groups = geometry.get("num_key_value_heads", shape.num_key_value_heads)
    fewer_heads = (queries, groups) != (shape.num_attention_heads, shape.num_key_value_heads)
    if width >= teacher.hidden_size and count >= layers and not fewer_heads:
        return None
    channels, layers_kept = torch.arange(teacher.hidden_size), tuple(alternate_layers(layers, count))
    heads: dict[int, KeptHeads] = {}
    if scored(geometry, depth):
        energy = HeadEnergy(shape.num_attention_heads, target.card.heads) if fewer_heads else None
        scores = importance(teacher, data, energy)
        assert scores.channels is not None
        channels = scores.channels.topk(width).indices.sort().values
        if depth == "influence":
            layers_kept = tuple(best_layers(scores.influence, count))
        if energy:
            heads = {i: best_heads(e, shape.num_key_value_heads, queries, groups) for i, e in energy.energy.items()}
    return Cut(channels, layers_kept, heads, target.card.heads)
