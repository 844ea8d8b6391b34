"""A teacher is a checkpoint that runs layer by layer, or a transformers model in memory; what both can be asked for."""

from transformers import PreTrainedModel

from moe2dense.modeling.head import OutputHead, model_head
from moe2dense.teacher.model import Teacher

AnyTeacher = Teacher | PreTrainedModel


def teacher_head(teacher: AnyTeacher) -> OutputHead:
    """Return the language-model head of a teacher of either kind."""
    return teacher.head if isinstance(teacher, Teacher) else model_head(teacher)
