"""A card that is not shipped is tried out on a small random model of the teacher's config before it is used."""

from dataclasses import replace

import pytest
from transformers import AutoConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moe2dense.errors import UserError
from moe2dense.families.cards import teacher_cards
from moe2dense.teacher.card_check import check_card, is_shipped
from moe2dense.teacher.folder_check import check_folder
from moe2dense.teacher.load import load_teacher
from tests.teacher.families import FAMILIES, make, tiny_sizes

MIXTRAL = replace(teacher_cards()["mixtral"], title="My own Mixtral")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_shipped_cards_would_pass(family):
    config = AutoConfig.for_model(family, **tiny_sizes(family))
    card = teacher_cards()[family]
    assert is_shipped(card) and not is_shipped(replace(card, title="mine"))
    check_card(config, card)


def test_modules_around_the_experts_are_caught(tmp_path, monkeypatch):
    """A family that does more with its experts' output than the card can say, as Inkling does."""
    make("mixtral", tmp_path)
    load_teacher(tmp_path, card=MIXTRAL)
    plain = MixtralExperts.forward

    def scaled(self, hidden_states, top_k_index, top_k_weights):
        return 1.5 * plain(self, hidden_states, top_k_index, top_k_weights).roll(1, -1)

    monkeypatch.setattr(MixtralExperts, "forward", scaled)
    config = load_teacher(tmp_path).config  # a shipped card is tested with its own family, and not tried out each time
    for use in (lambda: load_teacher(tmp_path, card=MIXTRAL), lambda: check_folder(tmp_path, config, MIXTRAL)):
        with pytest.raises(UserError, match="teacher card mixtral: .* differs from transformers' logits by"):
            use()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"router": "router"}, "layer 0 has no router"),
        ({"mixers": ("attention",)}, "layer 0 has no router|has no mixers"),
        ({"num_experts": "n_experts"}, "the teacher's config has no field 'n_experts'"),
        ({"shared": "experts"}, "cannot be streamed by it|not a gated feed-forward"),
    ],
)
def test_a_card_that_names_the_wrong_parts_is_refused(tmp_path, change, message):
    make("mixtral", tmp_path)
    with pytest.raises(UserError, match=message):
        load_teacher(tmp_path, card=replace(MIXTRAL, **change))
