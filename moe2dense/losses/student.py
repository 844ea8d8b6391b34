"""The student and its objective as one module, so that wrappers for many processes see a single forward pass."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe2dense.losses.distillation import distillation_loss
from moe2dense.losses.head import model_head
from moe2dense.losses.rows import TeacherRows

# N blocks, S block length, H hidden, n = N S tokens


def final_hidden(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The normed hidden states [N, S, H] that the head of a causal language model reads; logits are not computed."""
    whole = model.get_base_model() if hasattr(model, "peft_config") else model
    return whole.base_model(**inputs, use_cache=False).last_hidden_state


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of a causal language model, in order."""
    whole = model.get_base_model() if hasattr(model, "peft_config") else model
    count = whole.config.get_text_config().num_hidden_layers
    return next(m for m in whole.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)


@contextlib.contextmanager
def captured_layers(model: Any, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Fills a dict with the output [n, H] of the layers asked for while the model runs; others are left alone."""
    found: dict[int, Tensor] = {}
    modules, handles = decoder_layers(model), []

    def keep(index: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            found[index] = (output[0] if isinstance(output, tuple) else output).flatten(0, 1)

        return hook

    try:
        handles += [modules[i].register_forward_hook(keep(i)) for i in layers]
        yield found
    finally:
        for handle in handles:
            handle.remove()


class Objective(nn.Module):
    """Maps inputs of the model and the teacher's rows to (total, kd, ce, watched, features), see `distillation_loss`.

    match: a `HiddenMatch`, whose loss on the teacher's features joins the total with `feature_weight`.
    """

    def __init__(self, model: nn.Module, match: Any = None):
        super().__init__()
        self.model, self.match = model, match

    def forward(
        self, inputs: dict[str, Tensor], teacher: TeacherRows | None, feature_weight: float = 0.0, **options: Any
    ) -> tuple[Tensor, ...]:
        """inputs [N, S]; teacher: N S rows; options: labels, mask [n] and the rest of `distillation_loss`."""
        layers = self.match.student_layers if feature_weight else []
        with captured_layers(self.model, layers) as states:
            hidden = final_hidden(self.model, inputs).flatten(0, 1)
        loss = distillation_loss(hidden, model_head(self.model), teacher, **options)
        if not feature_weight:
            return loss.total, loss.kd, loss.ce, loss.watched, torch.zeros_like(loss.kd)
        mask = options.get("mask")
        counted = torch.ones(len(hidden), device=hidden.device) if mask is None else mask.float()
        goals = {k: v.to(hidden.dtype) for k, v in teacher.features.items()}  # type: ignore[union-attr]
        features = self.match(states, goals, counted.to(hidden.dtype) / options["denominator"])
        return loss.total + feature_weight * features, loss.kd, loss.ce, loss.watched, features.detach()


@torch.no_grad()
def head_error(model: Any, inputs: dict[str, Tensor]) -> float:
    """How far final hidden states times head are from the model's own logits, relative to their spread.

    Not small when an architecture changes its logits in a way that `losses/head.py` does not know.
    """
    training = model.training
    model.eval()
    own = model(**inputs, use_cache=False).logits.float()
    ours = model_head(model).logits(final_hidden(model, inputs)).float()
    model.train(training)
    return float((own - ours).abs().max() / own.std().clamp(min=1e-12))
