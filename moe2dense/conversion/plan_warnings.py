"""Say what speaks against a plan: too small a student, too little text, memory or disk, each with what to do about it."""

import math
from collections.abc import Mapping

from moe2dense.common.units import show_bytes, show_count
from moe2dense.config.schema import RunConfig
from moe2dense.conversion.planned_memory import TrainingFit, training_mask_bytes
from moe2dense.conversion.planned_stages import Sizes
from moe2dense.conversion.results import StagePlan
from moe2dense.families.machines import CPU
from moe2dense.modeling.mask_memory import MaskUse
from moe2dense.modeling.shape import Geometry
from moe2dense.optimizers.memory_ladder import changed
from moe2dense.student.build.cost import TOKENS_PER_NEURON, heal_asked
from moe2dense.student.build.heal_memory import least_heal_bytes
from moe2dense.student.target.resolve import Target

TOKENS_PER_PARAMETER = 20
# stage after the build and training = what makes it take less
_SMALLER = {
    "targets": "a smaller --memory lets the teacher read its weights more often instead",
    "evaluate": "a smaller data.eval_blocks takes less",
    "transfer": "a smaller data.eval_blocks takes less",
    "samples": "evaluate.samples = 0 leaves it out",
    "skills": "evaluate.skills = 0 leaves it out",
    "export": "`moe2dense export` can write the student on another machine",
}
_MANY = 0.1  # of the memory
_USUAL_BUDGET = (0.05, 0.15)  # share of the teacher's training compute that general quality takes
_SMALL, _TOO_SMALL = 0.5, 0.2  # student's parameters by those that a token passes in the teacher


def share_text(share: float) -> str:
    """Show a share of any size in per cent, with two digits and no exponent: 2e-06 -> 0.0002%, 0.123 -> 12%."""
    if share <= 0:
        return "0%"
    places = max(0, 1 - math.floor(math.log10(100 * share)))
    text = f"{100 * share:.{places}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + "%"


def capacity_warning(shape: Geometry, target: Target) -> str:
    """Return a sentence where the student is much smaller than what a token passes in the teacher, else ''."""
    ratio = target.parameters / shape.active_parameters
    if ratio >= _SMALL:
        return ""
    if ratio < _TOO_SMALL:
        return (
            f"too small to be sensible: a token passes {show_count(shape.active_parameters)} parameters in the teacher and "
            f"{show_count(target.parameters)} in this student ({ratio:.0%}), so expect little of the teacher to survive; "
            f"choose at least --to {show_count(_SMALL * shape.active_parameters).lower()}"
        )
    return (
        f"capacity gap: the student has {ratio:.0%} of the parameters a token passes in the teacher; a larger --to, or "
        f"larger students in between (--stages), keep more"
    )


def text_warnings(config: RunConfig, shape: Geometry, target: Target, tokens: int, build: int) -> list[str]:
    """Return sentences where the build, or the training, reads less text than is advisable."""
    warnings, needed = [], TOKENS_PER_NEURON * target.width
    if build < needed:
        remedy = f"--tokens {_typed(needed)} with build.min_tokens = {_typed(needed)}"
        if needed > config.build.max_tokens:
            remedy += f" and build.max_tokens = {_typed(needed)}"
        warnings.append(
            f"few calibration tokens: the build reads {show_count(build)} for {target.width} neurons a layer, and "
            f"{TOKENS_PER_NEURON} a neuron are advisable; {remedy} gives as many"
        )
    active = shape.active_parameters
    trained = 6 * active * TOKENS_PER_PARAMETER * active
    per_token = 2 * active + 6 * target.parameters
    share = per_token * tokens / trained
    if tokens and share < _USUAL_BUDGET[0]:
        low, high = _USUAL_BUDGET
        warnings.append(
            f"distillation budget: about {share_text(share)} of the teacher's training compute. General quality takes "
            f"{low:.0%} to {high:.0%} (--tokens {_typed(low * trained / per_token)} or more); with less the student follows the teacher "
            f"closest on text like --data"
        )
    return warnings


