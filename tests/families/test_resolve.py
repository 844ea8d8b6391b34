import json

import pytest
from transformers import AutoConfig

from moe2dense.errors import UserError
from moe2dense.families import resolve
from moe2dense.families.cards import teacher_cards
from moe2dense.families.resolve import family_card, fetch, resolve_teacher
from tests.teacher.families import tiny_sizes


def test_a_folder(tiny):
    found = resolve_teacher(str(tiny))
    assert (found.name, found.path, found.card.model_type) == ("tiny-mixtral", tiny, "mixtral")


def test_a_bare_name_is_planned_offline():
    found = resolve_teacher("mixtral")
    assert found.hub_id == "mistralai/Mixtral-8x7B-v0.1"
    assert found.path is None
    assert found.config.num_local_experts == 8
    with pytest.raises(UserError, match="cannot be downloaded .* pass the folder"):
        fetch(found)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("mixtrall", "no known name .did you mean 'mixtral'"),
        ("nobody/nothing", "its config cannot be read"),
    ],
)
def test_unknown_teachers(given, message):
    with pytest.raises(UserError, match=message):
        resolve_teacher(given)


def test_a_folder_without_config(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        resolve_teacher(str(tmp_path))


def test_not_an_moe(tmp_path):
    AutoConfig.for_model("mistral", hidden_size=8, num_attention_heads=2, num_key_value_heads=1).save_pretrained(
        tmp_path
    )
    with pytest.raises(UserError, match="'mistral' model, which has no experts.*moe2dense distill"):
        resolve_teacher(str(tmp_path))


def test_an_unknown_family(tmp_path, monkeypatch):
    monkeypatch.setattr(resolve, "unsupported_teachers", dict)
    AutoConfig.for_model("jetmoe", hidden_size=8).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no teacher card for the MoE family 'jetmoe'.*--teacher-card"):
        resolve_teacher(str(tmp_path))


def test_own_card(tiny, tmp_path):
    card = tmp_path / "mine.toml"
    card.write_text('model_type = "mixtral"\ntitle = "Mine"\nhost = "mistral"\nnum_experts = "num_local_experts"\n')
    assert resolve_teacher(str(tiny), str(card)).card.title == "Mine"
    card.write_text('model_type = "olmoe"\ntitle = "Mine"\nhost = "mistral"\n')
    with pytest.raises(UserError, match="describes 'olmoe', but the teacher is 'mixtral'"):
        resolve_teacher(str(tiny), str(card))


def test_broken_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
    with pytest.raises(UserError, match="its config cannot be read"):
        resolve_teacher(str(tmp_path))


def test_family_card_of_every_shipped_family():
    for model_type, card in teacher_cards().items():
        config = AutoConfig.for_model(model_type, **tiny_sizes(model_type))
        assert family_card(config).model_type == card.model_type
