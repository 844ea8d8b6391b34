"""Open targets in a folder or at a URL, whoever wrote them: our store, or a set that others captured. The folder itself says which."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from moe2dense.data.blocks import Blocks
from moe2dense.distillation.targets.captured.rows import is_captured
from moe2dense.distillation.targets.captured.targets import CapturedTargets, open_captured
from moe2dense.distillation.targets.store import StoredTargets, open_targets
from moe2dense.teacher.kinds import AnyTeacher
from moe2dense.teacher.model import Teacher


def open_any_targets(
    folder: str | Path,
    blocks: Blocks,
    teacher: AnyTeacher | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    verify: bool = True,
    room: int | None = None,
) -> StoredTargets | CapturedTargets:
    """Open the targets of `blocks`, which may be any part of the folder's text in any order.

    teacher, tokenizer: whose targets and whose vocabulary they must be; of a captured set only the vocabulary can be told. verify:
    compare the files of a store with their checksums first. room: bytes that copies of a store at a URL may take. Raises UserError as `open_targets` and `open_captured` do.
    """
    if not is_captured(folder):
        return open_targets(folder, blocks, teacher, verify, tokenizer, room)
    own = teacher.tokenizer() if isinstance(teacher, Teacher) else tokenizer
    return open_captured(folder, blocks, own)
