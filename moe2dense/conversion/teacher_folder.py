"""Check a teacher's folder before anything is computed, from its config and the headers of its files alone."""

import contextlib

from transformers import AutoTokenizer

from moe2dense.data.vocabulary import check_vocabulary
from moe2dense.families.resolve import ResolvedTeacher, resolve_teacher
from moe2dense.teacher.check import check_quantization
from moe2dense.teacher.folder_check import check_folder
from moe2dense.teacher.skeleton import quantization_of
from moe2dense.weights.files import holds_weights


def checked_teacher(given: str, card_path: str = "") -> tuple[ResolvedTeacher, list[str]]:
    """Find TEACHER and check its weights where they are on this machine; return it and sentences on what is not used.

    Raises UserError naming the file and tensor at fault, as loading the teacher would.
    """
    teacher = resolve_teacher(given, card_path)
    check_quantization(teacher.path or teacher.hub_id, quantization_of(teacher.config))
    if teacher.path is None:
        return teacher, []
    _check_tokenizer(teacher)
    if not holds_weights(teacher.path):
        return teacher, [f"{teacher.path} holds no weights yet; the plan follows from its config.json alone"]
    return teacher, check_folder(teacher.path, teacher.config, teacher.card)


def _check_tokenizer(teacher: ResolvedTeacher) -> None:
    """Refuse a tokenizer with more tokens than the embedding has rows; a folder without one can still be planned for."""
    tokenizer = None
    with contextlib.suppress(Exception):  # loading it for a run says what is wrong with it
        tokenizer = AutoTokenizer.from_pretrained(str(teacher.path), trust_remote_code=False)
    if tokenizer is not None:
        check_vocabulary(
            tokenizer, teacher.config.get_text_config().vocab_size, f"teacher {teacher.path}: its tokenizer"
        )
