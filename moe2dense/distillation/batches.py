"""Blocks with the teacher's answers on them, and the part of them that one forward pass sees."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

from moe2dense.data.blocks import Blocks
from moe2dense.distillation.targets.protocols import SteppedTargets, Targets
from moe2dense.losses.teacher_rows import TeacherRows
from moe2dense.modeling.forward import model_inputs

_BLOCKS = 256  # that are looked at at once


@dataclass
class Batches:
    """Blocks with the teacher's answers on them.

    watch [N, S] bool: tokens whose KL is reported apart; weights [N, S]: of each token's distillation loss. source: what tells
    the answers of a store from another's, "" for others.
    """

    blocks: Blocks
    targets: Targets | None
    watch: Tensor | None = None
    weights: Tensor | None = None
    source: str = ""

    @property
    def mask(self) -> Tensor:
        """[N, S] bool: the positions that count."""
        return self.blocks.loss_mask()

    def name_of(self, index: int) -> str:
        """Return how a message names a block."""
        block = self.blocks[[index]]
        return f"block {index} (domain {block.domains[0]!r}, key {block.keys()[0]})"

    def counted_hash(self) -> str:
        """Return a hash of which positions count, and of their labels."""
        digest = xxhash.xxh3_128()
        for part in self.blocks.in_parts():
            digest.update(part.loss_mask().numpy().tobytes())
        for part in self.blocks.in_parts():
            digest.update(part.labels().numpy().tobytes())
        return digest.hexdigest()

    def denominators(self, indices: Sequence[int]) -> dict[str, float]:
        """Return how many positions and labels of some blocks count."""
        rows, counted, labelled = list(indices), 0, 0
        for start in range(0, len(rows), _BLOCKS):
            blocks = self.blocks[rows[start : start + _BLOCKS]]
            mask = blocks.loss_mask()
            counted += int(mask.sum())
            labelled += int((blocks.labels()[mask] >= 0).sum())
        return {"denominator": float(counted), "label_denominator": float(labelled)}

    def begin_step(self, step: int) -> None:
        """Prepare targets that must know which step (from 0) asks; every process calls it."""
        if isinstance(self.targets, SteppedTargets):
            self.targets.begin_step(step)

    def part(
        self, indices: list[int], device: torch.device, labels: bool, spare: int = 0
    ) -> tuple[dict[str, Tensor], TeacherRows | None, dict[str, Any]]:
        """Return model inputs, teacher rows and per-token options of one forward pass.

        Without blocks it is a wholly masked copy of block `spare`, so that every process runs the same number of passes.
        """
        rows = indices or [spare]
        blocks = self.blocks[rows]
        mask = blocks.loss_mask().flatten() & bool(indices)
        options: dict[str, Any] = {} if bool(mask.all()) else {"mask": mask.to(device)}
        if labels:
            options["labels"] = blocks.labels().flatten().to(device)
        if self.watch is not None:
            options["watch"] = self.watch[rows].flatten().to(device)
        if self.weights is not None:
            options["weights"] = self.weights[rows].flatten().to(device)
        teacher = None if self.targets is None else self.targets.batch(rows)
        return model_inputs(blocks, device), _moved(teacher, device), options


def _moved(rows: TeacherRows | None, device: torch.device) -> TeacherRows | None:
    return rows if rows is None or device.type == "cpu" else rows.to(device)
