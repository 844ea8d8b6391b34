"""What a transformers model in memory, such as a student, writes after the heads of blocks."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from moe2dense.common.seeds import uniforms
from moe2dense.generation.mixed_sampling import Draws
from moe2dense.generation.sampling import Sampling, choose
from moe2dense.losses.tiled import compute_dtype
from moe2dense.modeling.decoder import decoder_of
from moe2dense.modeling.forward import evaluation_mode
from moe2dense.modeling.head import model_head
from moe2dense.modeling.internals import cache_arguments, cache_of

# N blocks, S block length, P prompt length, H hidden, V vocabulary
ROWS = 64  # continued at a time


class ResidentDecoder:
    """Texts being continued together by a model in memory, as `Decoder` (moe2dense/teacher/decode.py) for a streamed teacher."""

    def __init__(self, model: Any, prompts: Tensor):
        """prompts [N, P]."""
        self.decoder = decoder_of(model)
        self.head, self.prompts, self.cache = model_head(model), prompts, None

    def prefill(self) -> Tensor:
        """Next-token logits [N, V] of every prompt."""
        return self._logits(self.prompts)

    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens [N]; the logits [N, V] that follow them."""
        return self._logits(tokens[:, None])

    @torch.no_grad()
    def _logits(self, fresh: Tensor) -> Tensor:
        caching = cache_arguments(self.decoder, self.cache)
        out = self.decoder(input_ids=fresh.to(self.head.weight.device), use_cache=True, **caching)
        self.cache = cache_of(out)
        logits = self.head.logits(out.last_hidden_state[:, -1])
        return logits.to(compute_dtype(logits.dtype))


@torch.no_grad()
def continued(
    model: Any,
    input_ids: Tensor,
    prompt: int,
    sampling: Sampling,
    numbers: list[int],
    stop: Collection[int] = (),
    draws: Draws | None = None,
    at_once: int = ROWS,
) -> Tensor:
    """input_ids [N, S] with everything after the first `prompt` tokens written by the model; ids on the CPU.

    numbers: one per row; a row's text depends on the seed and its number, not on the rows beside it. A block is read as one
    document. Dropout is off. Keys and values of at most `at_once` rows are held, and those rows end together: when each has
    written an id of `stop`, what follows is left as it was. `draws` chooses the words in place of `sampling` and notes their odds.
    """
    with evaluation_mode(model):
        parts = [
            _continue(
                model, input_ids[a : a + at_once], prompt, sampling, numbers[a : a + at_once], stop, draws and draws.of(a)
            )
            for a in range(0, len(input_ids), at_once)
        ]
    return torch.cat(parts) if parts else input_ids.clone()


def _continue(
    model: Any, ids: Tensor, prompt: int, sampling: Sampling, numbers: list[int], stop: Collection[int], draw: Any
) -> Tensor:
    device, length = next(model.parameters()).device, ids.shape[1]
    drawn = torch.stack([torch.from_numpy(uniforms(sampling.seed, n, length - prompt)) for n in numbers]).to(device)
    written = ids.clone().to(device)
    decoder = ResidentDecoder(model, written[:, :prompt])
    logits = decoder.prefill()
    ends, ended = torch.tensor(sorted(stop), device=device), torch.zeros(len(ids), dtype=torch.bool, device=device)
    for at in range(prompt, length):
        u = drawn[:, at - prompt]
        written[:, at] = fresh = draw(written[:, :at], logits, u) if draw else choose(logits, sampling, u)
        ended |= torch.isin(fresh, ends) if stop else ended
        if at + 1 == length or (stop and bool(ended.all())):
            break
        logits = decoder.step(fresh)
    return written.cpu()
