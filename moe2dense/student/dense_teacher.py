"""Treat a dense teacher as an MoE of one expert, so that a student can become the teacher of a smaller one.

Every token passes the expert, which is the layer's own FFN, with weight 1.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedConfig

from moe2dense.errors import UserError
from moe2dense.families.cards import StudentCard, student_cards
from moe2dense.families.fields import config_field
from moe2dense.modeling.shape import Geometry, count_parameters, empty_model
from moe2dense.student.ffn.dense import GatedFFN
from moe2dense.student.target.dense_config import dense_config
from moe2dense.student.target.resolve import Target, parameter_budget, width_for, width_line
from moe2dense.teacher.experts import ExpertWeights, SharedFFN
from moe2dense.teacher.layer_pass import LayerPass
from moe2dense.teacher.routing import RoutingStats

if TYPE_CHECKING:
    from moe2dense.teacher.model import Teacher

# T tokens, H hidden, F width of the dense FFN
_CHUNK_TOKENS = 4096


class OneExpert:
    """A dense FFN where a layer's routed experts are expected."""

    def __init__(self, ffn: GatedFFN):
        self.ffn, self.width, self.gating = ffn, ffn.gate.shape[0], ffn.gating

    def __len__(self) -> int:
        return 1

    def __getitem__(self, expert: int, /) -> GatedFFN:
        if expert != 0:
            raise IndexError(f"expert {expert} of 1")
        return self.ffn


class _NoSharedFFN:
    """The FFNs besides the only expert: none."""

    def __init__(self, ffn: ExpertWeights):
        self.ffn = ffn

    def shared(self) -> list[SharedFFN]:
        return []

    def dense(self) -> ExpertWeights:
        return self.ffn


def single_expert(layer_pass: LayerPass, stats: RoutingStats) -> LayerPass:
    """Return a dense layer's pass as that of a sparse layer with one expert, and add its statistics to `stats`.

    The pass of a sparse layer is returned as it is.
    """
    if layer_pass.sparse:
        return layer_pass
    tokens = len(layer_pass.token_mask)
    ffn = layer_pass.dense
    view = replace(
        layer_pass,
        sparse=True,
        experts=OneExpert(ffn),  # type: ignore[arg-type]  # a layer's experts are only counted and read here
        router_logits=torch.zeros(tokens, 1),
        top_k_index=torch.zeros(tokens, 1, dtype=torch.int64),
        top_k_weights=torch.ones(tokens, 1),
        ffns=_NoSharedFFN(ffn),
    )
    rows = torch.nonzero(layer_pass.token_mask.cpu()).flatten()
    for part in rows.split(_CHUNK_TOKENS):
        hidden = ffn.hidden(layer_pass.x[part.to(layer_pass.x.device)].to(ffn.gate))
        output = torch.nn.functional.linear(hidden, ffn.down.to(hidden), ffn.down_bias)
        stats.expert(view, 0, part, hidden.new_ones(len(part)), hidden, output)
    stats.layer(view)
    return view


def dense_host(config: PreTrainedConfig) -> StudentCard:
    """Return the host card of a dense teacher's own architecture, with every field and tensor copied.

    Raises UserError where there is none.
    """
    kind = config.get_text_config().model_type
    card = next((c for c in student_cards().values() if c.model_type == kind and not c.host), None)
    if card is None:
        known = ", ".join(n for n, c in student_cards().items() if not c.host)
        raise UserError(f"teacher: no dense host has the architecture {kind!r}; known hosts: {known}")
    return replace(card, copy=("*",), rename={}, set={}, tensors={})


def dense_geometry(config: PreTrainedConfig) -> Geometry:
    """Return the shape of a dense teacher, its FFN counted as one expert."""
    config = config.get_text_config()
    card, total = dense_host(config), count_parameters(empty_model(config))
    width, layers = getattr(config, card.width), config.num_hidden_layers
    heads = config.num_attention_heads
    return Geometry(
        model_type=config.model_type, num_hidden_layers=layers, moe_layers=tuple(range(layers)),
        hidden_size=config.hidden_size, vocab_size=config.vocab_size, num_experts=1, top_k=1, expert_width=width,
        shared_width=0, dense_width=width, parameters=total, active_parameters=total,
        expert_parameters=3 * width * config.hidden_size,
        max_positions=getattr(config, "max_position_embeddings", 2048), num_attention_heads=heads,
        num_key_value_heads=config_field(config, "num_key_value_heads") or heads,
    )  # fmt: skip


def target_from(teacher: "Teacher", target: Target) -> Target:
    """Return a target resolved for an MoE as one for the dense teacher in its place: the same shape, other sources.

    Raises UserError when the dense teacher is smaller somewhere, so that its tensors could not fill the student.
    """
    if teacher.card is not None:
        return target
    card, config = dense_host(teacher.config), teacher.config.get_text_config()
    for name in ("hidden_size", "num_hidden_layers"):
        wanted = getattr(target.config, name)
        if wanted > getattr(config, name):
            raise UserError(
                f"--stages: a student with {name} {wanted} ({target.to}) cannot be built from one with "
                f"{getattr(config, name)}; order the stages from large to small"
            )
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    geometry = {
        name: config_field(target.config, name)
        for name in names
        if config_field(target.config, name) != config_field(config, name)
    }
    student = dense_config(config, card, target.width, **geometry)
    parameters = count_parameters(empty_model(student))
    return replace(target, card=card, config=student, parameters=parameters, teacher=dense_geometry(config))


def dense_target(to: str, config: PreTrainedConfig) -> Target:
    """Resolve `to` for a dense teacher: a parameter count or a share of it, reached by a narrower FFN.

    Raises UserError for anything else, and for a budget that no narrower FFN meets.
    """
    config = config.get_text_config()
    card, shape = dense_host(config), dense_geometry(config)
    budget = parameter_budget(to, shape)
    base, slope = width_line(config, card, {})
    width = width_for(budget, base, slope, shape)
    if not 0 < width < shape.expert_width:
        raise UserError(
            f"--to {to} asks for {budget} parameters of a dense teacher with {shape.parameters}, of which {base} lie outside "
            f"its FFNs; choose a size in between"
        )
    student = dense_config(config, card, width)
    return Target(to, f"{to} {card.title}", card, width, student, count_parameters(empty_model(student)), shape)
