"""Treat alike the two kinds of teachers: a checkpoint that runs layer by layer, and a transformers model in memory."""

from transformers import PreTrainedModel

from moe2dense.modeling.head import OutputHead, model_head
from moe2dense.teacher.model import Teacher

AnyTeacher = Teacher | PreTrainedModel


def teacher_head(teacher: AnyTeacher) -> OutputHead:
    """Return the language-model head of a teacher of either kind."""
    return teacher.head if isinstance(teacher, Teacher) else model_head(teacher)
