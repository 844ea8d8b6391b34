"""`build.graft`: a pretrained dense sibling gets an FFN that the build made from the teacher's experts, wherever that brings it closer."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from moe2dense.config.schema import BuildConfig
from moe2dense.errors import UserError
from moe2dense.modeling import internals
from moe2dense.modeling.head import model_head
from moe2dense.student.build.assemble import put_ffn
from moe2dense.student.build.heal import cpu_head, kl_of
from moe2dense.student.build.layer import build_ffn
from moe2dense.student.build.layer_runner import LayerRunner
from moe2dense.student.build.state import BuildState
from moe2dense.student.ffn.methods import parse_method
from moe2dense.student.init_spec import local_steps
from moe2dense.student.target.resolve import Target
from moe2dense.student.types import Student
from moe2dense.teacher.layers import assign
from moe2dense.teacher.model import Teacher, masks
from moe2dense.teacher.routing import RoutingStats

if TYPE_CHECKING:
    from moe2dense.data.blocks import Blocks

# N blocks, S block length, T = N * S tokens, H hidden


def check_graft(target: Target, teacher: Teacher, blocks: int) -> None:
    """Raises UserError where the teacher's layers and the sibling's do not correspond, or no block can be kept back to judge by."""
    config = target.config
    for name, theirs in (("num_hidden_layers", len(teacher.body.layers)), ("hidden_size", teacher.hidden_size)):
        mine = getattr(config, name)
        if mine != theirs:
            raise UserError(
                f"build.graft needs a dense checkpoint with the teacher's {name} {theirs}; {target.to} has {mine}; leave build.graft off"
            )
    if blocks < 2:
        raise UserError("build.graft judges on a block that is kept back and needs at least two; give more text")


def graft(
    student: Student,
    target: Target,
    teacher: Teacher,
    data: "Blocks",
    init: str,
    config: BuildConfig,
    seed: int = 0,
    progress: Callable[..., None] | None = None,
) -> Student:
    """Layer by layer, put the build's FFN in place of the sibling's own where KL(teacher || student) on the held-out blocks falls.

    The build's FFN is made of the teacher's experts, refitted and fitted to what the sibling lacks of the teacher's layer output. Each decision
    stands on the ones before it, so that the student never ends further from the teacher on these blocks than it began. Costs two passes of the
    teacher: over the held-out blocks and over all. Raises UserError where layers do not correspond.
    """
    from moe2dense.student.build.layer import held_out, on_cpu

    check_graft(target, teacher, len(data))
    model, card = student.model.eval().requires_grad_(False), student.card
    base, steps = parse_method(init)
    config = replace(config, local_steps=local_steps(config.local_steps, healed=False))
    held = held_out(len(data), config.hold_out, seed)
    judge = _Judge(student, teacher, data[torch.nonzero(held).flatten()])
    mask, positions = masks(teacher, data.input_ids, data.attention_mask, data.document_ids)
    runner = LayerRunner(model, card, data.input_ids, mask, positions)
    real = torch.ones_like(data.input_ids) if data.attention_mask is None else data.attention_mask
    stats = RoutingStats(neurons=True)
    state = BuildState(
        teacher, runner, target, base, steps, config, seed, held, real.reshape(-1).bool(), stats, runner.embed()
    )
    best = judge.kl()
    for made in map(on_cpu, teacher.stream(data.input_ids, data.attention_mask, data.document_ids, observers=[stats])):
        begun, module = time.monotonic(), runner.ffn(made.index)
        own = {name: value.detach().clone() for name, value in internals.saved_tensors(module).items()}
        ffn, provenance, record = build_ffn(state, made, made.index)
        put_ffn(module, card, ffn)
        found = judge.kl()
        record |= {"kl_own": round(best, 6), "kl_grafted": round(found, 6), "grafted": found < best}
        if found < best:
            best = found
        else:
            for name, value in own.items():
                assign(module, name, value)
        state.hidden = runner.run(made.index, state.hidden)
        state.provenance.append(provenance if record["grafted"] else None)
        state.history.append(record | {"seconds": round(time.monotonic() - begun, 2)})
        if progress:
            progress("graft", len(state.provenance), len(runner.body.layers), kl=best)
    model.requires_grad_(True)
    return Student(model, card, state.provenance, str(teacher.path), "checkpoint+graft", data.tokens, state.history)


class _Judge:
    """KL(teacher || student) on blocks, the teacher's side computed once."""

    def __init__(self, student: Student, teacher: Teacher, blocks: "Blocks"):
        self.model = student.model
        mask, positions = masks(teacher, blocks.input_ids, blocks.attention_mask, blocks.document_ids)
        self.runner = LayerRunner(self.model, student.card, blocks.input_ids, mask, positions)
        done = teacher.run(blocks.input_ids, blocks.attention_mask, blocks.document_ids, logits=False)
        self.targets = done.hidden_states.to("cpu", torch.float32)
        self.real = (
            torch.ones_like(blocks.input_ids) if blocks.attention_mask is None else blocks.attention_mask
        ).bool()
        self.head: Any = cpu_head(teacher)

    @torch.no_grad()
    def kl(self) -> float:
        """Mean over real tokens, in nats."""
        head, total = model_head(self.model), 0.0
        for part in torch.arange(len(self.real)).split(8):
            mean = kl_of(self.model, self.runner, head, self.head, self.targets, part, self.real)
            total += float(mean) * float(self.real[part].sum())
        return total / float(self.real.sum().clamp_min(1))
