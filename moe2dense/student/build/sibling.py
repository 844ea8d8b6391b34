"""A student that starts from a pretrained dense model with the teacher's tokenizer: its weights are kept, or grafted on where asked for."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from moe2dense.data.vocabulary import compare_vocabularies
from moe2dense.errors import UserError
from moe2dense.student.target.resolve import Target
from moe2dense.student.types import Student

if TYPE_CHECKING:
    from moe2dense.config.schema import BuildConfig
    from moe2dense.data.blocks import Blocks
    from moe2dense.teacher.model import Teacher


def pretrained_sibling(
    target: Target,
    teacher: "Teacher",
    data: "Blocks",
    init: str,
    config: "BuildConfig",
    seed: int = 0,
    progress: Callable[..., None] | None = None,
) -> Student:
    """The dense checkpoint that `target` names, as a student to distil into; with `config.graft` see moe2dense.student.graft.

    Raises UserError when its tokenizer differs from the teacher's: logits of different vocabularies cannot be compared, and then training
    on text that the teacher wrote is the way.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        own = AutoTokenizer.from_pretrained(target.checkpoint)
    except Exception:  # tokenizers fail in many ways; without one, equal vocabulary sizes are all that can be checked
        own = None
    compared = None if own is None else compare_vocabularies(teacher.tokenizer(), own)
    if compared is not None and not compared.same:
        raise UserError(
            f"--to {target.checkpoint} has another tokenizer than the teacher ({compared.difference}), so their logits cannot be compared; "
            f"train it on text that the teacher writes: moe2dense distill {target.checkpoint} --teacher {teacher.path} --data TEXT"
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(target.checkpoint, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(f"--to {target.checkpoint} cannot be loaded: {str(error).splitlines()[0]}") from error
    model.eval().requires_grad_(True)
    student = Student(
        model,
        target.card,
        [None] * model.config.get_text_config().num_hidden_layers,
        str(teacher.path),
        "checkpoint",
        0,
    )
    if not config.graft:
        return student
    from moe2dense.student.build.graft import graft

    return graft(student, target, teacher, data, init, config, seed, progress)
