"""Draw words from a model, or from a mixture of it with its teacher, and record how likely each of them was.

Teacher-mixed sampling is MiniLLM's (2306.08543): the next word comes from share * teacher + (1 - share) * student.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from moe2dense.generation.decoders import TextDecoder
from moe2dense.generation.sampling import Sampling, choose, nucleus

# N texts, S text length, n texts that are written together, V vocabulary
# prompts [n, P] -> a decoder of the teacher
OpenDecoder = Callable[[Tensor], TextDecoder]
# (texts so far [n, t], logits [n, V], uniform numbers [n]) -> next tokens [n]
TokenChooser = Callable[[Tensor, Tensor, Tensor], Tensor]


class MixedSampler:
    """Chooses the words of N texts and records the log-probabilities of each at its position, 0 elsewhere.

    log_q [N, S]: under the model as it is; log_b [N, S]: under the distribution it was drawn from: the model at the temperature
    and top-p of `sampling`, mixed with `share` of the teacher as it is. Only the first `vocabulary` ids are drawn.
    """

    def __init__(
        self,
        texts: int,
        length: int,
        sampling: Sampling,
        vocabulary: int,
        open_teacher: OpenDecoder | None,
        share: float,
    ):
        self.log_q = torch.zeros(texts, length, dtype=torch.float64)
        self.log_b = torch.zeros_like(self.log_q)
        self.sampling, self.vocabulary, self.share = sampling, vocabulary, share
        self.open_teacher = open_teacher

    def chooser(self, first: int) -> TokenChooser:
        """Return a function that chooses the words of the texts from number `first` on."""
        decoder: TextDecoder | None = None

        def choose_tokens(text: Tensor, logits: Tensor, u: Tensor) -> Tensor:
            nonlocal decoder
            teacher_logits = None
            if decoder is not None:
                teacher_logits = decoder.step(text[:, -1].cpu())
            elif self.open_teacher is not None:
                decoder = self.open_teacher(text.cpu())
                teacher_logits = decoder.prefill()
            return self._draw(slice(first, first + len(text)), text.shape[1], logits, teacher_logits, u)

        return choose_tokens

    def _draw(self, rows: slice, at: int, logits: Tensor, teacher_logits: Tensor | None, u: Tensor) -> Tensor:
        own = logits[:, : self.vocabulary].double()
        b = nucleus((own / self.sampling.temperature).softmax(-1), self.sampling.top_p)
        b = b / b.sum(-1, keepdim=True)
        if teacher_logits is not None:
            p = teacher_logits[:, : self.vocabulary].to(own.device).double().softmax(-1)
            b = self.share * p + (1 - self.share) * b
        log_b = b.log()
        tokens = choose(log_b, Sampling(), u)
        for record, values in ((self.log_q, F.log_softmax(own, -1)), (self.log_b, log_b)):
            record[rows, at] = values.gather(1, tokens[:, None])[:, 0].cpu()
        return tokens
