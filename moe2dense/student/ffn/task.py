"""Hold what a method needs to know of a layer to make its FFN, and what a method returns."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from moe2dense.common.shared_rows import Share
from moe2dense.config.schema import BuildConfig
from moe2dense.student.ffn.dense import DenseFFN, Experts, Gating, silu_glu
from moe2dense.student.ffn.energy import output_energy
from moe2dense.student.types import MIXED
from moe2dense.teacher.routing import LayerStats

# T tokens, E experts, F expert width, H hidden, M student FFN width
FEW_TOKENS_PER_NEURON = 10


@dataclass
class FFNTask:
    """One layer of the student whose FFN is to be made, and its teacher's layer. Tokens are real ones only, those of this process.

    Statistics of experts are those of all processes.
    """

    # M
    width: int
    hidden_size: int
    # [T, H] what enters the student's FFN
    x: Tensor
    # [T, H] what the FFN should write
    target: Tensor
    # FFNs that every token passes: shared experts, or the teacher's dense FFN
    always_on: list[DenseFFN]
    experts: Experts = ()
    stats: LayerStats | None = None
    # [E] router probability summed over tokens
    probability: Tensor | None = None
    # whether the routing weight multiplies an expert's input, not its output
    input_scaled: bool = False
    seed: int = 0
    # standard deviation of new weights
    std: float = 0.02
    gating: Gating = silu_glu
    config: BuildConfig = field(default_factory=BuildConfig)
    # most neurons a Gram matrix may have; 0 = no limit
    pool_limit: int = 0
    # [T] how much each token's squared error counts; None = all alike
    weights: Tensor | None = None
    # where Gram matrices are computed and neurons eliminated, if there is room
    device: torch.device | str = "cpu"
    # what x and target are of the tokens of all processes; None = all
    share: Share | None = None

    @property
    def gram_tokens(self) -> tuple[int, int]:
        """Return how many tokens an elimination looks at: of x, and of all processes."""
        share = self.share or Share(0, len(self.x), len(self.x))
        looked_at = min(share.total, self.config.gram_tokens or share.total)
        return share.of_first(looked_at), looked_at

    @property
    def ridge(self) -> float:
        """The ridge of an elimination, relative to the Gram matrix's mean diagonal: as set, or by the tokens a neuron has.

        On the example teacher 0.1 is best at 1.5 and 3.5 tokens for each of the student's neurons, 1e-3 from 20 on.
        """
        few = self.gram_tokens[1] < FEW_TOKENS_PER_NEURON * self.width
        return self.config.ridge or (1e-1 if few else 1e-3)

    @property
    def alpha(self) -> Tensor:
        """[E] mean routing weight of each expert over all tokens."""
        assert self.stats is not None
        return self.stats.alpha.float()

    @cached_property
    def energies(self) -> list[Tensor]:
        """[F] for each expert: router-weighted energy that its neurons write to the output, summed over tokens."""
        assert self.stats is not None and self.stats.neuron_energy is not None
        by_expert = self.stats.neuron_energy
        chosen = self.stats.count > 0  # the others wrote nothing, and need not be read
        return [
            output_energy(energy, self.experts[e].down) if chosen[e] else torch.zeros_like(energy)
            for e, energy in enumerate(by_expert)
        ]


@dataclass
class SourcedFFN:
    """An FFN of M neurons and where each comes from."""

    ffn: DenseFFN
    # [M] the routed expert, or one of the marks of student/types.py
    expert: Tensor
    # [M] the neuron's index in it; -1 where it comes from no single neuron
    neuron: Tensor


def without_source(ffn: DenseFFN, mark: int = MIXED) -> SourcedFFN:
    """Return an FFN whose neurons come from no single neuron of an expert: mixtures, or new ones."""
    return SourcedFFN(ffn, torch.full((ffn.width,), mark), torch.full((ffn.width,), -1))
