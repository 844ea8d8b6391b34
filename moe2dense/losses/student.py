"""The student and its objective as one module, so that wrappers for many processes see a single forward pass."""

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


class Objective(nn.Module):
    """Maps inputs of the model and the teacher's rows to (total, kd, ce, watched), see `distillation_loss`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor], teacher: TeacherRows | None, **options: Any) -> tuple[Tensor, ...]:
        """inputs [N, S]; teacher: N S rows; options: labels, mask [n] and the rest of `distillation_loss`."""
        hidden = final_hidden(self.model, inputs).flatten(0, 1)
        loss = distillation_loss(hidden, model_head(self.model), teacher, **options)
        return loss.total, loss.kd, loss.ce, loss.watched


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
