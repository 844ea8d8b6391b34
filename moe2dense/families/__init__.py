"""Know the families of teachers and of dense hosts, as cards; resolve a name, hub id or folder to one.

A name comes in; a card, a config and the folder of a checkpoint go out. Nothing here imports torch.
"""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from moe2dense.families.cards import StudentCard, TeacherCard, student_cards, teacher_cards
    from moe2dense.families.resolve import ResolvedTeacher, resolve_teacher

__all__ = ["ResolvedTeacher", "StudentCard", "TeacherCard", "resolve_teacher", "student_cards", "teacher_cards"]

__getattr__, __dir__, _ = lazy.attach(
    __name__,
    submod_attrs={
        "cards": ["StudentCard", "TeacherCard", "student_cards", "teacher_cards"],
        "resolve": ["ResolvedTeacher", "resolve_teacher"],
    },
)
