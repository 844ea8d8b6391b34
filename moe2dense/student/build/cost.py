"""Count what a build costs, from a config alone: text, memory, FLOPs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moe2dense.common.flops import (
    elimination,
    elimination_by_tokens,
    gated_ffn,
    gram,
    head_loss,
    product,
    refined_ridge,
    ridge_by_tokens,
    ridge_solve,
    sketched_ridge,
    trained_ffn,
)
from moe2dense.config.schema import RunConfig
from moe2dense.config.training import TrainConfig
from moe2dense.modeling.products import Products
from moe2dense.modeling.shape import Geometry
from moe2dense.student.ffn.kernel import FEW_TOKENS
from moe2dense.student.ffn.refit import SKETCH, SWEEPS
from moe2dense.student.ffn.ridge import EXACT_WIDTH
from moe2dense.student.fit import CHECKS
from moe2dense.student.fit_defaults import heal_passes, settle_fits
from moe2dense.student.footprint import STATE_COPIES, hint_layers, layer_bytes, pool_limit, refit_limit
from moe2dense.student.init_spec import base_and_steps, steps_of
from moe2dense.teacher.cost import EXPERT_CACHE, HIDDEN_COPIES, WORK_BYTES, resident_layer_bytes

if TYPE_CHECKING:
    from moe2dense.student.target.resolve import Target


_STORED_BYTES = 2  # of a number in a checkpoint, as a rule
RIDGES_TRIED = 3  # by a refit that chooses its ridge: the one that was best in the layer before, and its neighbours
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


def build_bytes(
    config: RunConfig, shape: Geometry, target: "Target", build: int, budget: int, heal: TrainConfig | None, healing: int
) -> int:  # fmt: skip
    """Return the most memory of the build, apart from the program's own. heal: how the student is healed, within `healing` bytes.

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
    building = STATE_COPIES * states + _layer_bytes(config, shape, target, build, budget, heal is not None)
    hints = 0
    if heal is not None:
        healing += table + states
        if config.build.heal_hints:
            hints = len(hint_layers(sizes.num_hidden_layers, states // 2, budget // 4)) * states // 2
    building = buffers + max(table + states, WORK_BYTES + states, building)
    most = weights + statistics + hints + max(building, healing)
    return most if not target.checkpoint else 4 * target.parameters + (most if config.build.graft else 0)


def _layer_bytes(config: RunConfig, shape: Geometry, target: "Target", build: int, budget: int, healed: bool) -> int:
    """Return the most memory of building one of the student's layers, by the steps that --init has."""
    c, hidden, layers = config.build, target.config.hidden_size, target.config.num_hidden_layers
    steps = steps_of(c.init, healed, target.card.join)
    local, layer_fit = (n if s in steps else 0 for n, s in ((c.local_batch, "local"), (c.layer_batch, "layer")))
    tables = target.config.vocab_size * hidden * (1 if target.config.tie_word_embeddings else 2)
    layer, ffn = (target.parameters - tables) // layers, 3 * hidden * target.width
    pool = min(shape.num_experts * shape.expert_width, pool_limit(budget // 2, target.width, hidden))
    limit, layer_fit = refit_limit(budget // 2), layer_fit if c.layer_steps else 0
    return layer_bytes(max(layer, ffn), ffn, target.width, hidden, pool, build, limit, local, layer_fit)


@dataclass(frozen=True)
class BuildFlops:
    """FLOPs of a build beside the teacher's passes.

    layers: of the student's passes through its layers and of the fits of its FFNs, layer_fits of those of whole layers; grams of
    Gram matrices and errors, solutions of choosing neurons and of refits, which are not shared by processes; heal of the
    end-to-end fit.
    """

    layers: float
    layer_fits: float
    grams: float
    solutions: float
    heal: float


def build_flops(
    config: RunConfig,
    shape: Geometry,
    target: "Target",
    body: Products,
    blocks: int,
    length: int,
    budget: int,
    healing: TrainConfig | None,
) -> BuildFlops:
    """Return what a build computes on [blocks, length] tokens of text, teacher's passes apart.

    body: the products of the student's layers. healing: how the student is healed, if it is. Where data decide (how many ridges are
    tried) the usual number is taken.
    """
    layers, heal = target.config.num_hidden_layers, healing is not None
    trains, tokens = config.train.tokens > 0, blocks * length
    c = settle_fits(config.build, target.config.hidden_size, layers, tokens, heal, trains)
    config = replace(config, build=c)
    steps = steps_of(c.init, heal, target.card.join)
    held = choose_count(blocks, c.hold_out)
    layer = Products(body.weights // layers, body.weights // layers, body.pairs // layers)
    each = _passes(layer, target, blocks, length) + _ffn_fit(config, target, steps, held, length)
    grams, solutions = _choice(config, shape, target, (blocks - held) * length, held * length, budget)
    again = healing is not None and healing.gradient_checkpointing
    return BuildFlops(
        c.sweeps * layers * each,
        c.sweeps * layers * _layer_fit(config, layer, steps, held, length),
        layers * grams,
        layers * solutions,
        _heal(config, target, body, blocks, held, length, again) if heal else 0.0,
    )


def build_reads(config: RunConfig, shape: Geometry, memory: int) -> float:
    """Return how often a streamed build reads the experts: for the pass and, of what is not kept for that, to choose and copy neurons."""
    again = 2 if base_and_steps(config.build.init)[0] in ("obs", "select") else 1
    return 1 + again * unkept_experts(shape, memory)


def unkept_experts(shape: Geometry, memory: int) -> float:
    """Return the share of a layer's experts that finds no room in `memory` bytes and is read again by whoever looks at the layer."""
    cached = memory // EXPERT_CACHE / max(1, _STORED_BYTES * shape.num_experts * shape.expert_parameters)
    return max(0.0, 1 - cached)


def choose_count(blocks: int, share: float) -> int:
    """Return how many of so many blocks are held out of every fit; at least one of several, none of a single one."""
    return max(0, min(blocks - 1, max(1, round(share * blocks))))


def _passes(layer: Products, target: "Target", blocks: int, length: int) -> float:
    """Return the FLOPs of running a student's layer: up to its FFN, for its error, and for what enters the next one."""
    ffn = 3 * target.config.hidden_size * target.width
    return replace(layer, weights=layer.weights - ffn).forward(blocks, length) + 2 * layer.forward(blocks, length)


def _choice(
    config: RunConfig, shape: Geometry, target: "Target", fitted: int, held: int, budget: int
) -> tuple[float, float]:
    """Return the FLOPs of choosing a layer's neurons and of its refit: of what is summed over tokens, and of what is solved."""
    c, hidden, width = config.build, target.config.hidden_size, target.width
    judged = gated_ffn(held or fitted, width, hidden)
    base, *asked = base_and_steps(c.init)
    pool = min(shape.num_experts * shape.expert_width, pool_limit(budget // 2, width, hidden))
    summed, solved = judged, 0.0
    if base == "obs" and pool > width:
        tokens = min(fitted, c.gram_tokens or fitted)
        step = max(1, pool // 256)
        if pool > EXACT_WIDTH and tokens < FEW_TOKENS * pool:
            solved += elimination_by_tokens(tokens, pool, hidden, width, step)
        else:
            summed += gram(tokens, pool, hidden)
            solved += elimination(pool, hidden, width, step)
    if "refit" in asked:
        tries = 1 if c.ridge else RIDGES_TRIED
        solve = ridge_solve if width <= EXACT_WIDTH else refined_ridge
        limit = refit_limit(budget // 2)
        groups = math.ceil(width / limit)
        if groups == 1 and width > EXACT_WIDTH and fitted < FEW_TOKENS * width:
            summed += judged
            solved += ridge_by_tokens(fitted, 0 if c.ridge else held, width, hidden, tries)
        elif groups == 1:
            summed += gram(fitted, width, hidden) + (tries + 2) * judged
            if width > EXACT_WIDTH and hidden > 2 * SKETCH and not c.ridge:
                solved += sketched_ridge(width, hidden, SKETCH, tries)
            else:
                solved += tries * solve(width, hidden)
        else:  # in turn, each fitted to what the others leave over
            part = width / groups
            once = gram(fitted, round(part), hidden) + 2 * gated_ffn(fitted, part, hidden)
            summed += tries * (gated_ffn(fitted, width, hidden) + SWEEPS * groups * once) + (tries + 1) * judged
            solved += tries * SWEEPS * groups * solve(part, hidden)
    return summed, solved


def _ffn_fit(config: RunConfig, target: "Target", steps: Sequence[str], held: int, length: int) -> float:
    """Return the FLOPs of fitting a layer's FFN by gradient steps."""
    c, hidden, width = config.build, target.config.hidden_size, target.width
    if "local" not in steps or not held:
        return 0.0
    check = checks_of(c.local_steps) * gated_ffn(held * length, width, hidden)
    return c.local_steps * trained_ffn(c.local_batch, width, hidden) + check


def _layer_fit(config: RunConfig, layer: Products, steps: Sequence[str], held: int, length: int) -> float:
    """Return the FLOPs of fitting a whole layer by gradient steps."""
    c = config.build
    if "layer" not in steps or not c.layer_steps or not held:
        return 0.0
    batch = max(1, c.layer_batch // length)
    return c.layer_steps * layer.step(batch, length) + checks_of(c.layer_steps) * layer.forward(held, length)


def _heal(
    config: RunConfig, target: "Target", body: Products, blocks: int, held: int, length: int, again: bool
) -> float:
    """Return the FLOPs of the end-to-end fit, the teacher's logits included. again: activations are computed again."""
    c, sizes, rows = config.build, target.config, blocks - held
    if not held:
        return 0.0
    batch = max(1, c.heal_batch // length)
    steps = max(1, round(c.heal_epochs * rows / batch))
    batch = min(batch, rows)
    heads = head_loss(batch * length, sizes.hidden_size, sizes.vocab_size)
    heads += product(batch * length, target.teacher.hidden_size, sizes.vocab_size)
    step = replace(body, trained=body.weights).step(batch, length, again)
    check = body.forward(held, length) + product(held * length, sizes.hidden_size, sizes.vocab_size)
    check += product(held * length, target.teacher.hidden_size, sizes.vocab_size)
    return steps * (step + heads) + checks_of(steps) * check


def checks_of(steps: int, checks: int = CHECKS) -> int:
    """Return how often a fit of so many steps measures its held-out loss."""
    every = max(1, steps // checks)
    return 1 + steps // every + (steps % every > 0)
