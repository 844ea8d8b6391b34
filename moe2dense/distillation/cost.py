"""Count what training costs and what its stored targets hold, for a student of a given shape, before anything is loaded."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe2dense.common.flops import head_loss, product
from moe2dense.config.schema import RunConfig
from moe2dense.config.training import AUTO_FEATURES, TrainConfig
from moe2dense.distillation.batching import total_steps
from moe2dense.distillation.targets.registry import TARGET_FORMATS
from moe2dense.losses.feature_spec import teacher_features
from moe2dense.modeling.products import Products

if TYPE_CHECKING:
    from moe2dense.student.target.resolve import Target

MOST_PASSES = 5
TOKENS_PER_PASS = 0.03  # of each of the student's parameters: a further pass pays from so much text on
ENOUGH_TOKENS = 20  # for each parameter, passes included (2203.15556): more text leaves less to gain by repeating it
MUON_BATCH = 3  # batch in tokens over hidden size from which a step of Muon costs less than its gradient


def features_to_store(config: TrainConfig, target: "Target") -> str:
    """Return the features that a run's targets are to hold for a student of the shape `target`."""
    if config.features not in AUTO_FEATURES:
        return config.features
    same_width = not target.checkpoint and target.config.hidden_size == target.teacher.hidden_size
    return AUTO_FEATURES[config.features] if same_width and config.target_format == "hidden" else ""


@dataclass(frozen=True)
class TrainingSteps:
    """How long a training is. blocks of `length` tokens; checks: how often the held-out text is scored."""

    steps: int
    per_step: int
    checks: int
    length: int


def training_steps(config: TrainConfig, parameters: int, blocks: int, length: int) -> TrainingSteps:
    """Return the length of training a student of so many parameters on so many blocks."""
    per_step = max(1, config.batch // length)
    steps = total_steps(blocks, per_step, passes(config, blocks * length, parameters))
    return TrainingSteps(steps, per_step, 1 + steps // config.eval_every + (steps % config.eval_every > 0), length)


def training_flops(
    config: TrainConfig, target: "Target", body: Products, length: TrainingSteps, held_out: int, again: bool
) -> float:
    """Return the FLOPs of a training and of its checks on `held_out` blocks.

    body: the products of the student's layers, `trained` among them. again: activations are computed again for the backward pass.
    """
    sizes, text = target.config, length.length
    tokens = length.per_step * text
    teacher = (
        product(1, target.teacher.hidden_size, target.teacher.vocab_size) if config.target_format == "hidden" else 0.0
    )
    student = product(1, sizes.hidden_size, sizes.vocab_size)
    step = body.step(length.per_step, text, again)
    step += head_loss(tokens, sizes.hidden_size, sizes.vocab_size, trains_head=not config.lora)
    step += tokens * teacher
    step += body.orthogonal if uses_muon(config, sizes.hidden_size) else 0
    check = body.forward(held_out, text) + held_out * text * (
        student + product(1, target.teacher.hidden_size, target.teacher.vocab_size)
    )
    return length.steps * step + length.checks * check


def stored_states(config: RunConfig, target: "Target") -> int:
    """Return how many hidden states per token the targets hold besides the final one, at one byte a number."""
    text, layers = features_to_store(config.train, target), target.teacher.num_hidden_layers
    names = teacher_features(text, target.config.num_hidden_layers, layers)
    return sum(name.startswith("hidden-") for name in names)


def passes(config: TrainConfig, tokens: int, parameters: int) -> float:
    """Return how often a student of so many parameters passes `tokens` of training text: config.epochs or, for 0, by rule.

    By rule it is one pass for each TOKENS_PER_PASS tokens a parameter, at most MOST_PASSES, and no more than make ENOUGH_TOKENS
    a parameter in all. Text without the teacher's whole distributions, or of a regime, is passed once: what repeats there is
    learnt by heart.
    """
    if config.epochs:
        return config.epochs
    each = tokens / max(parameters, 1)
    if (
        config.regime
        or (config.alpha >= 1 and not config.alpha_schedule)
        or not TARGET_FORMATS[config.target_format].whole
        or not each
    ):
        return 1.0
    return float(max(1, round(min(MOST_PASSES, each / TOKENS_PER_PASS, ENOUGH_TOKENS / each))))


def uses_muon(config: TrainConfig, hidden_size: int) -> bool:
    """Return whether Muon trains the matrices inside the layers of a student of this hidden size."""
    if config.lora or config.shard or config.weights != "float32" or config.offload or config.step_in_backward:
        return False
    return config.optimizer == "muon" or (config.optimizer == "auto" and config.batch >= MUON_BATCH * hidden_size)
