"""Read ahead: while a step computes, a thread reads the targets of the next forward passes."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from moe2dense.distillation.batching import micro_batches, step_blocks, total_steps
from moe2dense.distillation.targets.protocols import Targets
from moe2dense.losses.teacher_rows import TeacherRows

Passes = Iterator[tuple[int, ...]]


class ReadAhead:
    """Targets that are read in the order of training, `depth` forward passes ahead; at most that many are in memory.

    blocks, per_step, epochs, seed, micro, rank, world: what the order follows from (batching.py). The blocks asked for tell the
    place in the order, so a run may resume or go back; blocks that are in no such place are read when asked for.
    """

    def __init__(
        self, targets: Targets, blocks: int, per_step: int, epochs: float, seed: int, micro: int,
        rank: int = 0, world: int = 1, depth: int = 2,
    ):  # fmt: skip
        self.targets, self.depth = targets, depth
        self._order = (blocks, per_step, total_steps(blocks, per_step, epochs), seed, micro, rank, world)
        self._passes: Passes = iter(())
        self._waiting: deque[tuple[tuple[int, ...], Future[TeacherRows]]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="targets")

    def __len__(self) -> int:
        return len(self.targets)

    def _following(self, wanted: tuple[int, ...]) -> Passes:
        """Yield the forward passes after the first one that asks for `wanted`; none when there is no such pass."""
        blocks, per_step, steps, seed, micro, rank, world = self._order
        passed = False
        for step in range(steps):
            chosen = step_blocks(blocks, per_step, step, seed)
            # a pass without blocks reads the step's first, see Batches.part
            for part in (tuple(p) or (chosen[0],) for p in micro_batches(chosen, rank, world, micro)):
                if passed:
                    yield part
                passed = passed or part == wanted

    def batch(self, indices: Sequence[int]) -> TeacherRows:
        """Return what the loss reads, at every position of some blocks."""
        wanted = tuple(indices)
        if self._waiting and self._waiting[0][0] == wanted:
            rows = self._waiting.popleft()[1].result()
        else:
            self._waiting.clear()
            self._passes = self._following(wanted)
            rows = self.targets.batch(wanted)
        while len(self._waiting) < self.depth and (part := next(self._passes, None)) is not None:
            self._waiting.append((part, self._pool.submit(self.targets.batch, part)))
        return rows

    def close(self) -> None:
        """Stop reading."""
        self._pool.shutdown(cancel_futures=True)
