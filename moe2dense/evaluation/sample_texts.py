"""Which held-out prompts student and teacher continue, how the student writes, and how much the teacher may write."""

import itertools
import random

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe2dense.common.units import parse_bytes, show_bytes
from moe2dense.data.blocks import Blocks
from moe2dense.generation.in_memory import continued
from moe2dense.generation.sampling import Sampling
from moe2dense.teacher.model import Teacher

# n prompts, P prompt tokens, C tokens of a continuation

LEAST_TOKENS = 8  # a teacher that may write fewer writes none


def choose_prompts(blocks: Blocks, count: int, prompt: int, new: int, seed: int = 0) -> tuple[list[int], int, int]:
    """Return (rows of blocks, P, C): up to `count` blocks, spread over the domains.

    Each begins with P + C real tokens of one document. Blocks that are shorter than asked for give half their length to
    the prompt.
    """
    length = blocks.input_ids.shape[1]
    if prompt + new > length:
        prompt = length // 2
        new = length - prompt
    usable = torch.ones(len(blocks), dtype=torch.bool)
    if blocks.attention_mask is not None:
        usable &= blocks.attention_mask[:, : prompt + new].bool().all(1)
    if blocks.document_ids is not None:
        usable &= (blocks.document_ids[:, : prompt + new] == blocks.document_ids[:, :1]).all(1)
    rows = usable.nonzero()[:, 0].tolist()
    random.Random(seed).shuffle(rows)
    latest: dict[str, int] = {}
    turn = {}
    for row in rows:  # the first block of every domain, then the second of each
        turn[row] = latest[blocks.domains[row]] = latest.get(blocks.domains[row], -1) + 1
    return sorted(rows, key=lambda r: turn[r])[:count], prompt, new


def student_texts(
    model: PreTrainedModel, prompts: Tensor, new: int, stop: set[int], sampling: Sampling
) -> list[list[int]]:
    """Return token ids that a transformers model writes after prompts [n, P], without the closing token.

    They are drawn as `moe2dense.generation.streamed.generate` draws.
    """
    room = torch.zeros(len(prompts), new, dtype=prompts.dtype)
    written = continued(
        model, torch.cat([prompts, room], 1), prompts.shape[1], sampling, list(range(len(prompts))), stop
    )
    return [
        list(itertools.takewhile(lambda token: token not in stop, row))
        for row in written[:, prompts.shape[1] :].tolist()
    ]


def teacher_tokens(teacher: Teacher, new: int, limit: str) -> tuple[int, str]:
    """Return (how many tokens the teacher writes, 0 = none; how, in words) within `limit` bytes read from disk."""
    if teacher.resident:
        return new, "The teacher wrote from memory."
    size = teacher.checkpoint.nbytes
    most = min(new, parse_bytes(limit, "evaluate.teacher_read") // size)
    if most < LEAST_TOKENS:
        return 0, (
            f"The teacher wrote nothing: it does not fit in memory, every token would read its {show_bytes(size)} from disk, and "
            f"the limit is {limit} (evaluate.teacher_read)."
        )
    cut = f", so both texts stop after {most} tokens (evaluate.teacher_read {limit})" if most < new else ""
    return most, f"The teacher wrote streamed from disk, {show_bytes(size)} a token{cut}."
