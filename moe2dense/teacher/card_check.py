"""Check a card that is not shipped: a small random model of the teacher's own config, streamed, must equal transformers' forward."""

import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from moe2dense.errors import UserError, first_line
from moe2dense.families.cards import TeacherCard, teacher_cards
from moe2dense.modeling.load import quiet
from moe2dense.modeling.small_model import random_model, random_text, relative_difference, small_config
from moe2dense.teacher.model import Teacher

_TOLERANCE = 1e-3
_MEMORY = "500MB"


def is_shipped(card: TeacherCard | None) -> bool:
    """Return whether a card is one of the project's own, each of which is tested against transformers; so is having none."""
    return card is None or teacher_cards().get(card.model_type) == card


def check_card(config: PreTrainedConfig, card: TeacherCard) -> None:
    """Stream a small random model of this config by a card, and compare it with transformers' own forward.

    Raises UserError where they differ, or the family cannot be tried out or streamed.
    """
    where = f"teacher card {card.model_type}"
    try:
        small = small_config(config, card)
        model = random_model(small)
        model.set_experts_implementation("eager")
    except UserError:
        raise
    except Exception as error:  # a family whose sizes cannot be cut fails in many ways
        raise UserError(
            f"{where}: no small model of the teacher's config can be made to try the card on ({first_line(error)}); "
            f"a family must be known to stream as transformers computes it"
        ) from error
    ids = random_text(small, blocks=3)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        with quiet():
            model.save_pretrained(folder)
        try:
            teacher = Teacher(Path(folder), small, card, _MEMORY, "streamed", "cpu")
            streamed = teacher.run(ids).logits
            teacher.checkpoint.close()
        except UserError:
            raise
        except Exception as error:  # a card that names the wrong parts fails wherever they are used
            raise UserError(
                f"{where}: a small random model of the teacher's config cannot be streamed by it ({first_line(error)}); correct the card"
            ) from error
        expected = model(input_ids=ids, use_cache=False).logits
    assert streamed is not None
    difference = relative_difference(streamed, expected)
    if difference > _TOLERANCE:
        raise UserError(
            f"{where}: on a small random model of the teacher's config, what is streamed differs from transformers' logits by "
            f"{difference:.2g} of their size; the family's layers compute something that the card does not describe, "
            f"such as modules around the experts"
        )
