"""What of the MoE architectures of the installed transformers can be a teacher, as `moe2dense list teachers --all` shows it."""

from typing import Any

import transformers

from moe2dense.families.cards import TeacherCard, teacher_cards, unsupported_teachers
from moe2dense.modeling.moe_types import MoEType, moe_types

SERVED, NOT_SERVED, NEW = "served", "not served", "new"


def all_types() -> list[dict[str, Any]]:
    """Return every MoE architecture with its status: served with a host, not served with the reason, or not looked at yet."""
    return [_row(kind, teacher_cards(), unsupported_teachers()) for kind in moe_types()]


def _row(kind: MoEType, cards: dict[str, TeacherCard], reasons: dict[str, str]) -> dict[str, Any]:
    """Return one architecture as plain values."""
    names = (kind.model_type, *kind.wrappers, kind.folder)
    towers = {tower: card for card in cards.values() for tower in card.text_towers}
    card = cards.get(kind.model_type) or towers.get(kind.model_type)
    reason = next((reasons[name] for name in names if name in reasons), "")
    status = NEW
    if card is not None:
        status, reason = SERVED, ""
    elif reason or not kind.causal:
        status, reason = NOT_SERVED, reason or "transformers has no causal language model of it alone"
    row = {"family": kind.model_type, "status": status, "wrappers": list(kind.wrappers)}
    return row | ({"host": card.host} if card else {}) | ({"reason": reason} if reason else {})


def summary(rows: list[dict[str, Any]]) -> str:
    """Return one sentence that counts what is listed."""
    counts = {status: sum(row["status"] == status for row in rows) for status in (SERVED, NOT_SERVED, NEW)}
    return (
        f"transformers {transformers.__version__} has {len(rows)} MoE architectures: {counts[SERVED]} served, {counts[NOT_SERVED]} not "
        f"served, {counts[NEW]} not looked at yet"
    )
