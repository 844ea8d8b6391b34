"""Resolve TEACHER: an existing path, else a hub id, else the name of a card or an alias."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import try_to_load_from_cache

from moe2dense.common.hub import hub_unreachable
from moe2dense.errors import UserError, first_line, nearest
from moe2dense.families.cards import (
    Checkpoint,
    TeacherCard,
    find_checkpoint,
    read_teacher_card,
    teacher_cards,
    unsupported_teachers,
)
from moe2dense.families.download import download_model
from moe2dense.families.towers import as_text_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# config fields that only models with experts set
_EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "moe_intermediate_size")


@dataclass(frozen=True)
class ResolvedTeacher:
    """A teacher that was named. `path` is None until its files are on this machine; `config` is there either way."""

    given: str
    name: str
    path: Path | None
    hub_id: str
    config: "PreTrainedConfig"
    card: TeacherCard
    checkpoint: Checkpoint | None


def family_card(config: "PreTrainedConfig", card_path: str = "") -> TeacherCard:
    """Return the card of this config's family, or the user's own. Raises UserError when it is no MoE or no card knows it."""
    config = config.get_text_config()
    if card_path:
        card = read_teacher_card(card_path)
        if card.model_type != config.model_type:
            raise UserError(
                f"--teacher-card {card_path} describes {card.model_type!r}, but the teacher is {config.model_type!r}"
            )
        return card
    card = teacher_cards().get(config.model_type)
    if card is not None and (getattr(config, card.num_experts, None) or has_experts(config)):
        check_required(config, card)
        return card
    if not has_experts(config):
        raise UserError(
            f"the teacher is a {config.model_type!r} model, which has no experts: moe2dense turns MoE models into dense ones; "
            f"to make a dense model smaller, distil it with `moe2dense distill`"
        )
    if reason := unsupported_teachers().get(config.model_type):
        raise UserError(f"the MoE family {config.model_type!r} cannot be a teacher: {reason}")
    known = ", ".join(teacher_cards())
    raise UserError(
        f"no teacher card for the MoE family {config.model_type!r}{nearest(config.model_type, list(teacher_cards()))}; "
        f"write one (CONTRIBUTING.md, 'Add a family') and pass it with --teacher-card; known families: {known}"
    )


def check_required(config: "PreTrainedConfig", card: TeacherCard) -> None:
    """Raise UserError for a config with a setting of the family that is not read here."""
    for name, wanted in card.requires.items():
        value = getattr(config, name, None)
        each = value if isinstance(value, list) else [value]
        if any(entry != wanted for entry in each):
            other = next(entry for entry in each if entry != wanted)
            raise UserError(
                f"{card.title} with {name} = {other!r} cannot be a teacher: its layers need more of the layers before them than the "
                f"hidden states; only {wanted!r} can be read"
            )


def has_experts(config: "PreTrainedConfig") -> bool:
    """Return whether a config sets a field that only models with experts have."""
    return any(getattr(config, f, None) for f in _EXPERT_FIELDS)


def _read_config(source: str | Path, given: str) -> "PreTrainedConfig":
    """Return the config of a folder or hub id. Raises UserError about TEACHER `given`."""
    from transformers import AutoConfig

    try:
        return as_text_model(AutoConfig.from_pretrained(source, trust_remote_code=False))
    except Exception as error:  # each architecture's config checks its fields in its own way
        raise UserError(f"TEACHER {given!r}: its config cannot be read ({first_line(error)})") from error


def _offline_config(card: TeacherCard, row: Checkpoint) -> "PreTrainedConfig":
    """Return the config that a card holds for a public checkpoint."""
    from transformers import AutoConfig

    return AutoConfig.for_model(card.model_type, **row.config)


def checkpoint_folder(given: str | Path) -> Path:
    """Return the folder that a path means: a GGUF file means the one that it lies in. Raises UserError where its config.json is missing."""
    path = Path(given)
    if path.suffix.lower() != ".gguf" or not path.is_file():
        return path
    if not (path.parent / "config.json").is_file():
        raise UserError(
            f"TEACHER {str(given)!r} has no config.json beside it; copy config.json and the tokenizer's files of the model that it was "
            f"made of into its folder"
        )
    return path.parent


def resolve_teacher(given: str, card_path: str = "") -> ResolvedTeacher:
    """Find TEACHER without downloading weights: an existing path, a hub id (contains '/'), a card or alias.

    A known hub checkpoint that cannot be reached falls back to the geometry on its card, so plans work offline.
    Raises UserError naming what was looked for.
    """
    path = checkpoint_folder(given)
    if path.exists():
        if not (path / "config.json").is_file():
            raise UserError(
                f"TEACHER {given!r} has no config.json; give the folder of a checkpoint as transformers saves it"
            )
        config = _read_config(path, given)
        return ResolvedTeacher(given, path.resolve().name, path, "", config, family_card(config, card_path), None)
    known = find_checkpoint(given)
    if known is None and "/" not in given:
        names = sorted({a for c in teacher_cards().values() for row in c.checkpoints for a in row.aliases})
        raise UserError(
            f"TEACHER {given!r} is no folder, no hub id (owner/name) and no known name{nearest(given, names)}; "
            f"`moe2dense list` shows the known names"
        )
    hub_id = known[1].id if known else given
    name = (given if "/" not in given else hub_id.split("/")[-1]).lower()
    local = _cached(hub_id)
    if local is None and known is not None:
        card, row = known
        card = read_teacher_card(card_path) if card_path else card
        return ResolvedTeacher(given, name, None, hub_id, _offline_config(card, row), card, row)
    if local is None and (reason := hub_unreachable()):
        raise UserError(
            f"TEACHER {given!r} is on the hub, which cannot be reached ({reason}); pass the folder of a checkpoint, or plan with a "
            f"name of `moe2dense list teachers`"
        )
    config = _read_config(local or hub_id, given)
    return ResolvedTeacher(
        given, name, None, hub_id, config, family_card(config, card_path), known[1] if known else None
    )


def _cached(hub_id: str) -> Path | None:
    """Return the folder of the hub cache that holds this model's config, or None."""
    path = try_to_load_from_cache(hub_id, "config.json")
    return Path(path).parent if isinstance(path, str) else None


def fetch(teacher: ResolvedTeacher) -> Path:
    """Return the folder with the teacher's files, downloaded into the hub cache when it is a hub checkpoint.

    Raises UserError when the hub cannot be reached and the files are not in the cache.
    """
    if teacher.path is not None:
        return teacher.path
    try:
        return download_model(teacher.hub_id)
    except Exception as error:  # the hub client raises many kinds; all mean that the files are not to be had
        raise UserError(
            f"TEACHER {teacher.given!r} means {teacher.hub_id} on the hub, which cannot be downloaded ({hub_unreachable() or first_line(error)}); "
            f"download it where there is a network and pass the folder"
        ) from error
