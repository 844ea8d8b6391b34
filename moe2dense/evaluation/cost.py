"""Count what judging costs, from shapes alone: scores, what became of the experts, small tasks."""

from typing import TYPE_CHECKING

from moe2dense.common.flops import gated_ffn, product
from moe2dense.evaluation.skill_probes import CANDIDATES, SKILLS
from moe2dense.evaluation.transfer.coverage import eigen_flops
from moe2dense.evaluation.transfer.expert_function import RANDOM_NEURONS
from moe2dense.evaluation.transfer.measure import PROBE_TOKENS, SAMPLE
from moe2dense.modeling.products import Products
from moe2dense.modeling.shape import Geometry

if TYPE_CHECKING:
    from moe2dense.student.target.resolve import Target

# n tokens of a sample, M width, H hidden size
_TASK_TOKENS = 24  # of a small task and one of its candidates, about


def scoring_flops(target: "Target", body: Products, blocks: int, length: int) -> float:
    """Return the FLOPs of comparing a student with its teacher's hidden states on [blocks, length] tokens."""
    sizes = target.config
    student = product(blocks * (length - 1), sizes.hidden_size, sizes.vocab_size)
    return body.forward(blocks, length) + student + head_flops(target.teacher, blocks, length)


def head_flops(shape: Geometry, blocks: int, length: int) -> float:
    """Return the FLOPs of a teacher's logits at every position whose next token is known."""
    return product(blocks * (length - 1), shape.hidden_size, shape.vocab_size)


def transfer_flops(target: "Target", blocks: int, length: int) -> float:
    """Return the FLOPs of measuring what became of the experts, apart from the passes of the teacher and of two students.

    Two students' FFNs are compared on every token; each expert's function is read from a sample.
    """
    shape, width, hidden = target.teacher, target.width, target.config.hidden_size
    tokens, experts = blocks * length, shape.num_experts
    routed = tokens * shape.top_k / max(experts, 1)
    sample = min(SAMPLE, routed)
    probes = max(8, min(64, PROBE_TOKENS // max(1, experts))) * experts
    of_an_expert = gated_ffn(sample, shape.expert_width, hidden) + gated_ffn(sample, width, hidden)
    draws = max(1, min(8, RANDOM_NEURONS // max(width, 1)))
    of_an_expert += 2 * draws * product(sample, hidden, width) + (1 + 2 * draws) * _ridge(sample, 1 / 3, width, hidden)
    of_an_expert += gated_ffn(probes, shape.expert_width, hidden)
    random = 2 * product(2 * sample, hidden, width) + _ridge(min(2 * SAMPLE, tokens), 0.5, width, hidden)
    layer = 2 * gated_ffn(tokens, width, hidden) + experts * of_an_expert + random
    return len(shape.moe_layers) * layer


def _ridge(sample: float, held_out: float, width: int, hidden: int) -> float:
    """Return the FLOPs of a ridge regression in the dual, on so many tokens with a share of them held out."""
    fitted = sample * (1 - held_out)
    return product(sample, width, fitted) + eigen_flops(fitted) + product(sample + fitted, fitted, hidden)


def skill_tokens(count: int) -> int:
    """Return about how many tokens the small tasks take, of which there are `count` of each kind."""
    return count * len(SKILLS) * CANDIDATES * _TASK_TOKENS
