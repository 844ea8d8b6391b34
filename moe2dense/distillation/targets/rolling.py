"""Targets that roll: the teacher answers a window of the text, the student trains on it, and the window is dropped.

So there may be any number of unique tokens on a disk of any size. A window is a number of whole steps. It is a store of its own
(store.py), in a folder named by its first step; a run that is resumed in the middle of a window finds it there, or has the
teacher answer it again. Without room on disk a teacher in memory answers each forward pass.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moe2dense.common.processes import launched, wait_for_all
from moe2dense.common.units import show_bytes
from moe2dense.data.blocks import Blocks
from moe2dense.distillation.batching import step_blocks, total_steps
from moe2dense.distillation.targets.formats import StoreOptions
from moe2dense.distillation.targets.memory import hidden_targets
from moe2dense.distillation.targets.store import StoredTargets, open_targets, token_bytes
from moe2dense.distillation.targets.write import write_targets
from moe2dense.errors import UserError
from moe2dense.losses.teacher_rows import TeacherRows
from moe2dense.modeling.hooks import feature_name
from moe2dense.teacher.kinds import AnyTeacher, teacher_head
from moe2dense.teacher.model import Teacher

# N blocks, S block length, H teacher hidden, V vocabulary

WINDOWS = "window-*"  # the folders of windows


@dataclass(frozen=True)
class Order:
    """What the blocks of each step follow from (batching.py)."""

    blocks: int
    per_step: int
    epochs: float
    seed: int

    @property
    def steps(self) -> int:
        """Return the steps of the whole run."""
        return total_steps(self.blocks, self.per_step, self.epochs)

    def of(self, steps: range) -> list[int]:
        """Return the blocks that some steps see, each once, in the order of the text."""
        return sorted({b for step in steps for b in step_blocks(self.blocks, self.per_step, step, self.seed)})


@dataclass
class RollingTargets:
    """Targets on N blocks, of which those of one window are stored at a time.

    folder: of the windows; steps: of a window, 0 = nothing is stored, the teacher answers when it is asked. options: format,
    temperature, features and the rest of a store.
    """

    teacher: AnyTeacher
    blocks: Blocks
    order: Order
    folder: Path
    steps: int
    options: StoreOptions
    progress: Callable[..., None] | None = None
    _store: StoredTargets | None = field(default=None, init=False)
    _places: dict[int, int] = field(default_factory=dict, init=False)
    _window: int = field(default=-1, init=False)

    def __post_init__(self) -> None:
        config = self.teacher.config.get_text_config()
        self.features = tuple(feature_name(f) for f in self.options.features)
        self.layers, self.width = int(config.num_hidden_layers), int(config.hidden_size)

    def __len__(self) -> int:
        return len(self.blocks)

    def begin_step(self, step: int) -> None:
        """Have the window of a step written and open, and all others dropped."""
        if not self.steps or step // self.steps == self._window:
            return
        self._window = step // self.steps
        first = self._window * self.steps
        rows = self.order.of(range(first, min(first + self.steps, self.order.steps)))
        self._store = None
        folder = self.folder / f"window-{first:07d}"
        wait_for_all()  # until no process reads the window before
        if launched()[0] == 0:
            self._drop_others(folder)
        wait_for_all()
        text = self.blocks[rows]
        options = self.options
        write_targets(
            self.teacher, text, folder, options.format, temperature=options.temperature, k=options.k, draws=options.draws,
            seed=options.seed + first, features=self.features, progress=self._shown(first),
        )  # fmt: skip
        self._store, self._places = open_targets(folder, text), {row: i for i, row in enumerate(rows)}

    def _drop_others(self, kept: Path) -> None:
        for path in self.folder.glob(WINDOWS):
            if path != kept:
                shutil.rmtree(path, ignore_errors=True)

    def _shown(self, first: int) -> Callable[..., None] | None:
        """Return what is told of a window's progress, named by its number."""
        report, name = self.progress, f"targets {first // self.steps + 1}/{math.ceil(self.order.steps / self.steps)}"
        return None if report is None else lambda _, *done, **numbers: report(name, *done, **numbers)

    def batch(self, indices: Sequence[int]) -> TeacherRows:
        """Return the teacher at every position of some blocks of the present step, in their order."""
        if not self.steps:
            answers = hidden_targets(self.teacher, self.blocks[list(indices)], features=self.features)
            return answers.batch(range(len(answers)))
        assert self._store is not None, "begin_step opens the window"
        return self._store.batch([self._places[i] for i in indices])

    def finish(self) -> None:
        """Drop the last window."""
        self._store = None
        wait_for_all()
        if launched()[0] == 0:
            shutil.rmtree(self.folder, ignore_errors=True)


def store_bytes(teacher: AnyTeacher, options: StoreOptions, block: int) -> tuple[int, int]:
    """Return the bytes of a store (beside its blocks: head and lists; of a block of `block` tokens)."""
    head = teacher_head(teacher)
    vocabulary, hidden_size = head.weight.shape
    fixed = store_bytes_besides(options, head.stored.nbytes)
    return fixed, store_bytes_of_block(options, hidden_size, vocabulary, block)


def store_bytes_besides(options: StoreOptions, head: int) -> int:
    """Return the bytes of a store beside its blocks, for a teacher's head of so many bytes."""
    return (head if options.format == "hidden" else 0) + 2**16


def store_bytes_of_block(options: StoreOptions, hidden_size: int, vocabulary: int, block: int) -> int:
    """Return the bytes of a stored block of `block` tokens."""
    return math.ceil(token_bytes(options, hidden_size, vocabulary) * block) + 64


def window_steps(disk: int, fixed: int, each: int, per_step: int) -> int:
    """Return how many steps' targets fit in `disk` bytes beside `fixed`, of blocks of `each` bytes; 0 without any."""
    return max(0, disk - fixed) // (each * per_step) if disk else 0


def rolling_targets(
    teacher: AnyTeacher,
    blocks: Blocks,
    folder: str | Path,
    disk: int,
    order: Order,
    options: StoreOptions,
    progress: Callable[..., None] | None = None,
) -> RollingTargets | None:
    """Return targets that take at most `disk` bytes in `folder`; None where a store of the whole text takes no more.

    disk 0: nothing is stored. Raises UserError where not even one step's targets fit, and for a teacher that is not in memory and
    may store nothing.
    """
    block = blocks.input_ids.shape[1]
    fixed, each = store_bytes(teacher, options, block)
    if fixed + each * len(blocks) <= disk:
        return None
    if disk == 0 and isinstance(teacher, Teacher) and not teacher.resident:
        raise UserError(
            "--targets-disk 0 has the teacher answer while the student trains, and this one is read from disk for every answer; "
            "give --targets-disk some room, or the teacher more --memory"
        )
    if disk == 0 and options.format != "hidden":
        raise UserError(
            f"--targets-disk 0 stores nothing, so train.target_format {options.format!r} has no meaning; leave it out"
        )
    steps = window_steps(disk, fixed, each, order.per_step)
    if disk and steps < 1:
        need = show_bytes(fixed + each * order.per_step)
        raise UserError(
            f"--targets-disk {show_bytes(disk)} holds less than one step's targets ({need}); raise it, or lower train.batch"
        )
    return RollingTargets(teacher, blocks, order, Path(folder), steps, options, progress)
