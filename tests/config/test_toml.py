import dataclasses

import pytest

from moe2dense.config.schema import RunConfig
from moe2dense.config.toml import differences, merge, merge_flags, read_config, write_config
from moe2dense.conversion.configure import configure
from moe2dense.errors import UserError


def test_round_trip(tmp_path):
    config = merge_flags(RunConfig(model="m", to="7b"), {"train.lr": 5e-4, "control": True, "data.path": "text"})
    (tmp_path / "c.toml").write_text(write_config(config))
    assert read_config(tmp_path / "c.toml") == config


def test_order_of_precedence(tiny, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("seed = 3\n[train]\nlr = 0.1\ntokens = 7\n")
    config = configure(str(tiny), "40%", file, {"train.lr": 0.2})
    assert config.control  # the checkpoint folder's own default
    assert config.seed == 3
    assert config.train.tokens == 7
    assert config.train.lr == 0.2  # the flag wins
    assert config.out == "./tiny-mixtral-40pct"
    assert config.data.path.endswith("text")
    assert configure(str(tiny), "40%", file, {"control": False}).control is False


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"train": {"learning_rate": 1}}, r"unknown key 'train.learning_rate'"),
        ({"trian": {}}, r"unknown key 'trian' \(did you mean 'train'\?\)"),
        ({"train": {"lr": "fast"}}, "train.lr must be float; found 'fast'"),
        ({"train": 3}, "train must be a table"),
        ({"control": 1}, "control must be bool"),
        ({"train": {"tokens": True}}, "train.tokens must be int"),
    ],
)
def test_wrong_values(table, message):
    with pytest.raises(UserError, match=message):
        merge(RunConfig(), table, "--config c.toml")


def test_differences_name_the_key():
    changed = merge_flags(RunConfig(), {"train.lr": 0.5})
    assert differences(RunConfig(), changed) == [f"train.lr: {RunConfig().train.lr!r} -> 0.5"]
    assert differences(changed, changed) == []


def test_to_is_needed(tiny):
    with pytest.raises(UserError, match="--to is missing"):
        configure(str(tiny), "", None, {})


def test_every_option_is_plain():
    def leaves(config):
        for f in dataclasses.fields(config):
            value = getattr(config, f.name)
            yield from leaves(value) if dataclasses.is_dataclass(value) else [value]

    assert all(isinstance(v, (str, int, float, bool)) or v == () for v in leaves(RunConfig()))


def test_lists_of_names_survive_toml(tmp_path):
    settings = merge(RunConfig(), {"evaluate": {"allow_loss": ["code", "drama"]}}, "--config")
    assert settings.evaluate.allow_loss == ("code", "drama")
    (tmp_path / "c.toml").write_text(write_config(settings))
    assert read_config(tmp_path / "c.toml") == settings and differences(settings, settings) == []
    with pytest.raises(UserError, match=r"evaluate\.baseline must be a list of names"):
        merge(RunConfig(), {"evaluate": {"baseline": "one"}}, "--config")
