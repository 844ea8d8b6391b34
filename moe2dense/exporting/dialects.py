"""Write config.json so that other programs read the same model from it: fields that transformers 5 no longer writes.

transformers 4, vLLM and mlx-lm read `rope_theta`, `rope_scaling`, `partial_rotary_factor` and `torch_dtype`; where they are missing
they take a default of their own, without an error. transformers 5 reads them too, and says the same with `rope_parameters` and `dtype`.
"""

from typing import Any

from moe2dense.families.cards import student_cards

_OUTSIDE = ("rope_theta", "partial_rotary_factor")  # of rope_parameters: fields of their own in the older dialect


def older_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that say in the older dialect what a config.json of transformers 5 says, and what the host's card sets.

    What the card sets takes the place of what a teacher's config had there: transformers does not read it.
    """
    fields = _rope_fields(config.get("rope_parameters"))
    if "dtype" in config:
        fields["torch_dtype"] = config["dtype"]
    return {name: value for name, value in fields.items() if name not in config} | _host_fields(config)


def _rope_fields(rope: dict[str, Any] | None) -> dict[str, Any]:
    """Return rope_theta, rope_scaling and partial_rotary_factor of `rope_parameters`.

    Parameters that differ by the kind of layer have no common older form, and give nothing.
    """
    if not rope or any(isinstance(value, dict) for value in rope.values()):
        return {}
    fields = {name: rope[name] for name in _OUTSIDE if rope.get(name) is not None}
    rest = {k: v for k, v in rope.items() if k not in _OUTSIDE}
    fields["rope_scaling"] = (
        rest if rest.keys() - {"rope_type"} or rest.get("rope_type", "default") != "default" else None
    )
    return fields


def _host_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that the host's card has for other programs; "=field" stands for another field's value."""
    cards = student_cards().values()
    card = next((c for c in cards if c.model_type == config.get("model_type") and not c.host), None)
    extra = card.other_fields if card is not None else {}
    return {
        name: config[value[1:]] if isinstance(value, str) and value.startswith("=") else value
        for name, value in extra.items()
    }
