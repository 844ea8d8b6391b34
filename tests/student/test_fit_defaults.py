"""Lengths and rates of the build's fits that the settings leave to rules."""

import pytest

from moe2dense.config.rates import heal_rate, layer_rate
from moe2dense.config.schema import BuildConfig, RunConfig
from moe2dense.config.toml import merge_flags
from moe2dense.student.fit_defaults import heal_passes, local_steps, settle_fits


def test_local_steps_are_as_wanted_or_by_what_follows():
    assert local_steps(7, True, 100, 512) == local_steps(7, False, 100, 512) == 7
    assert local_steps(0, True, 49_152, 512) == 600
    assert local_steps(0, False, 49_152, 512) == 1200


@pytest.mark.parametrize(
    ("tokens", "batch", "steps"), [(2048, 512, 56), (8192, 512, 224), (8192, 1024, 112), (1, 512, 1)]
)
def test_little_text_is_passed_fourteen_times_at_most(tokens, batch, steps):
    assert local_steps(0, True, tokens, batch) == steps


def test_the_heal_is_short_where_training_follows():
    assert 0 < heal_passes(-1, trained=True) < heal_passes(-1, trained=False)
    assert heal_passes(0, trained=True) == heal_passes(0, trained=False) == 0
    assert heal_passes(3, trained=True) == heal_passes(3, trained=False) == 3


def test_every_rule_is_settled_and_what_is_set_stays():
    config = settle_fits(BuildConfig(), 576, 30, 16_384, healed=True)
    assert (config.local_steps, config.heal_epochs) == (448, 16)
    assert (config.local_lr, config.layer_lr) == (layer_rate(4e-3, 576), layer_rate(1e-3, 576))
    assert config.heal_lr == heal_rate(1e-3, 576, 30)
    own = {"local_steps": 5, "heal_epochs": 2.0, "local_lr": 0.1, "layer_lr": 0.2, "heal_lr": 0.3}
    given = merge_flags(RunConfig(), {f"build.{key}": value for key, value in own.items()}).build
    settled = settle_fits(given, 576, 30, 16_384, healed=True)
    assert {key: getattr(settled, key) for key in own} == own
