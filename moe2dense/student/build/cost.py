"""What a build costs, from a config alone: text, memory, FLOPs."""

from typing import TYPE_CHECKING

from moe2dense.config.schema import RunConfig
from moe2dense.modeling.shape import Geometry
from moe2dense.student.footprint import STATE_COPIES, heal_bytes, hint_layers, layer_bytes, pool_limit, refit_limit
from moe2dense.student.init_spec import local_steps, steps_of
from moe2dense.teacher.cost import HIDDEN_COPIES, WORK_BYTES, resident_layer_bytes

if TYPE_CHECKING:
    from moe2dense.student.target.resolve import Target


def build_tokens(config: RunConfig, block: int) -> int:
    """Teacher positions the build uses: a fixed share of --tokens, whole blocks, at least one; all of a small budget."""
    wanted = min(
        config.build.max_tokens, max(round(config.build.fraction * config.train.tokens), config.build.min_tokens)
    )
    if config.train.tokens:
        wanted = min(wanted, config.train.tokens)
    return max(1, wanted // block) * block


def heal_asked(config: RunConfig, target: "Target") -> bool:
    """Whether the build is to end with the end-to-end fit of the student."""
    asked = "heal" in steps_of(config.build.init, healed=False)
    return asked and config.build.heal_epochs > 0 and not target.checkpoint


def heal_runs(config: RunConfig, target: "Target", budget: int) -> bool:
    """Whether it does: where the student with its optimiser takes no more than `budget` bytes."""
    return heal_asked(config, target) and heal_bytes(target.parameters) <= budget


def build_bytes(config: RunConfig, shape: Geometry, target: "Target", build: int, budget: int) -> int:
    """Most memory of the build beside the program's own: the teacher's layer and buffers, then whichever is largest of its pass over a
    layer, building the student's layer, and the heal. The pass counts with the most that its slices may take, so for models of a few
    layers' megabytes the number is a bound and no estimate. A pretrained student is in memory as a whole, beside a build only where it is grafted on."""
    whole, sizes = 4 * shape.parameters, target.config
    hidden = sizes.hidden_size
    weights = whole if whole <= budget // 2 else resident_layer_bytes(shape)
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
    """Most memory of building one of the student's layers, by the steps that --init has."""
    c, hidden, layers = config.build, target.config.hidden_size, target.config.num_hidden_layers
    steps = steps_of(c.init, heal_runs(config, target, budget), target.card.join)
    local, layer_fit = (n if s in steps else 0 for n, s in ((c.local_batch, "local"), (c.layer_batch, "layer")))
    tables = target.config.vocab_size * hidden * (1 if target.config.tie_word_embeddings else 2)
    layer, ffn = (target.parameters - tables) // layers, 3 * hidden * target.width
    pool = min(shape.num_experts * shape.expert_width, pool_limit(budget // 2, target.width, hidden))
    limit, layer_fit = refit_limit(budget // 2), layer_fit if c.layer_steps else 0
    return layer_bytes(max(layer, ffn), ffn, target.width, hidden, pool, build, limit, local, layer_fit)


def fit_flops(config: RunConfig, target: "Target", build: int, heal: bool = True) -> float:
    """FLOPs of the build's gradient fits: each layer's FFN, each whole layer, then the student end to end. 0 for other inits."""
    if config.build.init != "layerwise":
        return 0.0
    c, sizes = config.build, target.config
    layers, hidden = sizes.num_hidden_layers, sizes.hidden_size
    ffn = 3 * hidden * target.width
    layer = (target.parameters - 2 * sizes.vocab_size * hidden) / layers
    whole = c.layer_steps * c.layer_batch if "layer" in steps_of(c.init, heal, target.card.join) else 0
    fits = layers * (local_steps(c.local_steps, heal) * c.local_batch * ffn + whole * max(layer, ffn))
    return 6.0 * (c.sweeps * fits + heal * c.heal_epochs * build * target.parameters)
