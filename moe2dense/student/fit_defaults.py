"""Lengths and rates of the build's fits where the settings leave them to rules, from width and text. No torch is loaded here."""

from dataclasses import replace

from moe2dense.config.rates import heal_rate, layer_rate
from moe2dense.config.schema import BuildConfig

# steps of the local fit: what more of them bring, the heal brings sooner
LOCAL_STEPS_BEFORE_HEAL, LOCAL_STEPS_ALONE = 600, 1200
# passes of the local fit over the build's text: on 2k tokens its best step comes after 8 passes, on 8k after 4 to 12
MOST_LOCAL_PASSES = 14
# passes of the heal over the build's text: the training that follows does the same with more text
HEAL_PASSES_BEFORE_TRAINING, HEAL_PASSES_ALONE = 4.0, 16.0
# rates at hidden size 192 in 4 layers, where they were measured (config/rates.py)
LOCAL_RATE, LAYER_RATE, HEAL_RATE = 4e-3, 1e-3, 1e-3


def local_steps(wanted: int, healed: bool, tokens: int, batch: int) -> int:
    """Return the steps of the local fit of a layer's FFN: those wanted or, for 0, by whether a heal follows and by the text.

    tokens: of the build's text. batch: tokens of a step.
    """
    most = LOCAL_STEPS_BEFORE_HEAL if healed else LOCAL_STEPS_ALONE
    return wanted or max(1, min(most, MOST_LOCAL_PASSES * tokens // batch))


def heal_passes(wanted: float, trained: bool) -> float:
    """Return the passes of the heal over the build's text: those wanted or, below 0, a default by whether training follows."""
    return wanted if wanted >= 0 else (HEAL_PASSES_BEFORE_TRAINING if trained else HEAL_PASSES_ALONE)


def settle_fits(
    config: BuildConfig, hidden_size: int, layers: int, tokens: int, healed: bool, trained: bool = False
) -> BuildConfig:
    """Return the settings with every length and rate as a number, for a student of this hidden size and number of layers.

    tokens: of the build's text. healed, trained: whether a heal and training follow.
    """
    return replace(
        config,
        local_steps=local_steps(config.local_steps, healed, tokens, config.local_batch),
        heal_epochs=heal_passes(config.heal_epochs, trained),
        local_lr=config.local_lr or layer_rate(LOCAL_RATE, hidden_size),
        layer_lr=config.layer_lr or layer_rate(LAYER_RATE, hidden_size),
        heal_lr=config.heal_lr or heal_rate(HEAL_RATE, hidden_size, layers),
    )
