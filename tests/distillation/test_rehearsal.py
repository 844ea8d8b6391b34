"""The rehearsed memory of a training step, against what the same step holds when it is made."""

import pytest
from transformers import MistralConfig

from moe2dense.config.training import TrainConfig
from moe2dense.distillation import rehearsal
from moe2dense.distillation.rehearsal import rehearse
from moe2dense.modeling.shape import Geometry

SIZES = dict(vocab_size=512, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
CONFIG = MistralConfig(**SIZES, intermediate_size=700)
TEACHER = Geometry(
    "mixtral", 2, (0, 1), 256, 512, 8, 2, 300, 0, 0, 1, 1, 1, 2048
)  # fmt: skip
N = 2 * (256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 700) + 2 * 512 * 256


def peak(block=256, **options):
    return rehearse(CONFIG, TEACHER, TrainConfig(**{"batch": 1024} | options), block).peak


def test_weights_gradients_and_moments_are_there():
    small = rehearse(CONFIG, TEACHER, TrainConfig(batch=16), 16)
    assert small.model == pytest.approx(4 * N, rel=0.01)
    assert small.peak == pytest.approx(16 * N, rel=0.15)


def test_what_saves_memory_is_seen_to():
    plain = peak()
    assert peak(gradient_checkpointing=True) < plain
    assert peak(lora=4) < plain - 8 * N
    half = peak(weights="bfloat16", optimizer="adamw-8bit")
    assert half < plain - 6 * N
    assert peak(weights="bfloat16", optimizer="adafactor", step_in_backward=True) < half - N


def test_further_layers_are_added_for_the_rest():
    """As a rehearsal with all of them."""
    deep = MistralConfig(**SIZES | {"num_hidden_layers": 7}, intermediate_size=700)
    found = rehearse(deep, TEACHER, TrainConfig(batch=512), 256)
    rehearsal._MORE, more = 7, rehearsal._MORE
    try:
        whole = rehearsal._rehearsed(deep, TEACHER, TrainConfig(batch=512), 256, 0, False)
    finally:
        rehearsal._MORE = more
    assert found.model == whole.model and found.peak == pytest.approx(whole.peak, rel=0.02)


def test_no_memory_is_taken():
    wide = MistralConfig(**SIZES | {"hidden_size": 4096, "num_attention_heads": 32}, intermediate_size=14336)
    assert rehearse(wide, TEACHER, TrainConfig(batch=512), 512).peak > 6e9
