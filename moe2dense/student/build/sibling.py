"""Start from a pretrained dense model with the teacher's tokenizer: its weights are kept, or grafted on where asked for."""

from typing import TYPE_CHECKING

from transformers import AutoTokenizer

from moe2dense.data.vocabulary import compare_vocabularies
from moe2dense.errors import UserError
from moe2dense.modeling.load import load_model
from moe2dense.student.build.graft import graft
from moe2dense.student.build.state import Progress
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
    progress: Progress | None = None,
) -> Student:
    """Return the dense checkpoint that `target` names as a student to distil into; with `config.graft`, see `graft`.

    Raises UserError when its tokenizer differs from the teacher's. Logits of different vocabularies cannot be compared; then
    the way is to train on text that the teacher writes.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(target.checkpoint, trust_remote_code=False)
    except Exception:  # tokenizers fail in many ways; without one, equal vocabulary sizes are all that can be checked
        tokenizer = None
    compared = None if tokenizer is None else compare_vocabularies(teacher.tokenizer(), tokenizer)
    if compared is not None and not compared.same:
        raise UserError(
            f"--to {target.checkpoint} has another tokenizer than the teacher ({compared.difference}), so their logits cannot be compared; "
            f"train it on text that the teacher writes: moe2dense distill {target.checkpoint} --teacher {teacher.path} --data TEXT"
        )
    model = load_model(target.checkpoint, "--to")
    model.eval().requires_grad_(True)
    layers = model.config.get_text_config().num_hidden_layers
    student = Student(model, target.card, [None] * layers, str(teacher.path), "checkpoint", 0)
    if not config.graft:
        return student
    return graft(student, target, teacher, data, init, config, seed, progress)
