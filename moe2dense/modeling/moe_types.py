"""Find the MoE language models that the installed transformers knows, by the fields of its config classes, not by a list of names."""

import inspect
import re
from dataclasses import dataclass
from typing import cast

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

# a field that counts routed experts: num_experts, num_local_experts, n_routed_experts, moe_num_experts
_COUNT = re.compile(r"(moe_)?(num|n)_(local_|routed_)?experts")


@dataclass(frozen=True)
class MoEType:
    """One architecture whose config counts experts.

    model_type: as in config.json; folder: that of its code in transformers; wrappers: multimodal architectures that have it as their
    language model; causal: whether transformers has a causal language model of it alone.
    """

    model_type: str
    folder: str
    wrappers: tuple[str, ...]
    causal: bool


def counts_experts(config_class: type[PreTrainedConfig]) -> bool:
    """Return whether a config class, or one that it is made from, has a field that counts routed experts."""
    return any(_COUNT.fullmatch(name) for cls in config_class.__mro__ for name in inspect.get_annotations(cls))


def parts_of(config_class: type[PreTrainedConfig]) -> set[type[PreTrainedConfig]]:
    """Return the classes of the configs inside a config, however deep."""
    parts: set[type[PreTrainedConfig]] = set()
    waiting = [config_class]
    while waiting:
        for part in _inside(waiting.pop()) - parts:
            parts.add(part)
            waiting.append(part)
    return parts


def _inside(config_class: type[PreTrainedConfig]) -> set[type[PreTrainedConfig]]:
    """Return the classes of the configs that stand in a config; where any text model may, its default one does."""
    named = cast(dict[str, type], config_class.sub_configs)
    found = {part for part in named.values() if issubclass(part, PreTrainedConfig)}
    for default in getattr(config_class, "sub_configs_defaults", {}).values():
        if default.model_type in CONFIG_MAPPING:
            found.add(CONFIG_MAPPING[default.model_type])
    return found


def moe_types() -> list[MoEType]:
    """Return every MoE architecture of the installed transformers, by name."""
    classes: dict[str, type[PreTrainedConfig]] = {name: CONFIG_MAPPING[name] for name in CONFIG_MAPPING}
    known = set(classes.values())
    parts = {name: parts_of(config) for name, config in classes.items()}
    # a part that has no name of its own belongs to the architecture that it stands in
    own = {name: {config} | (parts[name] - known) for name, config in classes.items()}
    sparse = {name for name in classes if any(counts_experts(config) for config in own[name])}
    return [
        MoEType(
            name,
            classes[name].__module__.split(".")[-2],
            tuple(sorted(other for other in classes if other != name and classes[name] in parts[other])),
            classes[name] in MODEL_FOR_CAUSAL_LM_MAPPING,
        )
        for name in sorted(sparse)
    ]
