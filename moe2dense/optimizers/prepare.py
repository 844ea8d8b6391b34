"""Get a model ready for fitting as the settings say: the precision of its weights, and which activations are computed again."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe2dense.config.training import TrainConfig
from moe2dense.modeling.precision import cast_weights
from moe2dense.optimizers.tensorwise import BETAS, TensorwiseOptimizer, holds_less, tensorwise_optimizer


def prepare_weights(model: PreTrainedModel, config: TrainConfig) -> None:
    """Give a model's weights the precision of config.weights (float64 stays), and have its activations computed again where asked for."""
    wanted, dtype = getattr(torch, config.weights), next(model.parameters()).dtype
    if dtype not in (wanted, torch.float64):
        cast_weights(model, wanted)
    if config.gradient_checkpointing:
        _compute_again(model, True)


def _compute_again(model: PreTrainedModel, asked: bool) -> None:
    """Let a model's activations be computed again in the backward pass while it is in training mode, or not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its name changes in transformers 6
        if asked:
            model.gradient_checkpointing_enable()
        else:
            model.gradient_checkpointing_disable()


@contextlib.contextmanager
def prepared(model: PreTrainedModel, config: TrainConfig, seed: int) -> Iterator[None]:
    """Have a model's weights as `prepare_weights` makes them within the context, float32 afterwards.

    Where weights are rounded at random, torch's numbers are drawn from `seed` within the context, and go on as before after it.
    """
    was_training = model.training
    rounded = config.weights != "float32"
    with torch.random.fork_rng(devices=[], enabled=rounded):
        if rounded:
            torch.manual_seed(seed)
        prepare_weights(model, config)
        if config.gradient_checkpointing:
            model.train()
        try:
            yield
        finally:
            if config.gradient_checkpointing:
                _compute_again(model, False)
                model.train(was_training)
            if rounded:
                cast_weights(model, torch.float32)


@contextlib.contextmanager
def optimizer_of(parameters: Sequence[Tensor], config: TrainConfig, lr: float) -> Iterator[torch.optim.Optimizer]:
    """Have the optimiser that `config` asks for, over parameters without weight decay, within the context."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    if not holds_less(config):
        yield torch.optim.AdamW(list(parameters), lr=lr, betas=BETAS, weight_decay=0.0)
        return
    optimizer = tensorwise_optimizer([{"params": list(parameters), "weight_decay": 0.0}], replace(config, lr=lr))
    if config.step_in_backward:
        optimizer.step_in_backward(config.clip)
    try:
        yield optimizer
    finally:
        optimizer.leave_backward()


def take_step(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], clip: float) -> None:
    """Make the step of gradients that are there, their norm at most `clip` (0: any); a backward pass may have made it already."""
    if isinstance(optimizer, TensorwiseOptimizer) and optimizer.steps_in_backward:
        optimizer.norm_of_backward()
        return
    if clip:
        nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
