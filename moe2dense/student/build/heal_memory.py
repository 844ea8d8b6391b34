"""Choose how the end-to-end fit of a build fits its memory: the first rung of training's ladder that does. No torch here."""

from typing import TYPE_CHECKING, Any

from moe2dense.config.schema import BuildConfig
from moe2dense.config.training import TrainConfig
from moe2dense.modeling.mask_memory import NO_DOCUMENTS, MaskUse, mask_bytes
from moe2dense.optimizers.footprint import activation_bytes, standing_bytes, weight_bytes
from moe2dense.optimizers.memory_ladder import changed, rungs
from moe2dense.student.footprint import FP32

if TYPE_CHECKING:
    from moe2dense.student.target.resolve import Target

CLIP = 1.0  # of the gradient's norm


def heal_blocks(config: BuildConfig, block: int) -> int:
    """Return how many blocks of so many tokens a step of the heal takes, in one pass."""
    return max(1, config.heal_batch // block)


def heal_bytes(train: TrainConfig, target: "Target", block: int, on_gpu: bool, masks: MaskUse = NO_DOCUMENTS) -> int:
    """Return the memory of fitting a whole student end to end as `train` says, on blocks of so many tokens.

    It is that of weights, gradients and moments, of a step's activations and masks, of the teacher's head, and of the best values so
    far, which rest in main memory where a GPU computes.
    """
    sizes, parameters = target.config, target.parameters
    best = 0 if on_gpu else weight_bytes(train) * parameters
    head = FP32 * target.teacher.vocab_size * target.teacher.hidden_size
    passing = activation_bytes(
        train, train.micro_batch * block, sizes.num_hidden_layers, sizes.hidden_size, target.width
    )
    passing += mask_bytes(sizes, masks, train.micro_batch, block, FP32, train.gradient_checkpointing)
    return standing_bytes(train, parameters, parameters) + best + head + passing


def heal_choices(
    config: BuildConfig,
    target: "Target",
    block: int,
    on_gpu: bool,
    processes: int = 1,
    masks: MaskUse = NO_DOCUMENTS,
) -> list[tuple[TrainConfig, int]]:
    """Return the ways to make the heal's steps, each with the bytes it takes, the plain one first.

    Main memory is no home for the optimiser's states here: Adafactor takes as little. Several processes add their gradients up, so
    none steps in its backward pass.
    """
    plain = TrainConfig(batch=config.heal_batch, micro_batch=heal_blocks(config, block), clip=CLIP)
    ladder = rungs(plain, block, on_gpu, processes)
    ways = [changed(plain, changes) for changes in ladder if not changes.get("offload")]
    return [(way, heal_bytes(way, target, block, on_gpu, masks)) for way in ways]


def heal_settings(
    config: BuildConfig,
    target: "Target",
    block: int,
    budget: int,
    on_gpu: bool,
    processes: int = 1,
    masks: MaskUse = NO_DOCUMENTS,
) -> TrainConfig | None:
    """Return how the heal's steps are made: the first way that fits in `budget` bytes, None where none does."""
    ways = heal_choices(config, target, block, on_gpu, processes, masks)
    return next((way for way, need in ways if need <= budget), None)


def least_heal_bytes(
    config: BuildConfig, target: "Target", block: int, on_gpu: bool, masks: MaskUse = NO_DOCUMENTS
) -> int:
    """Return the least memory that the heal can do with."""
    return min(need for _, need in heal_choices(config, target, block, on_gpu, masks=masks))


def heal_changes(train: TrainConfig) -> dict[str, Any]:
    """Return the settings of the heal's steps that were changed to make it fit."""
    plain = TrainConfig()
    names = ("gradient_checkpointing", "weights", "optimizer", "step_in_backward")
    return {name: getattr(train, name) for name in names if getattr(train, name) != getattr(plain, name)}


def heal_room(budget: int, teacher_bytes: int, on_gpu: bool) -> int:
    """Return the bytes that the heal may take; on a GPU a teacher that stays there leaves less."""
    return budget - (teacher_bytes if on_gpu else 0)
