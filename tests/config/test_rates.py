"""Learning rates by width and depth."""

import pytest

from moe2dense.config.rates import heal_rate, layer_rate, model_rate, training_rate


def test_rates_within_a_layer_fall_with_the_hidden_size_and_rise_no_further_below():
    assert layer_rate(4e-3, 24) == layer_rate(4e-3, 192) == 4e-3
    assert layer_rate(4e-3, 4096) == pytest.approx(4e-4, rel=0.02)
    assert layer_rate(1e-3, 16 * 192) == pytest.approx(1e-3 / 8)


def test_rates_of_whole_models_fall_with_the_depth_too():
    assert model_rate(1e-3, 24, 2) == model_rate(1e-3, 192, 4) == 1e-3
    assert model_rate(1e-3, 192, 64) == pytest.approx(1e-3 / 4)
    assert model_rate(1e-3, 4096, 4) > 2 * model_rate(1e-3, 4096, 32)


def test_the_heal_falls_faster_with_the_depth():
    assert heal_rate(1e-3, 192, 4) == 1e-3
    assert heal_rate(1e-3, 192, 64) == pytest.approx(1e-3 / 16)
    assert heal_rate(1e-3, 576, 30) == pytest.approx(8.5e-5, rel=0.01)


def test_large_students_train_at_the_rate_that_pruned_models_are_distilled_with():
    assert training_rate(192, 4) == 1e-3
    assert training_rate(4096, 32) == pytest.approx(1e-4, rel=0.02)
    assert training_rate(4096, 32, lora=True) == pytest.approx(3e-4, rel=0.02)
