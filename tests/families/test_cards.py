import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from moe2dense.errors import UserError
from moe2dense.families.cards import (
    find_checkpoint,
    read_student_card,
    read_teacher_card,
    student_cards,
    student_host,
    teacher_cards,
    unsupported_teachers,
)


def test_every_teacher_card_names_a_host_that_exists():
    for card in teacher_cards().values():
        assert not student_host(card.host).host, card.model_type
        assert card.weights_sum in ("one", "constant", "varies")
        assert card.dispatch in ("routed", "stacked")


def test_what_cannot_be_a_teacher_has_a_reason_and_no_card():
    reasons = unsupported_teachers()
    assert reasons and all(len(reason.split()) > 4 for reason in reasons.values())
    assert not reasons.keys() & teacher_cards().keys()
    assert not [name for name in reasons if not CONFIG_MAPPING_NAMES.get(name)]  # a name that transformers has


def test_every_named_target_has_a_host_and_sizes():
    for card in student_cards().values():
        if card.host:
            assert student_host(card.host).width in card.geometry
        else:
            assert card.model_type
            assert card.join in ("additive", "scaled", "post_norm", "parallel")
            assert set(card.loads) >= {"transformers", "vllm", "llama_cpp"}, card.name


def test_aliases_are_unique():
    names = [n.lower() for c in teacher_cards().values() for row in c.checkpoints for n in (row.id, *row.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", ["mixtral", "Mixtral-8x7B", "mistralai/Mixtral-8x7B-v0.1"])
def test_names_of_a_checkpoint(name):
    card, row = find_checkpoint(name)
    assert card.model_type == "mixtral"
    assert row.id == "mistralai/Mixtral-8x7B-v0.1"


def test_unknown_name():
    assert find_checkpoint("no-such-model") is None
    with pytest.raises(UserError, match="did you mean 'mistral'"):
        student_host("mistrall")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'model_type = "x"\ntitle = "X"\nhost = "mistral"\nrouters = "gate"',
            "unknown key 'routers'.*did you mean 'router'",
        ),
        ('title = "X"\nhost = "mistral"', "missing key 'model_type'"),
        ("title = ", "not valid TOML"),
    ],
)
def test_wrong_cards_say_which_key(tmp_path, text, message):
    path = tmp_path / "card.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_teacher_card(path)


def test_missing_card_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_student_card(tmp_path / "none.toml")
