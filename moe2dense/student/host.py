"""The dense host architecture: its config and which teacher tensor each of its tensors comes from."""

import re
from typing import TYPE_CHECKING, Any

from moe2dense.cards import StudentCard
from moe2dense.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

_HEAD_FIELDS = {"hidden_size", "num_attention_heads"}


def head_dim(config: "PreTrainedConfig") -> int:
    """Width of one attention head, given or implied."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _teacher_field(teacher: "PreTrainedConfig", name: str, card: StudentCard) -> Any:
    if not hasattr(teacher, name):
        raise UserError(
            f"student card {card.name!r} takes the field {name!r} from the teacher, but a {teacher.model_type!r} config "
            f"has none; choose another host or correct the card"
        )
    return getattr(teacher, name)


def dense_config(teacher: "PreTrainedConfig", card: StudentCard, width: int, **geometry: Any) -> "PreTrainedConfig":
    """The host's config: what the card copies from the teacher, the FFN width, then `geometry` (pruned or named sizes).

    Raises UserError when the card names a field that the teacher's config does not have.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    fields = {name: _teacher_field(teacher, name, card) for name in card.copy}
    fields |= {mine: _teacher_field(teacher, theirs, card) for mine, theirs in card.rename.items()}
    for name, value in card.set.items():
        computed = isinstance(value, str) and value.startswith("=")
        fields[name] = _teacher_field(teacher, value[1:], card) if computed else value
    if _HEAD_FIELDS & geometry.keys() and "head_dim" in fields:
        fields["head_dim"] = head_dim(teacher)
    fields |= {card.width: width} | geometry
    per_layer = fields.get("layer_types")
    if per_layer and len(per_layer) != fields["num_hidden_layers"]:
        fields["layer_types"] = list(per_layer)[: fields["num_hidden_layers"]]
    config = AutoConfig.for_model(card.model_type, **fields)
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[card.model_type]
    config.architectures = [architecture] if isinstance(architecture, str) else [architecture[0]]
    return config


def empty_model(config: "PreTrainedConfig") -> "PreTrainedModel":
    """A causal language model of this config without storage (every parameter on the meta device)."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def count_parameters(model: "nn.Module") -> int:
    """Parameters of a model, tied ones counted once; works on meta tensors."""
    return sum(p.numel() for p in model.parameters())


def ffn_prefix(card: StudentCard, layer: int) -> str:
    """Path of a layer's dense FFN in the host, e.g. 'model.layers.3.mlp.'."""
    return f"model.layers.{layer}.{card.ffn}."


def tensor_map(card: StudentCard, student: "nn.Module", teacher_names: set[str]) -> dict[str, str]:
    """{student parameter: teacher parameter} for every tensor outside the FFNs.

    A student name maps to the same name in the teacher, or through the card's `tensors` patterns (regular expressions
    on the student's name, replaced by the teacher's). Raises UserError naming the first tensor without a source.
    """
    sources: dict[str, str] = {}
    prefix = re.compile(rf"^model\.layers\.\d+\.{re.escape(card.ffn)}\.")
    tied = set(getattr(student, "_tied_weights_keys", None) or ()) if student.config.tie_word_embeddings else set()
    for name, _ in student.named_parameters(remove_duplicate=False):
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
