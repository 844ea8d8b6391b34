"""Write the config of the dense host, and say which teacher tensor each of its tensors comes from.

All layers of a student have FFNs of one width. Of the dense text models in transformers 5 only gemma3n takes a width for each
layer, and its layers (AltUp, Laurel, embeddings of their own) have tensors that no MoE family could fill.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moe2dense.errors import UserError
from moe2dense.families.cards import StudentCard
from moe2dense.families.fields import config_field

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_NOT_COPIED = {
    "model_type",
    "architectures",
    "dtype",
    "transformers_version",
    "quantization_config",
    "auto_map",
    "_name_or_path",
}
_NONE = object()
_HEAD_FIELDS = {"hidden_size", "num_attention_heads"}
# config fields that list something for each layer
_PER_LAYER = (
    "layer_types", "mlp_layer_types", "indexer_types", "no_rope_layers", "num_attention_heads_per_layer", "layer_rope_theta",
)  # fmt: skip


def head_dim(config: "PreTrainedConfig") -> int:
    """Return the width of one attention head, given or implied."""
    return config_field(config, "head_dim") or config.hidden_size // config.num_attention_heads


def _teacher_field(config: "PreTrainedConfig", name: str, card: StudentCard) -> Any:
    """Return a field of the teacher's config that the card asks for. Raises UserError where there is none."""
    value = config_field(config, name, _NONE)
    if value is _NONE:
        raise UserError(
            f"student card {card.name!r} takes the field {name!r} from the teacher, but a {config.model_type!r} config "
            f"has none; choose another host or correct the card"
        )
    return value


def _copied(teacher: "PreTrainedConfig", card: StudentCard) -> list[str]:
    """Return the names of the fields copied from the teacher; `*` stands for all that both configs have."""
    if card.copy != ("*",):
        return list(card.copy)
    from transformers import AutoConfig

    fields = teacher.to_dict()
    host_fields = fields if teacher.model_type == card.model_type else AutoConfig.for_model(card.model_type).to_dict()
    return [name for name in fields if (name in host_fields or name == "head_dim") and name not in _NOT_COPIED]


def _computed(teacher: "PreTrainedConfig", value: Any, card: StudentCard) -> Any:
    """Return the value of an entry of the card's `set`: itself, or "=field", "=range(field)", "=repeat(word, field)" of the teacher."""
    if not isinstance(value, str) or not value.startswith("="):
        return value
    if match := re.fullmatch(r"=range\((\w+)\)", value):
        return list(range(_teacher_field(teacher, match[1], card)))
    if match := re.fullmatch(r"=repeat\((\w+), (\w+)\)", value):
        return [match[1]] * _teacher_field(teacher, match[2], card)
    return _teacher_field(teacher, value[1:], card)


def _window_of_every_layer(teacher: "PreTrainedConfig", card: StudentCard) -> dict[str, Any]:
    """Return the host's layer types where it has some and the teacher has none.

    A family without layer types has one kind of attention: within its sliding window in every layer, or everywhere. A host that
    is left to derive its own would take them from other fields (Qwen3's `max_window_layers`).
    """
    from transformers import AutoConfig

    if card.copy != ("*",) or "layer_types" in teacher.to_dict():
        return {}
    if "layer_types" not in AutoConfig.for_model(card.model_type).to_dict():
        return {}
    kind = "full_attention" if getattr(teacher, "sliding_window", None) is None else "sliding_attention"
    return {"layer_types": [kind] * teacher.num_hidden_layers}


def dense_config(
    teacher: "PreTrainedConfig", card: StudentCard, width: int, layers: Sequence[int] | None = None, **geometry: Any
) -> "PreTrainedConfig":
    """Return the host's config: what the card copies from the teacher, the FFN width, then `geometry` (pruned or named sizes).

    All layers share one FFN width: no host here takes one for each layer, and neurons padded with zeros would save nothing.
    layers: which of the teacher's layers the student has, where it has fewer; by default the first ones.
    Raises UserError when the card names a field that the teacher's config does not have.
    """
    from transformers import AutoConfig

    from moe2dense.modeling.internals import causal_model_class

    fields = {name: _teacher_field(teacher, name, card) for name in _copied(teacher, card)}
    fields |= {name: _teacher_field(teacher, source, card) for name, source in card.rename.items()}
    fields |= {name: _computed(teacher, value, card) for name, value in card.set.items()}
    if (
        card.copy == ("*",)
        and "head_dim" not in fields
        and "head_dim" in AutoConfig.for_model(card.model_type).to_dict()
    ):
        fields["head_dim"] = head_dim(teacher)  # the host's default is a number of its own
    if _HEAD_FIELDS & geometry.keys():
        fields["head_dim"] = head_dim(teacher)
    fields |= _window_of_every_layer(teacher, card)
    fields |= {card.width: width} | geometry
    for name in _PER_LAYER:
        each = fields.get(name)
        if each and len(each) != fields["num_hidden_layers"]:
            fields[name] = [each[i] for i in layers or range(fields["num_hidden_layers"])]
    config = AutoConfig.for_model(card.model_type, **fields)
    config.architectures = [causal_model_class(card.model_type)]
    return config


def tensor_map(card: StudentCard, student: "PreTrainedModel", teacher_names: set[str]) -> dict[str, str]:
    """Return {student tensor: teacher tensor} for every parameter and saved buffer outside the FFNs.

    A student name maps to the same name in the teacher, or through the card's `tensors` patterns (regular expressions
    on the student's name, replaced by the teacher's). Raises UserError naming the first tensor without a source.
    """
    sources: dict[str, str] = {}
    not_copied = "|".join([rf"{re.escape(card.ffn)}\.", *(rf"{re.escape(name)}$" for name in card.constants)])
    prefix = re.compile(rf"^model\.layers\.\d+\.({not_copied})")
    tied = set(getattr(student, "_tied_weights_keys", None) or ()) if student.config.tie_word_embeddings else set()
    for name in student.state_dict():
        if prefix.match(name) or name in tied:
            continue
        source = name
        for pattern, replacement in card.tensors.items():
            source = re.sub(pattern, replacement, source)
        if source not in teacher_names:
            raise UserError(
                f"the student's tensor {name!r} has no source in the teacher (looked for {source!r}); "
                f"correct `tensors` in the student card {card.name!r}"
            )
        sources[name] = source
    return sources
