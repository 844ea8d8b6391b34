"""Words drawn from a model, or from a mixture of it with its teacher, and how likely each of them was.

Teacher-mixed sampling is MiniLLM's (2306.08543): the next word comes from share * teacher + (1 - share) * student.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moe2dense.generation.sampling import Sampling, choose, nucleus

# N texts, S text length, n texts that are written together, V vocabulary
Open = Callable[[Tensor], Any]  # prompts [n, P] -> a decoder of the teacher, with `prefill` and `step`


class Draws:
    """Chooses the words of N texts and keeps, at each word's place, its log-probabilities; 0 where none was drawn.

    log_q [N, S]: under the model as it is; log_b [N, S]: under what it was drawn from: the model at the temperature and top-p of
    `sampling`, mixed with `share` of the teacher (as it is). Only the first `vocabulary` ids are drawn.
    """

    def __init__(
        self, texts: int, length: int, sampling: Sampling, vocabulary: int, teacher: Open | None, share: float
    ):
        self.log_q = torch.zeros(texts, length, dtype=torch.float64)
        self.log_b = torch.zeros_like(self.log_q)
        self.sampling, self.vocabulary, self.teacher, self.share = sampling, vocabulary, teacher, share

    def of(self, first: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """What chooses the words of the texts from number `first` on: (text so far [n, t], logits [n, V], uniform numbers [n])."""
        decoder: Any = None

        def draw(text: Tensor, logits: Tensor, u: Tensor) -> Tensor:
            nonlocal decoder
            beside = None
            if decoder is not None:
                beside = decoder.step(text[:, -1].cpu())
            elif self.teacher is not None:
                decoder = self.teacher(text.cpu())
                beside = decoder.prefill()
            return self._draw(slice(first, first + len(text)), text.shape[1], logits, beside, u)

        return draw

    def _draw(self, rows: slice, at: int, logits: Tensor, beside: Tensor | None, u: Tensor) -> Tensor:
        own = logits[:, : self.vocabulary].double()
        b = nucleus((own / self.sampling.temperature).softmax(-1), self.sampling.top_p)
        b = b / b.sum(-1, keepdim=True)
        if beside is not None:
            taught = beside[:, : self.vocabulary].to(own.device).double().softmax(-1)
            b = self.share * taught + (1 - self.share) * b
        log_b = b.log()
        tokens = choose(log_b, Sampling(), u)
        for kept, found in ((self.log_q, F.log_softmax(own, -1)), (self.log_b, log_b)):
            kept[rows, at] = found.gather(1, tokens[:, None])[:, 0].cpu()
        return tokens
