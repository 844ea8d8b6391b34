"""Texts that a model continues together, token by token: the model in memory, or streamed layer by layer."""

from typing import Protocol

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from moe2dense.losses.tiled import compute_dtype
from moe2dense.modeling.decoder import decoder_of
from moe2dense.modeling.head import model_head
from moe2dense.modeling.internals import cache_arguments, cache_of
from moe2dense.teacher.decode import Decoder
from moe2dense.teacher.kinds import AnyTeacher
from moe2dense.teacher.model import Teacher

# N texts, P prompt length, V vocabulary


class TextDecoder(Protocol):
    """N texts that are continued together."""

    def prefill(self) -> Tensor:
        """Read the prompts; return the logits [N, V] of the next tokens."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens [N]; return the logits [N, V] that follow them."""
        ...


class ResidentDecoder:
    """A `TextDecoder` of a model in memory. `Decoder` (moe2dense/teacher/decode.py) is that of a streamed teacher."""

    def __init__(self, model: PreTrainedModel, prompts: Tensor):
        """Prepare to continue prompts [N, P]."""
        self.body, self.head, self.prompts = decoder_of(model), model_head(model), prompts
        self.cache: Cache | None = None

    def prefill(self) -> Tensor:
        """Return next-token logits [N, V] of every prompt."""
        return self._logits(self.prompts)

    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens [N]; return the logits [N, V] that follow them."""
        return self._logits(tokens[:, None])

    @torch.no_grad()
    def _logits(self, ids: Tensor) -> Tensor:
        ids = ids.to(self.head.weight.device)
        output = self.body(input_ids=ids, use_cache=True, **cache_arguments(self.body, self.cache))
        self.cache = cache_of(output)
        logits = self.head.logits(output.last_hidden_state[:, -1])
        return logits.to(compute_dtype(logits.dtype))


def decoder_for(teacher: AnyTeacher, prompts: Tensor) -> TextDecoder:
    """Return a decoder that lets a teacher of either kind continue prompts [N, P]."""
    return Decoder(teacher, prompts.tolist()) if isinstance(teacher, Teacher) else ResidentDecoder(teacher, prompts)
