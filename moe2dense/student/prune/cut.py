"""Students smaller than the teacher outside its FFNs: fewer channels of the residual stream, fewer layers, or fewer attention heads.

The channels that stay are those with the largest mean activation behind the norms (Minitron: Muralidharan et al., arXiv 2407.14679); layers are
ranked by how much they turn the residual stream, 1 - cos (layer influence: Men et al., ShortGPT, arXiv 2403.03853). For heads see `heads`.
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
from moe2dense.student.ffn.dense import Experts, GatedFFN
from moe2dense.student.prune.heads import HeadEnergy, KeptHeads, best_heads, split_layer
from moe2dense.student.target.pruned import scored
from moe2dense.teacher.experts import SharedFFN
from moe2dense.teacher.layer_pass import LayerPass
from moe2dense.teacher.observer import Observer

if TYPE_CHECKING:
    from moe2dense.data.blocks import Blocks
    from moe2dense.student.target.resolve import Target
    from moe2dense.teacher.model import Teacher

# N blocks, S block length, T = N * S tokens, H hidden, C channels kept, L layers
DEPTH = ("influence", "alternate")


class Importance(Observer):
    """Over the real tokens: `channels` [H], mean |input of the FFN| summed over layers; `influence` [L], 1 - cos(layer's input, output)."""

    def __init__(self) -> None:
        self.channels: Tensor | None = None
        self.influence: list[float] = []

    def layer(self, layer: LayerPass) -> None:
        """Add one layer."""
        mean = layer.x[layer.token_mask].abs().double().mean(0).cpu()
        self.channels = mean if self.channels is None else self.channels + mean
        before, after = (h.reshape(-1, h.shape[-1])[layer.token_mask] for h in (layer.hidden_in, layer.hidden_out))
        self.influence.append(1 - float(cosine_similarity(before, after, dim=-1).double().mean()))


def importance(teacher: "Teacher", data: "Blocks", heads: HeadEnergy | None = None) -> Importance:
    """Scores of channels and layers, and of attention heads where `heads` is given, from one pass over `data`."""
    found = Importance()
    with heads.watching(teacher) if heads else contextlib.nullcontext():
        observers = [found, *([heads] if heads else [])]
        teacher.run(data.input_ids, data.attention_mask, data.document_ids, observers=observers, logits=False)
    return found


def best_layers(influence: list[float], count: int) -> list[int]:
    """The `count` layers of most influence, in order; the first and the last always stay."""
    inner = sorted(range(1, len(influence) - 1), key=lambda i: influence[i], reverse=True)
    ends = [0, len(influence) - 1][: max(1, min(2, count))]
    return sorted({*ends, *inner[: max(0, count - len(ends))]})


def alternate_layers(layers: int, count: int) -> list[int]:
    """`count` of `layers` at equal distances, the first and the last included (DistilBERT: Sanh et al., arXiv 1910.01108)."""
    if count == 1:
        return [0]
    return [round(i * (layers - 1) / (count - 1)) for i in range(count)]


@dataclass(frozen=True)
class Cut:
    """What of the teacher the student keeps: channels [C] of the residual stream and layers, both ascending, and heads by teacher layer."""

    keep: Tensor
    layers: tuple[int, ...]
    heads: dict[int, KeptHeads] = field(default_factory=dict)
    rules: Mapping[str, str] = field(default_factory=dict)  # the host card's `heads`

    def source(self, name: str) -> str:
        """The name in the teacher of a student's tensor: its layer is counted among those that are kept."""
        return re.sub(r"\blayers\.(\d+)\.", lambda m: f"layers.{self.layers[int(m[1])]}.", name)

    def tensor(self, source: str, value: Tensor, shape: torch.Size) -> Tensor:
        """A teacher's tensor cut to the student's `shape`: kept heads by the host's rules, then along every dimension whose size
        still differs the kept channels."""
        place = split_layer(source)
        if place and place[0] in self.heads:
            value = self.heads[place[0]].cut(place[1], value, self.rules)
        for dim, (mine, theirs) in enumerate(zip(shape, value.shape, strict=True)):
            if mine != theirs:
                assert mine == len(self.keep), f"no rule takes {source} from {list(value.shape)} to {list(shape)}"
                value = value.index_select(dim, self.keep)
        return value

    def layer(self, made: LayerPass) -> LayerPass:
        """A layer's pass as the student sees it: residual stream, block and experts in the kept channels."""
        if len(self.keep) == made.hidden_in.shape[-1]:
            return made
        cut: dict[str, Any] = {
            name: getattr(made, name)[..., self.keep] for name in ("hidden_in", "hidden_out", "x", "y")
        }
        if made.experts is not None:
            cut["experts"] = CutExperts(made.experts, self.keep)
        view = replace(made, **cut)
        view.__dict__["norm_factor"] = norm_factor(made.hidden_in, self.keep, made.token_mask)
        if made.sparse:
            folded = [CutFFN(p.weights, self.keep, mean_gate(p.gate, made)) for p in made.shared]
            view.__dict__["shared"] = [SharedFFN(ffn, None) for ffn in folded]  # type: ignore[arg-type]
        else:
            view.__dict__["dense"] = CutFFN(made.dense, self.keep)
        return view


def norm_factor(hidden: Tensor, keep: Tensor, token_mask: Tensor) -> float:
    """Mean over real tokens of rms(kept channels) / rms(all channels): what a norm's weight must be multiplied with, once its
    mean square runs over the kept channels of hidden [N, S, H] only."""
    flat = hidden.reshape(-1, hidden.shape[-1])[token_mask].double()
    return float((flat[:, keep].pow(2).mean(1) / flat.pow(2).mean(1).clamp_min(1e-30)).sqrt().mean())


def scale_norms(module: nn.Module, channels: int, factor: float) -> None:
    """Multiply the weights of a module's norms over `channels` channels."""
    with torch.no_grad():
        for name, value in module.named_parameters():
            if "norm" in name and value.shape == (channels,):
                value.mul_(factor)


def mean_gate(gate: Tensor | None, made: LayerPass) -> float:
    """Mean over the real tokens of a shared expert's sigmoid gate; 1 where it has none."""
    return 1.0 if gate is None else float(torch.sigmoid(made.x[made.token_mask] @ gate.to(made.x)).mean())


def cut_for(target: "Target", teacher: "Teacher", data: "Blocks", depth: str = "influence") -> Cut | None:
    """What to keep for a target's `geometry` (hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads); None where it
    takes nothing away.

    depth: which layers stay, those of most influence or `alternate` ones. Costs one pass of the teacher over `data`, unless alternate layers
    are all that is asked for. Raises UserError for another `depth`.
    """
    if depth not in DEPTH:
        raise UserError(f"build.depth is {depth!r}; choose one of {', '.join(DEPTH)}")
    geometry, layers, shape = target.geometry, len(teacher.body.layers), target.teacher
    width, count = geometry.get("hidden_size", teacher.hidden_size), geometry.get("num_hidden_layers", layers)
    queries = geometry.get("num_attention_heads", shape.num_attention_heads)
    groups = geometry.get("num_key_value_heads", shape.num_key_value_heads)
    fewer_heads = (queries, groups) != (shape.num_attention_heads, shape.num_key_value_heads)
    if width >= teacher.hidden_size and count >= layers and not fewer_heads:
        return None
    keep, kept = torch.arange(teacher.hidden_size), tuple(alternate_layers(layers, count))
    heads: dict[int, KeptHeads] = {}
    if scored(geometry, depth):
        energy = HeadEnergy(shape.num_attention_heads, target.card.heads) if fewer_heads else None
        found = importance(teacher, data, energy)
        assert found.channels is not None
        keep = found.channels.topk(width).indices.sort().values
        if depth == "influence":
            kept = tuple(best_layers(found.influence, count))
        if energy:
            heads = {i: best_heads(e, shape.num_key_value_heads, queries, groups) for i, e in energy.energy.items()}
    return Cut(keep, kept, heads, target.card.heads)


class CutFFN:
    """An FFN that reads and writes only the kept channels; `scale` multiplies its output."""

    def __init__(self, ffn: GatedFFN, keep: Tensor, scale: float = 1.0):
        self.ffn, self.keep, self.scale = ffn, keep, scale
        self.gate_bias, self.up_bias = ffn.gate_bias, ffn.up_bias
        self.down_bias = None if ffn.down_bias is None else ffn.down_bias[keep] * scale

    @property
    def gating(self) -> Any:
        return getattr(self.ffn, "gating")  # noqa: B009

    @property
    def gate(self) -> Tensor:
        return self.ffn.gate[:, self.keep]

    @property
    def up(self) -> Tensor:
        return self.ffn.up[:, self.keep]

    @property
    def down(self) -> Tensor:
        return self.ffn.down[self.keep] * self.scale


class CutExperts:
    """A layer's routed experts in the kept channels, read on demand."""

    def __init__(self, experts: Experts, keep: Tensor):
        self.experts, self.keep = experts, keep

    def __len__(self) -> int:
        return len(self.experts)

    def __getitem__(self, expert: int, /) -> CutFFN:
        return CutFFN(self.experts[expert], self.keep)
