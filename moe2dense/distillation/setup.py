"""Make the parts of a training run, accelerator and optimiser; check the student's head."""

from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from moe2dense.config.training import TrainConfig
from moe2dense.data.blocks import Blocks
from moe2dense.distillation.adapters import add_adapters
from moe2dense.distillation.objective import head_error
from moe2dense.errors import UserError
from moe2dense.modeling.decoder import decoder_layers
from moe2dense.modeling.documents import understands_positions
from moe2dense.modeling.forward import model_inputs
from moe2dense.optimizers.prepare import prepare_weights
from moe2dense.optimizers.tensorwise import TensorwiseOptimizer

_HEAD_TOLERANCE = 0.05  # of the logits' standard deviation


def make_accelerator(config: TrainConfig, out: str | Path | None, device: torch.device | None = None) -> Accelerator:
    """Set up accelerate: bf16 on a GPU, float32 on a CPU. Raises UserError for a tracker that is missing.

    device: the CPU, to leave a GPU alone; which of several GPUs is each process's own is accelerate's to choose.
    """
    tracker = None if config.report_to in ("", "none") else config.report_to
    cpu = device is not None and device.type == "cpu"
    precision = "bf16" if not cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    try:
        accelerator = Accelerator(
            mixed_precision=precision, log_with=tracker, project_dir=None if out is None else str(out), cpu=cpu
        )
        if tracker and not accelerator.log_with:
            raise ValueError(f"{tracker} is not installed")
        if tracker:
            accelerator.init_trackers("moe2dense", config=asdict(config))
    except (ValueError, ImportError) as error:
        raise UserError(f"--report-to {config.report_to} cannot be used ({error}); install it, or use none") from error
    return accelerator


def prepare_model(model: PreTrainedModel, config: TrainConfig) -> PreTrainedModel:
    """Return a model as it trains: in the precision of config.weights (float64 stays), with adapters and activation checkpointing."""
    prepare_weights(model, config)
    if config.gradient_checkpointing and config.lora:
        model.enable_input_require_grads()
    return add_adapters(model, config) if config.lora else model


def compile_layers(model: PreTrainedModel, backend: str = "inductor") -> None:
    """Compile every decoder layer in place; one compilation serves all that are alike."""
    for layer in decoder_layers(model):
        layer.compile(backend=backend, dynamic=False)


def release_layers(model: PreTrainedModel) -> None:
    """Let the decoder layers run as they were written."""
    for layer in decoder_layers(model):
        layer._compiled_call_impl = None


def check_documents(model: PreTrainedModel, data: Blocks) -> None:
    """Raise UserError where blocks hold several documents and the model carries state from one to the next."""
    if "position_ids" in model_inputs(data):
        understands_positions(model.config)


def check_head(model: PreTrainedModel, data: Blocks) -> None:
    """Raise UserError where the model's logits are not what its head and final hidden states give."""
    device = next(model.parameters()).device
    error = head_error(model, model_inputs(Blocks(data.input_ids[:1, :8].clone()), device))
    if error > _HEAD_TOLERANCE:
        raise UserError(
            f"student: {type(model).__name__} changes its logits after the output embedding in a way that is not known "
            f"here (they differ by {error:.2g} standard deviations), so its loss would be wrong"
        )


def step_in_backward(optimizer: torch.optim.Optimizer, config: TrainConfig, processes: int, per_step: int) -> None:
    """Let the backward pass step the tensors. Raises UserError where it sees only a part of a step's gradient."""
    if processes > 1 or per_step > config.micro_batch:
        raise UserError(
            "train.step_in_backward needs one process and a whole step in one pass: a batch of at most micro_batch blocks "
            f"(now {per_step} and {config.micro_batch})"
        )
    assert isinstance(optimizer, TensorwiseOptimizer)
    optimizer.step_in_backward(config.clip)
