"""Heal a built student: fit it end to end to the teacher's distributions and hidden states on the build's own tokens.

The build computes the teacher's hidden states of these tokens anyway, so nothing more is read of the teacher. Following the
states after every layer (hints: FitNets 1412.6550, TinyBERT 1909.10351) keeps the student from learning so few tokens by
heart: on the example teacher the held-out divergence falls from 0.162 to 0.148 nats, that on the fitted tokens does not.
"""

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe2dense.common.devices import CPU, device_with_room, fast_products
from moe2dense.common.processes import add_over_processes
from moe2dense.common.shared_rows import any_row, share_of_rows
from moe2dense.config.training import TrainConfig
from moe2dense.losses.distillation import distillation_loss
from moe2dense.losses.hidden_states import token_mse
from moe2dense.losses.teacher_rows import HiddenRows
from moe2dense.modeling.forward import final_hidden
from moe2dense.modeling.head import Head, OutputHead, model_head
from moe2dense.modeling.hooks import captured
from moe2dense.optimizers.memory_ladder import in_words
from moe2dense.optimizers.prepare import optimizer_of, prepared
from moe2dense.student.build.heal_memory import CLIP, heal_blocks, heal_bytes, heal_changes
from moe2dense.student.build.layer_runner import LayerRunner
from moe2dense.student.build.state import BuildState, Progress
from moe2dense.student.fit import Fit, fit, fit_at_a_rate_that_helps

if TYPE_CHECKING:
    from moe2dense.teacher.model import Teacher

# N blocks, S block length, H hidden
_CHECK_BLOCKS = 8  # held-out blocks that are run at once
_REPORT_EVERY = 10  # steps


def plain_head(teacher: "Teacher", device: torch.device) -> Head:
    """Return the teacher's head on a device, in the precision of the build."""
    head, dtype = teacher.head, torch.get_default_dtype()
    bias = None if head.bias is None else head.bias.to(device, dtype)
    return Head(head.weight.to(device, dtype), bias, head.scale, head.softcap)


def kl_of(
    model: PreTrainedModel,
    runner: LayerRunner,
    head: OutputHead,
    teacher_head: OutputHead,
    targets: Tensor,
    pick: Tensor,
    real: Tensor,
) -> Tensor:
    """Return the mean KL(teacher || student) in nats per real token of the blocks `pick`.

    targets [N, S, H]: the teacher's final hidden states; real [N, S] bool.
    """
    inputs = {"input_ids": runner.ids, "attention_mask": runner.mask, "position_ids": runner.positions}
    device = head.weight.device
    hidden = final_hidden(model, {name: value[pick].to(device) for name, value in inputs.items() if value is not None})
    rows = HiddenRows(targets[pick].to(device).reshape(-1, targets.shape[-1]), teacher_head)
    mask = real[pick].reshape(-1).to(device)
    return distillation_loss(hidden.reshape(-1, hidden.shape[-1]), head, rows, mask=mask).total


def mean_kl(
    model: PreTrainedModel,
    runner: LayerRunner,
    head: OutputHead,
    teacher_head: OutputHead,
    targets: Tensor,
    blocks: Tensor,
    real: Tensor,
    at_once: int = _CHECK_BLOCKS,
) -> float:
    """Return the mean KL of `blocks`, of all processes, computed for some of them at a time; arguments as of `kl_of`."""
    total = 0.0
    with torch.no_grad():
        for part in blocks.split(at_once) if len(blocks) else ():
            total += float(kl_of(model, runner, head, teacher_head, targets, part, real)) * float(real[part].sum())
    sums = torch.tensor([total, float(real[blocks].sum())], dtype=torch.float64)
    add_over_processes(sums)
    return float(sums[0]) / max(float(sums[1]), 1.0)


def hint_loss(states: dict[str, Tensor], hints: dict[str, Tensor], pick: Tensor, real: Tensor) -> Tensor:
    """Return the mean over layers and real tokens of the squared error of states [n S, H] relative to hints [N, S, H]."""
    device = next(iter(states.values())).device
    weight = real[pick].reshape(-1).to(device, next(iter(states.values())).dtype)
    missed = [
        (token_mse(states[name], goal[pick].to(states[name].device, states[name].dtype).flatten(0, 1)) * weight).sum()
        for name, goal in hints.items()
    ]
    return torch.stack(missed).mean() / weight.sum().clamp_min(1)


def heal(
    model: PreTrainedModel,
    state: BuildState,
    targets: Tensor,
    hints: dict[str, Tensor],
    train: TrainConfig,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train all weights with forward KL for `heal_epochs` over the build's blocks; keep the values best on held-out ones.

    Several processes train a copy each, on gradients of the blocks of all.

    targets [N, S, H]: the teacher's final hidden states. hints: {"hidden-0": [N, S, H], ...} its states after layers of the
    student, which count with weight `heal_hints`. train: how steps are made to fit memory (`heal_settings`). Return a record:
    held-out KL before and after, the step kept, seconds.
    """
    begun, config, runner = time.monotonic(), state.config, state.runner
    rows, held_out = torch.nonzero(~state.held_out).flatten(), torch.nonzero(state.held_out).flatten()
    share = share_of_rows(len(rows))
    if not any_row(state.held_out) or share.total == 0:
        return {"heal_best_step": 0}
    real = state.real_tokens.view(runner.ids.shape)
    block = runner.ids.shape[1]
    need = heal_bytes(train, state.target, block, on_gpu=runner.device != CPU, masks=runner.mask_use())
    device = device_with_room(runner.device, need)
    batch = heal_blocks(config, block)
    steps = max(1, round(config.heal_epochs * share.total / batch))
    teacher_head, changes = plain_head(state.teacher, device), heal_changes(train)

    def loss(pick: Tensor) -> Tensor:
        blocks = rows[pick]
        with captured(model, tuple(hints)) as states:
            kl = kl_of(model, runner, model_head(model), teacher_head, targets, blocks, real)
        return kl + config.heal_hints * hint_loss(states, hints, blocks, real) if hints else kl

    def held_out_kl() -> float:
        at_once = min(_CHECK_BLOCKS, batch) if changes else _CHECK_BLOCKS
        return mean_kl(model, runner, model_head(model), teacher_head, targets, held_out, real, at_once)

    def weigh(pick: Tensor) -> float:
        return float(real[rows[pick]].sum())  # both losses are means over real tokens

    def tell(step: int) -> None:
        if progress and (step % _REPORT_EVERY == 0 or step == steps):
            progress("heal", step, steps)

    def run(rate: float) -> Fit:
        with optimizer_of(parameters, train, rate) as optimizer:
            return fit(
                parameters, loss, held_out_kl, share, steps, rate, batch, state.seed, clip=CLIP, warmup=0.03,
                optimizer=optimizer, best_rest=CPU, weigh=weigh, after_step=tell,
            )  # fmt: skip

    with prepared(model, train, state.seed), fast_products():
        nn.Module.to(model, device)
        model.tie_weights()
        parameters: list[Tensor] = list(model.parameters())
        result, rate = fit_at_a_rate_that_helps(run, config.heal_lr, tries=2)
        nn.Module.to(model, CPU)
        model.tie_weights()
    record = {"heal_memory": in_words(changes, named=False)} if changes else {}
    return record | {
        "heal_kl_before": round(result.before, 6),
        "heal_kl_after": round(result.after, 6),
        "heal_best_step": result.best_step,
        "heal_rate": rate,
        "seconds": round(time.monotonic() - begun, 2),
    }
