"""Graft FFNs built from the teacher's experts onto a pretrained dense model, wherever that brings it closer (`build.graft`)."""

import time
from typing import TYPE_CHECKING

import torch

from moe2dense.common.devices import CPU, fast_products, moved_to
from moe2dense.config.schema import BuildConfig
from moe2dense.errors import UserError
from moe2dense.modeling import internals
from moe2dense.modeling.head import model_head
from moe2dense.student.build.assemble import put_ffn
from moe2dense.student.build.heal import mean_kl, plain_head
from moe2dense.student.build.layer import build_ffn, choose_held_out
from moe2dense.student.build.layer_runner import LayerRunner
from moe2dense.student.build.state import BuildState, Progress
from moe2dense.student.ffn.methods import parse_method
from moe2dense.student.fit_defaults import settle_fits
from moe2dense.student.footprint import FP32, STATE_COPIES
from moe2dense.student.target.resolve import Target
from moe2dense.student.types import Student
from moe2dense.teacher.model import Teacher, masks
from moe2dense.teacher.parameters import assign
from moe2dense.teacher.routing import RoutingStats

if TYPE_CHECKING:
    from moe2dense.data.blocks import Blocks

# N blocks, S block length, T = N * S tokens, H hidden


def check_graft(target: Target, teacher: Teacher, blocks: int) -> None:
    """Refuse a sibling whose layers do not correspond to the teacher's, or text without a block to judge by.

    Raises UserError.
    """
    for name, wanted in (("num_hidden_layers", len(teacher.body.layers)), ("hidden_size", teacher.hidden_size)):
        size = getattr(target.config, name)
        if size != wanted:
            raise UserError(
                f"build.graft needs a dense checkpoint with the teacher's {name} {wanted}; {target.to} has {size}; leave build.graft off"
            )
    if blocks < 2:
        raise UserError("build.graft judges on a block that is held out and needs at least two; give more text")


def graft(
    student: Student,
    target: Target,
    teacher: Teacher,
    data: "Blocks",
    init: str,
    config: BuildConfig,
    seed: int = 0,
    progress: Progress | None = None,
) -> Student:
    """Layer by layer, put the build's FFN in place of the sibling's where KL(teacher || student) on held-out blocks falls.

    The build's FFN is made of the teacher's experts, then refitted and fitted to what the sibling lacks of the teacher's
    layer output. Each decision builds on those before it, so the student never ends further from the teacher on these blocks
    than it began. The teacher runs twice: over the held-out blocks and over all. Raises UserError where layers do not
    correspond.
    """
    check_graft(target, teacher, len(data))
    with moved_to(student.model.requires_grad_(False), teacher.device), fast_products():
        return _graft(student, target, teacher, data, init, config, seed, progress)


def _graft(
    student: Student,
    target: Target,
    teacher: Teacher,
    data: "Blocks",
    init: str,
    config: BuildConfig,
    seed: int,
    progress: Progress | None,
) -> Student:
    """Graft as `graft` says, where the student is."""
    model, card = student.model.eval(), student.card
    base, steps = parse_method(init)
    config = settle_fits(config, target.config.hidden_size, target.config.num_hidden_layers, data.tokens, healed=False)
    held_out = choose_held_out(len(data), config.hold_out, seed)
    judge = _Judge(student, teacher, data[torch.nonzero(held_out).flatten()])
    mask, positions = masks(teacher, data.input_ids, data.attention_mask, data.document_ids)
    tokens = data.input_ids.numel()
    states = teacher.plan.states_device(STATE_COPIES * FP32 * teacher.hidden_size * tokens)
    runner = LayerRunner(model, card, data.input_ids, mask, positions, states=states)
    real = torch.ones_like(data.input_ids) if data.attention_mask is None else data.attention_mask
    stats = RoutingStats(neurons=True)
    state = BuildState(
        teacher, runner, target, base, steps, config, seed, held_out, real.reshape(-1).bool(), stats, runner.embed(),
        teacher.plan.build_bytes,
    )  # fmt: skip
    best = judge.kl()
    stream = teacher.stream(
        data.input_ids, data.attention_mask, data.document_ids, observers=[stats], keep_experts=True
    )
    for layer_pass in stream:
        begun, module = time.monotonic(), runner.ffn(layer_pass.index)
        before = {name: value.detach().clone() for name, value in internals.saved_tensors(module).items()}
        ffn, provenance, record = build_ffn(state, layer_pass, layer_pass.index)
        put_ffn(module, card, ffn.to(runner.device))
        kl = judge.kl()
        grafted = kl < best
        record |= {"kl_own": round(best, 6), "kl_grafted": round(kl, 6), "grafted": grafted}
        if grafted:
            best = kl
        else:
            for name, value in before.items():
                assign(module, name, value)
        state.hidden = runner.run(layer_pass.index, state.hidden)
        state.begin_where(record)
        state.provenance.append(provenance if grafted else None)
        state.history.append(record | {"seconds": round(time.monotonic() - begun, 2)})
        if progress:
            progress("graft", len(state.provenance), len(runner.body.layers), kl=best)
    model.requires_grad_(True)
    return Student(model, card, state.provenance, str(teacher.path), "checkpoint+graft", data.tokens, state.history)


class _Judge:
    """KL(teacher || student) on blocks; the teacher's side is computed once."""

    def __init__(self, student: Student, teacher: Teacher, blocks: "Blocks"):
        self.model = student.model
        mask, positions = masks(teacher, blocks.input_ids, blocks.attention_mask, blocks.document_ids)
        self.runner = LayerRunner(self.model, student.card, blocks.input_ids, mask, positions)
        output = teacher.run(blocks.input_ids, blocks.attention_mask, blocks.document_ids, logits=False)
        self.targets = output.hidden_states.to(CPU, torch.get_default_dtype())
        real = torch.ones_like(blocks.input_ids) if blocks.attention_mask is None else blocks.attention_mask
        self.real = real.bool()
        self.teacher_head = plain_head(teacher, next(self.model.parameters()).device)

    def kl(self) -> float:
        """Return the mean over real tokens, in nats."""
        blocks, head = torch.arange(len(self.real)), model_head(self.model)
        return mean_kl(self.model, self.runner, head, self.teacher_head, self.targets, blocks, self.real)
