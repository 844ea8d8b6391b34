"""Targets in memory: the teacher's final hidden states, computed in one pass, or a model that is asked anew."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe2dense.data.blocks import Blocks
from moe2dense.distillation.targets.protocols import HiddenStates, Targets
from moe2dense.distillation.targets.record import FeatureRecorder, RoutingRecorder
from moe2dense.errors import UserError
from moe2dense.losses.teacher_rows import HiddenRows
from moe2dense.modeling.decoder import decoder_layers
from moe2dense.modeling.forward import evaluation_mode, final_hidden, model_inputs
from moe2dense.modeling.head import OutputHead, model_head
from moe2dense.modeling.hooks import captured, feature_name
from moe2dense.teacher.kinds import AnyTeacher
from moe2dense.teacher.model import Teacher
from moe2dense.teacher.observer import Observer
from moe2dense.weights.finite import refuse_not_finite

# N blocks, S block length, H teacher hidden, V vocabulary

Progress = Callable[..., None]


@dataclass
class HiddenTargets:
    """hidden [N, S, H], the teacher's final normed hidden states, and head, which turns them into logits.

    features: of some of the teacher's layers, [N, S, ...] by name (modeling/hooks.py); layers: how many it has; routing: how
    it routed each token, [N, S] by name (distillation/targets/record.py).
    """

    hidden: Tensor
    head: OutputHead
    features: dict[str, Tensor] = field(default_factory=dict)
    layers: int = 0
    routing: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, rows: slice) -> "HiddenTargets":
        features, routing = ({k: v[rows] for k, v in named.items()} for named in (self.features, self.routing))
        return HiddenTargets(self.hidden[rows], self.head, features, self.layers, routing)

    @property
    def width(self) -> int:
        """The teacher's hidden size."""
        return self.hidden.shape[-1]

    def token_weights(self, name: str) -> Tensor:
        """Return [N, S]: how the teacher routed each token. Raises UserError where it was not recorded."""
        if name not in self.routing:
            raise UserError(f"these targets hold no {name}; compute them with routing=[{name!r}]")
        return self.routing[name]

    def batch(self, indices: Sequence[int]) -> HiddenRows:
        """Return the teacher at every position of some blocks, in their order."""
        rows = list(indices)
        features = {k: v[rows].flatten(0, 1) for k, v in self.features.items()}
        return HiddenRows(self.hidden[rows].flatten(0, 1), self.head, features or None)


@dataclass
class ResidentTargets:
    """A transformers model that answers batch by batch while the student trains: no storage, one more forward pass.

    features: of its layers that are wanted too, by name.
    """

    model: PreTrainedModel
    blocks: Blocks
    features: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.features = tuple(feature_name(f) for f in self.features)
        self.head = model_head(self.model)
        self.layers, self.width = len(decoder_layers(self.model)), self.head.weight.shape[1]

    def __len__(self) -> int:
        return len(self.blocks)

    @torch.no_grad()
    def batch(self, indices: Sequence[int]) -> HiddenRows:
        """Run the model on some blocks; return it at every position of them, in their order."""
        inputs = model_inputs(self.blocks[list(indices)], self.head.weight.device)
        with evaluation_mode(self.model), captured(self.model, self.features) as features:
            hidden = final_hidden(self.model, inputs)
        return HiddenRows(hidden.flatten(0, 1), self.head, features or None)


@torch.no_grad()
def hidden_targets(
    teacher: AnyTeacher,
    blocks: Blocks,
    dtype: torch.dtype | None = None,
    batch: int = 8,
    features: Sequence[str | int] = (),
    routing: Sequence[str] = (),
    progress: Progress | None = None,
) -> HiddenTargets:
    """Compute the teacher's final hidden states on all blocks, in memory: one streamed pass of a Teacher.

    teacher: a Teacher, or a transformers model, which is run `batch` blocks at a time. dtype: of what is kept, by default the
    teacher's compute dtype (float32 on a CPU). features: of its layers, by name or, for the residual stream, number; routing:
    names of token weights. Raises UserError for what the teacher cannot give, and for answers that are not finite.
    """
    names = [feature_name(f) for f in features]
    if isinstance(teacher, Teacher):
        return _streamed_targets(teacher, blocks, dtype, names, routing)
    if routing:
        raise UserError(
            "token weights come from the router of a streamed teacher; pass what load_teacher returns, or targets written by it"
        )
    resident = ResidentTargets(teacher, blocks, names)
    parts: dict[str, list[Tensor]] = {n: [] for n in ("", *names)}  # "" = the final hidden states
    for start in range(0, len(blocks), batch):
        rows = range(start, min(start + batch, len(blocks)))
        answer = resident.batch(rows)
        for name, states in ({"": answer.hidden} | (answer.features or {})).items():
            parts[name].append(states.to("cpu", dtype or states.dtype).unflatten(0, (len(rows), -1)))
        if progress:
            progress("targets", rows.stop, len(blocks))
    joined = {name: torch.cat(states) for name, states in parts.items()}
    counted = joined[""][blocks.loss_mask()]
    refuse_not_finite(counted, "teacher: what its last layer gives on this text", "see that its weights are finite")
    return HiddenTargets(joined.pop(""), resident.head, joined, resident.layers)


def _streamed_targets(
    teacher: Teacher, blocks: Blocks, dtype: torch.dtype | None, names: list[str], routing: Sequence[str]
) -> HiddenTargets:
    features, router = FeatureRecorder(names, dtype or teacher.dtype), RoutingRecorder(routing)
    observers: list[Observer] = [o for o, wanted in ((features, names), (router, routing)) if wanted]
    masks = (blocks.attention_mask, blocks.document_ids)
    with features.attached(teacher):
        output = teacher.run(blocks.input_ids, *masks, observers=observers, logits=False)
    hidden = output.hidden_states if dtype is None else output.hidden_states.to(dtype)
    layers = teacher.config.get_text_config().num_hidden_layers
    weights = router.token_weights(len(blocks)) if routing else {}
    return HiddenTargets(hidden, teacher.head, features.features(len(blocks)), layers, weights)


def as_targets(source: Targets | HiddenStates, blocks: Blocks, what: str = "targets") -> Targets:
    """Return targets as they are, and targets made of anything with hidden [N, S, H] and a head.

    Raises UserError for anything else, and when there are not as many as blocks.
    """
    if isinstance(source, Targets):
        targets = source
    elif isinstance(source, HiddenStates) and source.hidden is not None and source.head is not None:
        targets = HiddenTargets(source.hidden, source.head)
    else:
        raise UserError(f"{what} must be stored targets or hidden states with a head; found {type(source).__name__}")
    if len(targets) != len(blocks):
        raise UserError(
            f"{what} cover {len(targets)} blocks but the data has {len(blocks)}; they must be the same text"
        )
    return targets
