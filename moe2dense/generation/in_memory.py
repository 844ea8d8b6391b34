"""Let a transformers model in memory, such as a student, continue the first tokens of blocks."""

from collections.abc import Collection

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe2dense.common.seeds import uniforms
from moe2dense.generation.decoders import ResidentDecoder
from moe2dense.generation.mixed_sampling import MixedSampler, TokenChooser
from moe2dense.generation.sampling import Sampling, choose
from moe2dense.modeling.forward import evaluation_mode

# N blocks, S block length
ROWS_AT_ONCE = 64


@torch.no_grad()
def continued(
    model: PreTrainedModel,
    input_ids: Tensor,
    prompt: int,
    sampling: Sampling,
    numbers: list[int],
    stop: Collection[int] = (),
    sampler: MixedSampler | None = None,
    at_once: int = ROWS_AT_ONCE,
) -> Tensor:
    """Return input_ids [N, S] with everything after the first `prompt` tokens written by the model; ids on the CPU.

    numbers: one per row; a row's text depends on the seed and its number, not on the other rows. A block is read as one
    document, without dropout. At most `at_once` rows have their keys and values in memory, and those rows end together: when
    each has written an id of `stop`, the tokens after that are left as they were. `sampler` chooses the words in place of
    `sampling` and records their log-probabilities.
    """
    parts = []
    with evaluation_mode(model):
        for start in range(0, len(input_ids), at_once):
            rows = slice(start, start + at_once)
            chooser = None if sampler is None else sampler.chooser(start)
            parts.append(_continue(model, input_ids[rows], prompt, sampling, numbers[rows], stop, chooser))
    return torch.cat(parts) if parts else input_ids.clone()


def _continue(
    model: PreTrainedModel,
    ids: Tensor,
    prompt: int,
    sampling: Sampling,
    numbers: list[int],
    stop: Collection[int],
    chooser: TokenChooser | None,
) -> Tensor:
    device, length = next(model.parameters()).device, ids.shape[1]
    drawn = torch.stack([torch.from_numpy(uniforms(sampling.seed, n, length - prompt)) for n in numbers]).to(device)
    written = ids.clone().to(device)
    decoder = ResidentDecoder(model, written[:, :prompt])
    logits = decoder.prefill()
    ends, ended = torch.tensor(sorted(stop), device=device), torch.zeros(len(ids), dtype=torch.bool, device=device)
    for at in range(prompt, length):
        u = drawn[:, at - prompt]
        tokens = chooser(written[:, :at], logits, u) if chooser else choose(logits, sampling, u)
        written[:, at] = tokens
        ended |= torch.isin(tokens, ends) if stop else ended
        if at + 1 == length or (stop and bool(ended.all())):
            break
        logits = decoder.step(tokens)
    return written.cpu()
