"""How much the teacher writes on top of little text, by rule and as set."""

import json
from types import SimpleNamespace

import pytest

from moe2dense.config.schema import RunConfig
from moe2dense.config.toml import merge_flags
from moe2dense.config.training import TrainConfig
from moe2dense.conversion.extra_text import extra_text, with_falling_features
from moe2dense.conversion.training_text import has_prompts
from moe2dense.data.options import DEFAULTS
from moe2dense.teacher.load import load_teacher


def settings(**flags):
    return merge_flags(RunConfig(), {name.replace("__", "."): value for name, value in flags.items()})


@pytest.mark.parametrize(
    ("tokens", "parameters", "expected"),
    [
        (98_000, 3_200_000, (0.0, 1.0)),  # one pass: nothing to replace
        (200_000, 3_200_000, (1.0, 1.5)),  # two passes of the text: one, one of new text, and half as many steps more
        (300_000, 3_200_000, (2.0, 1.5)),
        (490_000, 3_200_000, (4.0, 1.5)),  # five passes of the text: one, and four of new text; half as many more
        (1_000_001, 3_200_000, (0.0, 5.0)),  # no longer little
        (900_000, 7_000_000_000, (0.0, 1.0)),
    ],
)
def test_passes_are_replaced_by_new_text(tokens, parameters, expected):
    assert extra_text(settings(), tokens, parameters, resident=True) == pytest.approx(expected)


@pytest.mark.parametrize(
    "flags",
    [
        {"train__epochs": 5.0}, {"train__select": "coreset:0.5"}, {"train__targets": "t"}, {"train__regime": "on-policy"},
        {"write__share": 0.5}, {"write__extra": 0.0}, {"stages": "4m,3.2m"}, {"endpoint__url": "http://x"},
    ],
)  # fmt: skip
def test_the_rule_leaves_other_ways_alone(flags):
    assert extra_text(settings(**flags), 490_000, 3_200_000, resident=True)[0] == 0


@pytest.mark.parametrize(
    ("features", "extra", "expected"),
    [("auto", 4.0, "auto-falling"), ("auto", 0.0, "auto"), ("", 4.0, ""), ("mse:last:1@2", 4.0, "mse:last:1@2")],
)
def test_features_by_rule_fade_where_the_teacher_writes_text(features, extra, expected):
    assert with_falling_features(TrainConfig(features=features), extra).features == expected


def test_a_teacher_on_disk_writes_nothing_by_rule():
    assert extra_text(settings(), 490_000, 3_200_000, resident=False) == (0.0, 5.0)


def test_what_is_set_is_kept():
    assert extra_text(settings(write__extra=3.0), 490_000, 3_200_000, resident=False) == (3.0, 1.875)
    assert extra_text(settings(write__extra=9.0), 490_000, 3_200_000, resident=False) == (9.0, 1.0)
    assert extra_text(settings(write__extra=3.0, train__epochs=4.0), 490_000, 3_200_000, True) == (3.0, 4.0)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"text": "The sea was calm, and the captain slept."}, True),
        ({"messages": [{"role": "assistant", "content": "Nobody asked me anything."}]}, False),
    ],
)
def test_text_that_nothing_can_continue_is_noticed(tiny, tmp_path, record, expected):
    (tmp_path / "t.jsonl").write_text((json.dumps(record) + "\n") * 40)
    config = settings(data__path=str(tmp_path / "t.jsonl"))
    plan, text = SimpleNamespace(block=64), SimpleNamespace(options=DEFAULTS)
    assert has_prompts(config, plan, text, load_teacher(tiny, memory="300MB")) is expected
