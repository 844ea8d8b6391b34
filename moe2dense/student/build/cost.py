"""Count what a build costs, from a config alone: text, memory, FLOPs."""

from typing import TYPE_CHECKING

from moe2dense.config.schema import RunConfig
from moe2dense.modeling.shape import Geometry
from moe2dense.student.fit_defaults import heal_passes, local_steps
from moe2dense.student.footprint import STATE_COPIES, heal_bytes, hint_layers, layer_bytes, pool_limit, refit_limit
from moe2dense.student.init_spec import steps_of
from moe2dense.teacher.cost import EXPERT_CACHE, HIDDEN_COPIES, WORK_BYTES, resident_layer_bytes

if TYPE_CHECKING:
    from moe2dense.student.target.resolve import Target


_STORED_BYTES = 2  # of a number in a checkpoint, as a rule
TOKENS_PER_NEURON = 20  # of the student's FFN in a layer: fits of fewer learn their text by heart


def build_tokens(config: RunConfig, block: int, width: int) -> int:
    """Return the teacher positions that the build uses: a share of --tokens in whole blocks, at least one block.

    It is no less than build.min_tokens, or up to twice that for 20 tokens for each of the student's `width` neurons in a
    layer (memory grows with it), and no more than build.max_tokens or --tokens: a small budget is used whole.
    """
    settings = config.build
    share = round(settings.fraction * config.train.tokens)
    least = max(settings.min_tokens, min(TOKENS_PER_NEURON * width, 2 * settings.min_tokens))
    wanted = min(max(share, least), settings.max_tokens)
    if config.train.tokens:
        wanted = min(wanted, config.train.tokens)
    return max(1, wanted // block) * block


def heal_asked(config: RunConfig, target: "Target") -> bool:
    """Return whether the build is to end with the end-to-end fit of the student."""
    asked = "heal" in steps_of(config.build.init, healed=False)
    return asked and _heal_passes(config) > 0 and not target.checkpoint


def _heal_passes(config: RunConfig) -> float:
    return heal_passes(config.build.heal_epochs, trained=config.train.tokens > 0)


def heal_runs(config: RunConfig, target: "Target", budget: int) -> bool:
    """Return whether the student is healed: where it fits in `budget` bytes with its optimiser."""
    return heal_asked(config, target) and heal_bytes(target.parameters) <= budget


def build_bytes(config: RunConfig, shape: Geometry, target: "Target", build: int, budget: int) -> int:
    """Return the most memory of the build, apart from the program's own.

    These are the teacher's layer and buffers, and the largest of the teacher's pass over a layer, the building of the
    student's layer and the heal. The pass counts with the most that its slices may take, so for models of a few megabytes a
    layer the number is a bound and no estimate. A pretrained student is in memory as a whole; there is a build besides only
    where it is grafted on.
    """
    teacher_bytes, sizes = 4 * shape.parameters, target.config
    hidden = sizes.hidden_size
    kept = min(budget // EXPERT_CACHE, _STORED_BYTES * shape.num_experts * shape.expert_parameters)
    weights = teacher_bytes if teacher_bytes <= budget // 2 else resident_layer_bytes(shape) + kept
    buffers = min(4 * HIDDEN_COPIES * shape.hidden_size * build, max(budget - weights, budget // 8))
    statistics = 8 * len(shape.moe_layers) * shape.num_experts * (shape.expert_width + shape.hidden_size)
    table, states = 4 * sizes.vocab_size * hidden, 4 * hidden * build
    building = STATE_COPIES * states + _layer_bytes(config, shape, target, build, budget)
    healing = hints = 0
    if heal_runs(config, target, budget):
        healing = heal_bytes(target.parameters) + 2 * table + states
        if config.build.heal_hints:
            hints = len(hint_layers(sizes.num_hidden_layers, states // 2, budget // 4)) * states // 2
    building = buffers + max(table + states, WORK_BYTES + states, building)
    most = weights + statistics + hints + max(building, healing)
    return most if not target.checkpoint else 4 * target.parameters + (most if config.build.graft else 0)


def _layer_bytes(config: RunConfig, shape: Geometry, target: "Target", build: int, budget: int) -> int:
    """Return the most memory of building one of the student's layers, by the steps that --init has."""
    c, hidden, layers = config.build, target.config.hidden_size, target.config.num_hidden_layers
    steps = steps_of(c.init, heal_runs(config, target, budget), target.card.join)
    local, layer_fit = (n if s in steps else 0 for n, s in ((c.local_batch, "local"), (c.layer_batch, "layer")))
    tables = target.config.vocab_size * hidden * (1 if target.config.tie_word_embeddings else 2)
    layer, ffn = (target.parameters - tables) // layers, 3 * hidden * target.width
    pool = min(shape.num_experts * shape.expert_width, pool_limit(budget // 2, target.width, hidden))
    limit, layer_fit = refit_limit(budget // 2), layer_fit if c.layer_steps else 0
    return layer_bytes(max(layer, ffn), ffn, target.width, hidden, pool, build, limit, local, layer_fit)


def fit_flops(config: RunConfig, target: "Target", build: int, heal: bool = True) -> float:
    """Return the FLOPs of the build's gradient fits: each layer's FFN, each layer, then the student; 0 for other inits."""
    if config.build.init != "layerwise":
        return 0.0
    c, sizes = config.build, target.config
    layers, hidden = sizes.num_hidden_layers, sizes.hidden_size
    ffn = 3 * hidden * target.width
    layer = (target.parameters - 2 * sizes.vocab_size * hidden) / layers
    layer_tokens = c.layer_steps * c.layer_batch if "layer" in steps_of(c.init, heal, target.card.join) else 0
    fits = layers * (
        local_steps(c.local_steps, heal, build, c.local_batch) * c.local_batch * ffn + layer_tokens * max(layer, ffn)
    )
    return 6.0 * (c.sweeps * fits + heal * _heal_passes(config) * build * target.parameters)
