"""Read a field of a config, also of one that has other values for some of its layers. Nothing here imports torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_BY_LAYER = "per_layer_config"  # layer = the fields that differ there


def config_field(config: "PreTrainedConfig", name: str, default: Any = None) -> Any:
    """Return a field of a config; of a field that differs by layer, the value of the layers that have none of their own.

    transformers refuses to read such a field by its name alone, and shows what differs as an object of its own.
    """
    if name == _BY_LAYER or name in (config.per_layer_attributes or ()):
        return config.to_dict().get(name, default)
    return getattr(config, name, default)
