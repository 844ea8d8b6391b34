"""Targets kept in memory: the teacher's final hidden states, computed in one pass, or a resident teacher asked anew."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from moe2dense.data.blocks import Blocks
from moe2dense.distillation.targets.record import FeatureRecorder, RoutingRecorder
from moe2dense.errors import UserError
from moe2dense.losses.teacher_rows import HiddenRows, TeacherRows
from moe2dense.modeling.forward import final_hidden, model_inputs
from moe2dense.modeling.head import model_head
from moe2dense.modeling.hooks import captured, decoder_layers, feature_name

# N blocks, S block length, H teacher hidden, V vocabulary

Progress = Callable[..., None]


class Targets(Protocol):
    """What the loss needs of the teacher, for N blocks."""

    def __len__(self) -> int: ...
    def batch(self, indices: Sequence[int]) -> TeacherRows:
        """The teacher at every position of some blocks, in their order."""
        ...


@dataclass
class HiddenTargets:
    """hidden [N, S, H], the teacher's final normed hidden states, and head, which turns them into logits.

    features: what else is known of some of the teacher's layers, [N, S, ...] by name (modeling/hooks.py); layers: how many it
    has; routing: how it routed each token, [N, S] by name (distillation/targets/record.py).
    """

    hidden: Tensor
    head: Any
    features: dict[str, Tensor] = field(default_factory=dict)
    layers: int = 0
    routing: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, rows: slice) -> "HiddenTargets":
        features, routing = ({k: v[rows] for k, v in found.items()} for found in (self.features, self.routing))
        return HiddenTargets(self.hidden[rows], self.head, features, self.layers, routing)

    @property
    def width(self) -> int:
        """The teacher's hidden size."""
        return self.hidden.shape[-1]

    def token_weights(self, name: str) -> Tensor:
        """[N, S]: how the teacher routed each token (distillation/targets/record.py). Raises UserError where it was not recorded."""
        if name not in self.routing:
            raise UserError(f"these targets hold no {name}; compute them with routing=[{name!r}]")
        return self.routing[name]

    def batch(self, indices: Sequence[int]) -> HiddenRows:
        rows = list(indices)
        features = {k: v[rows].flatten(0, 1) for k, v in self.features.items()}
        return HiddenRows(self.hidden[rows].flatten(0, 1), self.head, features or None)


@dataclass
class ResidentTargets:
    """A transformers model that answers batch by batch while the student trains: no storage, one more forward pass."""

    model: Any
    blocks: Blocks
    features: Sequence[str | int] = ()  # what is wanted too, by name; a number is the residual stream after that layer

    def __post_init__(self) -> None:
        self.names = tuple(feature_name(f) for f in self.features)
        self.features = self.names
        self.head = model_head(self.model)
        self.layers, self.width = len(decoder_layers(self.model)), self.head.weight.shape[1]

    def __len__(self) -> int:
        return len(self.blocks)

    @torch.no_grad()
    def batch(self, indices: Sequence[int]) -> HiddenRows:
        device = self.head.weight.device
        training = self.model.training
        self.model.eval()
        with captured(self.model, self.names) as found:
            hidden = final_hidden(self.model, model_inputs(self.blocks[list(indices)], device))
        self.model.train(training)
        return HiddenRows(hidden.flatten(0, 1), self.head, found or None)


@torch.no_grad()
def hidden_targets(
    teacher: Any,
    blocks: Blocks,
    dtype: torch.dtype | None = None,
    batch: int = 8,
    features: Sequence[str | int] = (),
    routing: Sequence[str] = (),
    progress: Progress | None = None,
) -> HiddenTargets:
    """The teacher's final hidden states on all blocks, in memory: one streamed pass of a Teacher.

    teacher: a Teacher, or a resident transformers model, which is run `batch` blocks at a time. dtype: of what is kept,
    by default the teacher's compute dtype (float32 on a CPU). features: what of its layers is kept too, by name or, for the
    residual stream, number; routing: how it routed each token. Raises UserError for what the teacher cannot give.
    """
    names = [feature_name(f) for f in features]
    if hasattr(teacher, "run"):
        return _streamed(teacher, blocks, dtype, names, routing)
    if routing:
        raise UserError(
            "token weights come from the router of a streamed teacher; pass what load_teacher returns, or targets written by it"
        )
    resident = ResidentTargets(teacher, blocks, names)
    parts, states = [], {n: [] for n in names}
    for start in range(0, len(blocks), batch):
        rows = range(start, min(start + batch, len(blocks)))
        answer = resident.batch(rows)
        for found, kept in ((answer.hidden, parts), *((v, states[k]) for k, v in (answer.features or {}).items())):
            kept.append(found.to("cpu", dtype or found.dtype).unflatten(0, (len(rows), -1)))
        if progress:
            progress("targets", rows.stop, len(blocks))
    return HiddenTargets(torch.cat(parts), resident.head, {k: torch.cat(v) for k, v in states.items()}, resident.layers)


def _streamed(
    teacher: Any, blocks: Blocks, dtype: torch.dtype | None, names: list[str], routing: Sequence[str]
) -> HiddenTargets:
    recorder, router = FeatureRecorder(names, dtype or teacher.dtype), RoutingRecorder(routing)
    observers = [o for o, wanted in ((recorder, names), (router, routing)) if wanted]
    masks = (blocks.attention_mask, blocks.document_ids)
    with recorder.attached(teacher):
        out = teacher.run(blocks.input_ids, *masks, observers=observers, logits=False)
    hidden = out.hidden_states if dtype is None else out.hidden_states.to(dtype)
    layers = teacher.config.get_text_config().num_hidden_layers
    weights = router.found(len(blocks)) if routing else {}
    return HiddenTargets(hidden, teacher.head, recorder.found(len(blocks)), layers, weights)


def as_targets(source: Any, blocks: Blocks, what: str = "targets") -> Targets:
    """Targets from whatever holds them: targets, or anything with hidden [N, S, H] and a head.

    Raises UserError when there are not as many as blocks.
    """
    found = source
    if not hasattr(source, "batch"):
        if getattr(source, "hidden", None) is None or getattr(source, "head", None) is None:
            raise UserError(
                f"{what} must be stored targets or hidden states with a head; found {type(source).__name__}"
            )
        found = HiddenTargets(source.hidden, source.head)
    if len(found) != len(blocks):
        raise UserError(f"{what} cover {len(found)} blocks but the data has {len(blocks)}; they must be the same text")
    return found
