"""The student and its objective as one module, so that wrappers for many processes wrap a single forward pass."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe2dense.distillation.targets.protocols import row_features
from moe2dense.errors import UserError
from moe2dense.losses.distillation import distillation_loss
from moe2dense.losses.feature_match import FeatureMatch
from moe2dense.losses.hidden_states import Tokens
from moe2dense.losses.teacher_rows import TeacherRows
from moe2dense.modeling.documents import document_numbers
from moe2dense.modeling.forward import evaluation_mode, final_hidden
from moe2dense.modeling.head import model_head
from moe2dense.modeling.hooks import captured

# N blocks, S block length, H hidden, n = N S tokens


class Objective(nn.Module):
    """Maps inputs of the model and the teacher's rows to (total, kd, ce, watched, features), see `distillation_loss`.

    match: a `FeatureMatch`, whose losses on the teacher's features join the total with `feature_weights`. extra: a module of a
    training regime, whose loss (hidden [n, H], head, inputs, teacher, options) joins the total while training.
    """

    def __init__(self, model: PreTrainedModel, match: FeatureMatch | None = None, extra: nn.Module | None = None):
        super().__init__()
        self.model, self.match, self.extra = model, match, extra

    def forward(
        self,
        inputs: dict[str, Tensor],
        teacher: TeacherRows | None,
        feature_weights: Sequence[float] = (),
        **options: Any,
    ) -> tuple[Tensor, ...]:
        """Return the loss on inputs [N, S].

        teacher: N S rows; options: labels, mask [n] and the rest of `distillation_loss`.
        """
        with captured(self.model, self.match.student_features if self.match and feature_weights else ()) as states:
            hidden = final_hidden(self.model, inputs).flatten(0, 1)
        loss = distillation_loss(hidden, model_head(self.model), teacher, **options)
        if self.extra is not None and self.training:
            loss.total = loss.total + self.extra(hidden, model_head(self.model), inputs, teacher, options)
        features = torch.zeros_like(loss.kd)
        if self.match is not None and self.training:
            # wrappers for many processes expect every parameter in every pass
            loss.total = loss.total + sum(p.sum() * 0.0 for p in self.match.parameters())
        if feature_weights and self.match is not None:
            goals = _teacher_features(teacher, self.match.teacher_features, hidden.dtype)
            weighted, features = self.match(states, goals, _tokens(inputs, options, hidden), feature_weights)
            loss.total = loss.total + weighted
        # FSDP2 hooks what is returned, and warns of a view
        return loss.total.clone(), loss.kd, loss.ce, loss.watched, features


def _teacher_features(teacher: TeacherRows | None, names: Sequence[str], dtype: torch.dtype) -> dict[str, Tensor]:
    features = row_features(teacher)
    if missing := [n for n in names if n not in features]:
        raise UserError(f"features need the teacher's {missing[0]}, which these targets do not hold")
    return {n: features[n].to(dtype) for n in names}


def _tokens(inputs: dict[str, Tensor], options: dict[str, Any], hidden: Tensor) -> Tokens:
    """Return which tokens count for features, and which each sees: its document up to itself, without padding."""
    mask = options.get("mask")
    counted = torch.ones(len(hidden), device=hidden.device) if mask is None else mask
    return Tokens(counted.to(hidden.dtype) / options["denominator"], functools.partial(_seen, inputs))


def _seen(inputs: dict[str, Tensor]) -> Tensor:
    """Return [N, S, S] bool: which tokens (columns) each token sees."""
    shape, device = inputs["input_ids"].shape, inputs["input_ids"].device
    seen = torch.ones(*shape, shape[1], dtype=torch.bool, device=device).tril()
    if "position_ids" in inputs:
        documents = document_numbers(inputs["position_ids"])
        seen &= documents[:, :, None] == documents[:, None, :]
    if "attention_mask" in inputs:
        seen &= inputs["attention_mask"][:, None, :].bool() | torch.eye(shape[1], dtype=torch.bool, device=device)
    return seen


@torch.no_grad()
def head_error(model: PreTrainedModel, inputs: dict[str, Tensor]) -> float:
    """Return how far final hidden states times head are from the model's own logits, relative to their spread.

    It is not small when an architecture changes its logits in a way that `modeling/head.py` does not know.
    """
    with evaluation_mode(model):
        own = model(**inputs, use_cache=False).logits.float()
        ours = model_head(model).logits(final_hidden(model, inputs)).float()
    return float((own - ours).abs().max() / own.std().clamp(min=1e-12))
