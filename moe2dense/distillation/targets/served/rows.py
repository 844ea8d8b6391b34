"""From blocks to the sequences that a server is asked for, and back from its answers to rows of the blocks.

A block may hold several documents and padding. A server keeps no documents apart, so each is a sequence of its own.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from moe2dense.data.blocks import Blocks
from moe2dense.distillation.targets.served.answers import TopK

# N blocks, S block length, k stored tokens per position

# block, place of its first token in it, ids
BlockSequence = tuple[int, int, list[int]]


def sequences_of(blocks: Blocks) -> list[BlockSequence]:
    """Return the documents of the blocks, without padding, in their order."""
    documents = torch.zeros_like(blocks.input_ids) if blocks.document_ids is None else blocks.document_ids.long()
    if blocks.attention_mask is not None:
        documents = torch.where(blocks.attention_mask.bool(), documents, torch.full_like(documents, -1))
    sequences = []
    for number, (ids, row) in enumerate(zip(blocks.input_ids, documents, strict=True)):
        borders = [0, *((row[1:] != row[:-1]).nonzero()[:, 0] + 1).tolist(), len(row)]
        for start, stop in pairwise(borders):
            if int(row[start]) >= 0:
                sequences.append((number, start, ids[start:stop].tolist()))
    return sequences


def answers_of(blocks: Blocks, sequences: Sequence[BlockSequence], answers: Sequence[TopK], k: int) -> TopK:
    """Return ids [N, S, k] int32 and log_p [N, S, k] of all blocks. Padding has all of its mass outside the k tokens."""
    shape = (*blocks.input_ids.shape, k)
    ids: Tensor = torch.arange(k, dtype=torch.int32).expand(shape).clone()
    log_p = torch.full(shape, -6e4)
    for (number, start, tokens), answer in zip(sequences, answers, strict=True):
        place = slice(start, start + len(tokens))
        ids[number, place] = answer.ids.to(torch.int32)
        log_p[number, place] = answer.log_p
    return TopK(ids, log_p)
