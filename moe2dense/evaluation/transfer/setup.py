"""What every layer of a transfer measurement needs: the text, the students, their KL and residual streams."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe2dense.common.devices import moved_to
from moe2dense.data.blocks import Blocks
from moe2dense.errors import UserError
from moe2dense.evaluation.bootstrap import Bootstrap
from moe2dense.evaluation.clusters import clusters_of
from moe2dense.evaluation.scores import Scores
from moe2dense.evaluation.transfer.student_side import StudentLayer, residual_streams
from moe2dense.families.cards import StudentCard
from moe2dense.modeling.decoder import decoder_layers
from moe2dense.student.types import LayerProvenance, Student
from moe2dense.teacher.model import Teacher

# T tokens, N blocks, D tokens followed through the depth, H hidden size

FOLLOWED_TOKENS = 512  # of all blocks, at which residual streams are compared


@dataclass(frozen=True)
class TransferOptions:
    """How much is measured.

    least_tokens: an expert with fewer real tokens is unmeasured. sample: tokens per expert for coverage. bootstrap:
    resamples. replaceability: whether experts are run on each other's tokens.
    """

    least_tokens: int
    sample: int
    bootstrap: int
    replaceability: bool
    seed: int


@dataclass
class TransferSetup:
    """The students' side of a measurement.

    The keys of students, kl and streams are "after" and "before" (training). kl: KL [T] at every token, NaN where not judged. followed: positions of every block at which residual streams are
    compared; streams: those streams, one tensor [D, H] for each layer. cluster [T]: the work or passage of each token, which
    `bootstrap` resamples. generator: draws the samples, layer by layer.
    input_scaled: the family multiplies an expert's input with the routing weight.
    """

    options: TransferOptions
    blocks: Blocks
    card: StudentCard
    students: dict[str, PreTrainedModel]
    provenances: list[LayerProvenance | None]
    kl: dict[str, Tensor]
    followed: Tensor
    streams: dict[str, list[Tensor]]
    bootstrap: Bootstrap
    cluster: Tensor
    generator: torch.Generator
    input_scaled: bool

    @contextmanager
    def layers_on(self, index: int, device: torch.device) -> Iterator[None]:
        """Have layer `index` of every student on a device within the context."""
        with ExitStack() as stack:
            for model in self.students.values():
                stack.enter_context(moved_to(decoder_layers(model)[index], device))
            yield

    def student_layer(self, index: int, student: str = "after") -> StudentLayer:
        """Return a student's decoder layer."""
        model = self.students[student]
        config, field = model.config.get_text_config(), self.card.join_multiplier
        multiplier = float(getattr(config, field)) if self.card.join == "scaled" else 1.0
        return StudentLayer(decoder_layers(model)[index], self.card, multiplier)


def prepare_setup(
    teacher: Teacher,
    blocks: Blocks,
    students: Mapping[str, Student],
    scores: Mapping[str, Scores],
    options: TransferOptions,
) -> TransferSetup:
    """Check that students and scores fit the teacher and the blocks, then run the students over the blocks.

    Raises UserError where they do not fit.
    """
    models = {name: student.model for name, student in students.items()}
    for model in models.values():
        depth, width = len(decoder_layers(model)), model.config.hidden_size
        if (depth, width) != (len(teacher.body.layers), teacher.hidden_size):
            raise UserError(
                f"student: {depth} layers x {width}, the teacher has {len(teacher.body.layers)} x {teacher.hidden_size}; "
                "experts are followed layer by layer, so both must agree"
            )
    for row in scores.values():
        if row.kl_NS.shape != blocks.input_ids.shape:
            raise UserError("scores: of other blocks than `blocks`; evaluate the student on the same blocks")
    n, s = blocks.input_ids.shape
    clusters = clusters_of(blocks)
    followed = torch.linspace(0, s - 1, max(1, min(s, FOLLOWED_TOKENS // n))).round().long().unique()
    return TransferSetup(
        options,
        blocks,
        students["after"].card,
        models,
        list(students["after"].provenance),
        {name: row.kl_NS.flatten() for name, row in scores.items()},
        followed,
        {name: _streams(model, blocks, followed, teacher.device) for name, model in models.items()},
        Bootstrap(clusters.count, options.bootstrap, options.seed),
        clusters.index.flatten(),
        torch.Generator().manual_seed(options.seed),
        teacher.card is not None and teacher.card.input_scaled,
    )


def _streams(model: PreTrainedModel, blocks: Blocks, followed: Tensor, device: torch.device) -> list[Tensor]:
    """Return a student's residual streams [D, H], one for each layer, computed on `device` where the student fits there."""
    with moved_to(model, device):
        return residual_streams(model, blocks, followed)


def real_tokens(blocks: Blocks) -> Tensor:
    """Return which tokens [N, S] are real."""
    mask = blocks.attention_mask
    return torch.ones_like(blocks.input_ids, dtype=torch.bool) if mask is None else mask.bool()
