"""Read the text tower of a multimodal model as the plain language model that computes the same of text alone.

transformers has no causal language model for some towers (Qwen3-VL-MoE, GLM-4.5V); the card of the plain family names them.
"""

from typing import TYPE_CHECKING

from moe2dense.families.cards import teacher_cards

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# fields of a config that are not the tower's sizes and settings, and what of RoPE only tells apart positions in images
_NOT_PASSED = ("model_type", "architectures", "transformers_version", "quantization_config", "auto_map")
_IMAGE_ROPE = "mrope_"


def as_text_model(config: "PreTrainedConfig") -> "PreTrainedConfig":
    """Return the config of the plain family that a multimodal config's text tower is a model of; any other config as it is."""
    from transformers import AutoConfig

    text = config.get_text_config()
    card = next((c for c in teacher_cards().values() if text.model_type in c.text_towers), None)
    if card is None:
        return config
    known = AutoConfig.for_model(card.model_type).to_dict()
    fields = {k: v for k, v in text.to_dict().items() if (k in known or k == "head_dim") and k not in _NOT_PASSED}
    rope = fields.get("rope_parameters") or {}
    fields["rope_parameters"] = {k: v for k, v in rope.items() if not k.startswith(_IMAGE_ROPE)}
    fields["tie_word_embeddings"] = bool(getattr(config, "tie_word_embeddings", False))
    plain = AutoConfig.for_model(card.model_type, **fields, **card.text_towers[text.model_type])
    if (quantization := getattr(config, "quantization_config", None)) is not None:
        plain.quantization_config = quantization
    return plain
