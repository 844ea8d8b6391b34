"""distill(): train a dense student on its teacher's distributions, on one CPU, one GPU or many processes."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from moe2dense.common.processes import launched
from moe2dense.config.rates import training_rate
from moe2dense.config.training import TrainConfig
from moe2dense.data.blocks import Blocks
from moe2dense.data.frequency import count_tokens, rare_labels
from moe2dense.distillation.auto_features import make_match, settle_features
from moe2dense.distillation.batches import Batches
from moe2dense.distillation.checks import check_training, needs_teacher
from moe2dense.distillation.cost import passes
from moe2dense.distillation.regime import Regime
from moe2dense.distillation.regimes.make import make_regime
from moe2dense.distillation.targets.memory import as_targets, hidden_targets
from moe2dense.distillation.targets.protocols import HiddenStates, RoutedTargets, Targets
from moe2dense.distillation.targets.read_ahead import ReadAhead
from moe2dense.distillation.targets.store import StoredTargets
from moe2dense.distillation.targets.token_weights import normalized
from moe2dense.distillation.temperature import settle_temperature
from moe2dense.distillation.trainer import Trainer, TrainResult
from moe2dense.errors import UserError
from moe2dense.modeling.kinds import BuiltStudent, language_model
from moe2dense.teacher.kinds import AnyTeacher

__all__ = ["TrainResult", "distill"]

# N blocks, S block length


def distill(
    student: BuiltStudent | PreTrainedModel,
    teacher: AnyTeacher | None = None,
    data: Blocks | None = None,
    *,
    tokens: int | None = None,
    targets: Targets | HiddenStates | None = None,
    valid: Blocks | None = None,
    valid_targets: Targets | HiddenStates | None = None,
    config: TrainConfig | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Callable[..., None] | None = None,
    accelerator: Accelerator | None = None,
    regime: Regime | None = None,
    token_counts: Tensor | None = None,
    device: torch.device | None = None,
    after_save: Callable[[], None] | None = None,
) -> TrainResult:
    """Train `student` (a Student or a transformers causal language model) in place to answer like its teacher.

    data: N blocks of S tokens; `tokens`: how many of their positions to use (default: all), each seen config.epochs times.
    The teacher's answers come from `targets` (stored, in memory, or hidden states with a head) or, computed once, from
    `teacher`. `valid`, with `valid_targets` or the teacher, is measured every config.eval_every steps. With `out`,
    out/metrics.jsonl and out/checkpoints are written, and `resume` continues the last checkpoint, bit by bit on a CPU. With
    config.shard on several processes the student is left spread over them; `Checkpoints(out / "checkpoints").load_weights`
    puts the result into a whole model. token_counts [V]: how often each id occurs in the text that says which held-out tokens
    are rare; by default `data`. `regime` changes where text, targets or models come from
    (moe2dense.distillation.regimes). device: the CPU, to train there although there is a GPU. after_save: called by a
    thread of the first process once a checkpoint is whole; the next checkpoint waits for it, the steps before do not. Raises UserError for arguments that do not fit together, for targets of another text,
    and when the loss is not finite.
    """
    model = language_model(student)
    data, block = _checked_data(data, tokens)
    config = _with_learning_rate(config or TrainConfig(), model)
    if config.regime and regime is None:
        regime = make_regime(config.regime, teacher=teacher)
    _check_arguments(config, teacher, targets, out, regime)
    answers = None if targets is None else as_targets(targets, data)
    data = data if tokens is None else data[: tokens // block]
    if not any(bool(part.loss_mask().any()) for part in data.in_parts()):
        raise UserError("data: no token carries loss; the blocks are masked throughout")
    config = settle_features(config, student, answers, teacher, regime)
    config = dataclasses.replace(config, epochs=passes(config, data.tokens, model.num_parameters()))
    match = make_match(config, model, answers, teacher, seed) if config.features else None
    if answers is None and teacher is not None and not (regime is not None and regime.brings_targets):
        features, routing = match.teacher_features if match else (), [config.token_weights] * bool(config.token_weights)
        answers = hidden_targets(teacher, data, features=features, routing=routing, progress=progress)
    held_out = _held_out_batches(
        valid, valid_targets, teacher, count_tokens(data) if token_counts is None else token_counts
    )
    batches = Batches(data, answers, weights=_token_weights(config, answers, data))
    if config.temperature_schedule == "auto":
        best = settle_temperature(model, batches, held_out, config, seed, out, accelerator, device)
        config = dataclasses.replace(config, temperature=best, temperature_schedule="")
    with contextlib.ExitStack() as stack:
        batches.source = answers.identity if isinstance(answers, StoredTargets) else ""
        if isinstance(answers, StoredTargets) and regime is None:
            per_step = max(1, config.batch // block)
            ahead = ReadAhead(answers, len(data), per_step, config.epochs, seed, config.micro_batch, *launched())
            stack.callback(ahead.close)
            batches.targets = ahead
        trainer = Trainer(model, batches, held_out, config, seed, out, accelerator, match, regime, device, after_save)
        return trainer.run(resume, progress)


def _checked_data(data: Blocks | None, tokens: int | None) -> tuple[Blocks, int]:
    """Return (data, block length). Raises UserError where there is nothing to train on."""
    if data is None or not len(data):
        raise UserError("data: distillation needs at least one block of text")
    block = data.input_ids.shape[1]
    if tokens is not None and tokens < block:
        raise UserError(f"tokens={tokens} is less than one block of {block}; nothing would be trained")
    return data, block


def _with_learning_rate(config: TrainConfig, model: PreTrainedModel) -> TrainConfig:
    """Return `config` with a learning rate that suits the model, where none was chosen."""
    if config.lr > 0:
        return config
    sizes = model.config.get_text_config()
    rate = training_rate(sizes.hidden_size, sizes.num_hidden_layers, config.lora > 0)
    return dataclasses.replace(config, lr=rate)


def _check_arguments(
    config: TrainConfig,
    teacher: AnyTeacher | None,
    targets: Targets | HiddenStates | None,
    out: str | Path | None,
    regime: Regime | None,
) -> None:
    """Raise UserError for arguments that do not fit together."""
    check_training(config)
    brings_targets = regime is not None and regime.brings_targets
    if teacher is None and targets is None and not brings_targets and needs_teacher(config):
        raise UserError("distill needs a teacher or targets=; with neither, alpha=1 trains on the text alone")
    if config.shard and regime is not None:
        raise UserError(f"shard=True spreads one model; the {regime.name} regime runs on copies: leave shard out")
    for name in ("features", "token_weights"):
        if getattr(config, name) not in ("", "auto") and regime is not None and brings_targets:
            raise UserError(f"{name} belong to fixed text; the {regime.name} regime brings its own: leave {name} out")
    if config.call_weight != 1 and brings_targets:
        raise UserError(
            f"call_weight belongs to fixed text; the {regime.name if regime else ''} regime brings its own: leave it out"
        )
    if config.shard and (config.lora or out is None):
        raise UserError(
            "shard=True needs out=, where its weights are gathered, and trains all weights: it takes no lora"
        )


def _held_out_batches(
    valid: Blocks | None,
    targets: Targets | HiddenStates | None,
    teacher: AnyTeacher | None,
    counts: Tensor,
) -> Batches | None:
    """Return the held-out text with the teacher's answers; None where either is missing. counts [V]: what is rare."""
    if valid is None or (targets is None and teacher is None):
        return None
    answers = hidden_targets(teacher, valid) if targets is None and teacher is not None else targets
    assert answers is not None
    return Batches(valid, as_targets(answers, valid, "valid_targets"), rare_labels(valid, counts))


def _token_weights(config: TrainConfig, targets: Targets | None, blocks: Blocks) -> Tensor | None:
    """Return [N, S] with mean 1 over the tokens that count; None when every token weighs the same."""
    name, calls = config.token_weights, blocks.call_positions() if config.call_weight != 1 else None
    if name and not isinstance(targets, RoutedTargets):
        raise UserError(f"token_weights={name!r} needs a streamed teacher, or targets stored with it")
    if not name and calls is None:
        return None
    weights = torch.ones(blocks.input_ids.shape)
    if name and isinstance(targets, RoutedTargets):
        weights = targets.token_weights(name)[: len(blocks)].float()
    if calls is not None:
        weights = torch.where(calls, weights * config.call_weight, weights)
    return normalized(weights, blocks.loss_mask())