def memory_warnings(sizes: Sizes, stages: Mapping[str, StagePlan], training: TrainingFit | None) -> list[str]:
    """Return sentences where the build, its end-to-end fit or training takes more memory than there is."""
    config, total = sizes.config, sizes.machine.memory
    warnings, have = [], f"{sizes.machine.title} has {show_bytes(total)}"
    if stages["build"].memory > total:
        warnings.append(
            f"memory: the build takes {show_bytes(stages['build'].memory)} and {have}; a smaller build.max_tokens (now "
            f"{show_count(config.build.max_tokens)}) takes less"
        )
    if training is not None and not training.fits:
        what = "training adapters" if config.train.lora else "training all weights"
        remedy = "" if config.train.lora else "--lora 64 trains adapters instead, "
        warnings.append(
            f"memory: {what} takes {show_bytes(training.bytes)} and {have}; {remedy}--tokens 0 stops after the build"
        )
    for name, remedy in _SMALLER.items():
        if name in stages and stages[name].memory > total:
            warnings.append(f"memory: {name} takes {show_bytes(stages[name].memory)} and {have}; {remedy}")
    if heal_asked(config, sizes.target) and sizes.heal is None:
        least = least_heal_bytes(config.build, sizes.target, sizes.length, sizes.machine.device != CPU, sizes.masks)
        warnings.append(
            f"the build ends without its end-to-end fit, which takes at least {show_bytes(least)}; "
            f"{'--memory' if sizes.machine.device == CPU else '--gpu-memory'} is {show_bytes(sizes.budget)}"
        )
    return warnings


def precision_warning(sizes: Sizes, training: TrainingFit | None) -> str:
    """Return a sentence where a CPU is to fit weights that rest in bfloat16, else ''."""
    if sizes.machine.device != CPU:
        return ""
    train = changed(sizes.config.train, training.changes) if training else None
    fits = {"the build's end-to-end fit": sizes.heal, "training": train}
    slow = [what for what, settings in fits.items() if settings is not None and settings.weights == "bfloat16"]
    if not slow:
        return ""
    return (
        f"{' and '.join(slow)} will multiply in bfloat16, which many CPUs do tens of times slower than the float32 that times are "
        f"planned with; more --memory, a smaller --to or --lora 64 keeps the weights in float32"
    )


def mask_warning(sizes: Sizes, training: TrainingFit | None) -> str:
    """Return a sentence where masks would take much of the memory if the text is chats, which no plan reads, else ''."""
    if training is None or sizes.config.data.document_masks != "auto" or sizes.masks.tiles:
        return ""
    dense, tiles = (training_mask_bytes(sizes, sizes.config.train, MaskUse(True, way)) for way in (False, True))
    if training.bytes + dense <= sizes.machine.memory or dense < _MANY * sizes.machine.memory:
        return ""
    return (
        f"memory: where the text is chats, the masks of their documents take {show_bytes(dense)} more while training; with --attention "
        f"flex it is {show_bytes(tiles)}, and --block is now {sizes.length}"
    )


def idle_warning(sizes: Sizes) -> str:
    """Return a sentence where a step of training has fewer blocks than there are devices, else ''."""
    devices, blocks = sizes.machine.count, max(1, sizes.config.train.batch // sizes.length)
    if not sizes.blocks or blocks >= devices:
        return ""
    return (
        f"{devices - blocks} of {devices} devices have nothing to train: train.batch = {sizes.config.train.batch} tokens is "
        f"{blocks} block{'s' if blocks > 1 else ''} a step; {devices * sizes.length} gives each one"
    )


def host_warning(target: Target) -> str:
    """Return a sentence where the student keeps the form of an MoE, else ''."""
    if not target.card.moe_shaped:
        return ""
    return f"the {target.card.title} host keeps an MoE wrapper around one expert; see what loads it in `moe2dense list students`"


def disk_warning(needed: int, free: int, out: str) -> str:
    """Return a sentence where the run writes more than fits, else ''."""
    if needed <= free:
        return ""
    return f"disk: the run writes {show_bytes(needed)} and {show_bytes(free)} are free at --out {out}"


def _typed(n: float) -> str:
    """A count as one would type it: 2.87m."""
    return show_count(n).lower()
