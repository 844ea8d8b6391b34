"""What can be changed so that training takes less memory, the least harmful first."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from moe2dense.config.training import TrainConfig

_CHECKPOINTING = {"gradient_checkpointing": True}
_HALF = _CHECKPOINTING | {"weights": "bfloat16", "optimizer": "adamw"}
_IN_BACKWARD = {"step_in_backward": True}
_FULL: tuple[dict[str, Any], ...] = (
    {},
    _CHECKPOINTING,
    _HALF,
    _HALF | {"optimizer": "adamw-8bit"},
    _HALF | {"optimizer": "adamw-8bit"} | _IN_BACKWARD,
    _HALF | {"optimizer": "adafactor"} | _IN_BACKWARD,
    _HALF | {"offload": True} | _IN_BACKWARD,
)
# Many CPUs multiply bfloat16 tens of times slower than float32, so it comes last there; and they have no second memory to offload to.
_EIGHT_BIT = _CHECKPOINTING | {"optimizer": "adamw-8bit"}
_ADAFACTOR = {"optimizer": "adafactor"} | _IN_BACKWARD
_ON_CPU: tuple[dict[str, Any], ...] = (
    {},
    _CHECKPOINTING,
    _EIGHT_BIT,
    _EIGHT_BIT | _IN_BACKWARD,
    _CHECKPOINTING | _ADAFACTOR,
    _HALF | _ADAFACTOR,
)
_ON_CPU_IN_PARTS = (*_ON_CPU[:3], _HALF | _EIGHT_BIT)
_ADAPTERS: tuple[dict[str, Any], ...] = ({}, _CHECKPOINTING, _CHECKPOINTING | {"weights": "bfloat16"})
_WORDS = {
    "gradient_checkpointing": "activations are computed again in the backward pass",
    "weights": "weights rest in bfloat16 and are rounded at random",
    "optimizer": {
        "adamw": "AdamW takes the steps",
        "adamw-8bit": "AdamW's moments rest in eight bits",
        "adafactor": "Adafactor takes the steps",
    },
    "step_in_backward": "each tensor is stepped as soon as its gradient is there",
    "offload": "the optimiser's states and float32 weights rest in main memory",
}


def rungs(config: TrainConfig, block: int, on_gpu: bool, processes: int = 1) -> Iterator[dict[str, Any]]:
    """Yield what may be changed of `config`, each more than the one before; what is set already stays as it is.

    block: tokens of a block. on_gpu: whether the weights train there; on a CPU they rest in bfloat16 only where nothing else is left.
    Steps in the backward pass need a whole step in one pass, and one process.
    """
    whole_step = max(1, config.batch // block) <= config.micro_batch and processes == 1
    ladder = _FULL if on_gpu else _ON_CPU if whole_step else _ON_CPU_IN_PARTS
    standard = TrainConfig()
    for changes in _ADAPTERS if config.lora else ladder:
        if changes.get("step_in_backward") and not whole_step:
            continue
        if all(getattr(config, key) in (value, getattr(standard, key)) for key, value in changes.items()):
            yield changes


def changed(config: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    """Return `config` with these changes."""
    return replace(config, **changes)


def in_words(changes: dict[str, Any], named: bool = True) -> str:
    """Say what was changed: "activations are ...; AdamW's moments ...", with the settings in brackets where `named`."""
    parts = []
    for key, value in changes.items():
        words = _WORDS[key]
        text = words[value] if isinstance(words, dict) else words
        setting = f" (train.{key} = {str(value).lower() if isinstance(value, bool) else value})"
        parts.append(text + setting * named)
    return "; ".join(parts)
