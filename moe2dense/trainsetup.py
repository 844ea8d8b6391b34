"""What a training run is made of: accelerator, optimiser groups, adapters, and a check of the student's head."""

import dataclasses
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from moe2dense.config import TrainConfig
from moe2dense.data import Blocks
from moe2dense.errors import UserError
from moe2dense.losses.logits import divergence
from moe2dense.losses.matching import FeatureMatch, parse_features, teacher_features
from moe2dense.losses.student import head_error
from moe2dense.metrics import model_inputs
from moe2dense.schedules import scheduled
from moe2dense.student.methods import made_of_teacher
from moe2dense.targets.formats import FORMATS
from moe2dense.targets.record import check_token_weights

BETAS = (0.9, 0.95)
AUTO_FEATURES = "mse:even:4@10"
_HEAD_TOLERANCE = 0.05  # of the logits' standard deviation


def check_training(config: TrainConfig) -> None:
    """Refuse settings that no run could follow, before anything is read. Raises UserError naming the setting."""
    divergence(config.loss)
    if config.target_format not in FORMATS:
        raise UserError(f"train.target_format must be one of {', '.join(FORMATS)}; found {config.target_format!r}")
    if config.wanted_features:
        parse_features(config.features)
        scheduled(config.feature_weight, 0, 1)
    if config.token_weights:
        check_token_weights(config.token_weights)
    if config.temperature_schedule not in ("", "auto"):
        scheduled(config.temperature_schedule, 0, 1)
    if config.alpha_schedule:
        scheduled(config.alpha_schedule, 0, 1)
    if config.targets or config.target_format in ("hidden", "full"):
        return
    kept = f"train.target_format={config.target_format!r} keeps a part of the teacher's distribution"
    if config.loss != "forward_kl":
        raise UserError(f"{kept}, which serves forward_kl only, not loss {config.loss!r}; use hidden or full")
    if config.temperature_schedule:
        raise UserError(f"{kept} at one temperature, not {config.temperature_schedule!r}; use hidden or full")
    if config.wanted_features:
        raise UserError(f"{kept} and no features; use hidden")


def needs_teacher(config: TrainConfig) -> bool:
    """Whether hard labels are not all that is learnt."""
    return bool(config.alpha_schedule) or scheduled(config.alpha, 0, 1) < 1


def settle_features(config: TrainConfig, student: Any, known: Any, teacher: Any, regime: Any) -> TrainConfig:
    """`config` with features "auto" settled: AUTO_FEATURES where the student was made of the teacher's own residual stream, at the same
    width, and the targets hold what is needed; none elsewhere."""
    if config.features != "auto":
        return config
    model = student.model if hasattr(student, "fate") else student
    about, brought = model.config.get_text_config(), regime is not None and regime.brings_targets
    fits = not brought and made_of_teacher(getattr(student, "method", ""))
    if known is not None:
        layers, width = (getattr(known, name, 0) for name in ("layers", "width"))
        wanted = teacher_features(AUTO_FEATURES, about.num_hidden_layers, layers) if layers else ("any",)
        fits &= width == about.hidden_size and set(wanted) <= set(getattr(known, "features", ()))
    else:
        fits &= teacher is not None and needs_teacher(config)
        fits &= teacher is None or teacher.config.get_text_config().hidden_size == about.hidden_size
    return dataclasses.replace(config, features=AUTO_FEATURES if fits else "")


def features_to_store(config: TrainConfig, target: Any) -> str:
    """The features that a run's targets are to hold for a student of the shape `target` (student.target.Target)."""
    if config.features != "auto":
        return config.features
    same = not target.checkpoint and target.config.hidden_size == target.teacher.hidden_size
    return AUTO_FEATURES if same and config.target_format == "hidden" else ""


def make_match(config: TrainConfig, model: Any, targets: Any, teacher: Any, seed: int) -> FeatureMatch:
    """The feature losses that config.features asks for. Raises UserError when the targets do not hold what they need."""
    about = model.config.get_text_config()
    own = (about.num_hidden_layers, about.hidden_size)
    if targets is not None:
        whole = (getattr(targets, "layers", 0), getattr(targets, "width", 0))
        held = set(getattr(targets, "features", ()))
        missing = [n for n in teacher_features(config.features, own[0], whole[0]) if n not in held] if held else ["any"]
        if missing:
            raise UserError(
                f"features {config.features!r} need targets that hold them, which these do not ({missing[0]} is missing); "
                f"write the targets again with --features {config.features}"
            )
    elif teacher is not None:
        config_t = teacher.config.get_text_config()
        whole = (config_t.num_hidden_layers, config_t.hidden_size)
    else:
        raise UserError("features need a teacher, or targets that hold its features")
    torch.manual_seed(seed)
    match = FeatureMatch(config.features, own, whole, about.num_attention_heads)
    return match.to(next(model.parameters()).dtype)


def make_accelerator(config: TrainConfig, out: str | Path | None) -> Any:
    """accelerate's view of the machine: bf16 on a GPU, float32 on a CPU. Raises UserError for a tracker that is missing."""
    from accelerate import Accelerator

    tracker = None if config.report_to in ("", "none") else config.report_to
    precision = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    try:
        found = Accelerator(mixed_precision=precision, log_with=tracker, project_dir=None if out is None else str(out))
        if tracker and not found.log_with:
            raise ValueError(f"{tracker} is not installed")
        if tracker:
            found.init_trackers("moe2dense", config=asdict(config))
    except (ValueError, ImportError) as error:
        raise UserError(f"--report-to {config.report_to} cannot be used ({error}); install it, or use none") from error
    return found


def default_learning_rate(hidden_size: int, lora: bool = False) -> float:
    """A peak rate for AdamW that falls with the width: 1e-3 at 192 (measured there) to about 1e-4 at 4096.

    The larger end follows what pruned models are distilled with (Minitron, 2407.14679: 1e-4 at 3072 and 4096); adapters take
    three times as much.
    """
    return 1e-3 * (192 / hidden_size) ** 0.75 * (3 if lora else 1)


def make_optimizer(model: Any, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over what trains; norms and biases are not decayed."""
    split: dict[float, list[Any]] = {}
    for p in model.parameters():
        if p.requires_grad:
            split.setdefault(config.weight_decay if p.dim() > 1 else 0.0, []).append(p)
    groups = [{"params": found, "weight_decay": value} for value, found in split.items()]
    return torch.optim.AdamW(groups, lr=config.lr, betas=BETAS, fused=True)


def add_adapters(model: Any, config: TrainConfig) -> Any:
    """The model with low-rank adapters (LoRA, 2106.09685; DoRA, 2402.09353) on its linear layers, all else frozen."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model,
        LoraConfig(r=config.lora, lora_alpha=2 * config.lora, target_modules="all-linear", use_dora=config.dora),
    )


def merge_adapters(adapted: Any) -> Any:
    """The plain model with its adapters merged into the weights: the object that `add_adapters` was given."""
    model = adapted.merge_and_unload()
    return model.requires_grad_(True)


def check_head(model: Any, data: Blocks) -> None:
    """Raises UserError where the model's logits are not what its head and final hidden states give."""
    device = next(model.parameters()).device
    error = head_error(model, model_inputs(Blocks(data.input_ids[:1, :8].clone()), device))
    if error > _HEAD_TOLERANCE:
        raise UserError(
            f"student: {type(model).__name__} changes its logits after the output embedding in a way that is not known "
            f"here (they differ by {error:.2g} standard deviations), so its loss would be wrong"
        )
