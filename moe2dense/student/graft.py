"""`walk.graft`: a pretrained dense sibling gets an FFN that the walk made from the teacher's experts, wherever that brings it closer."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from moe2dense.config import WalkConfig
from moe2dense.errors import UserError
from moe2dense.losses.head import model_head
from moe2dense.student.assemble import put_ffn
from moe2dense.student.carry import Carrier
from moe2dense.student.layerwise import Walk, build_ffn
from moe2dense.student.methods import parse_method
from moe2dense.student.polish import cpu_head, kl_of
from moe2dense.student.steps import local_steps
from moe2dense.student.target import Target
from moe2dense.student.types import Student
from moe2dense.teacher import adapter
from moe2dense.teacher.capture import RoutingStats
from moe2dense.teacher.layers import assign
from moe2dense.teacher.load import Teacher, masks

if TYPE_CHECKING:
    from moe2dense.data import Blocks

# N blocks, S block length, T = N * S tokens, H hidden


def check_graft(target: Target, teacher: Teacher, blocks: int) -> None:
    """Raises UserError where the teacher's layers and the sibling's do not correspond, or no block can be kept back to judge by."""
    config = target.config
    for name, theirs in (("num_hidden_layers", len(teacher.body.layers)), ("hidden_size", teacher.hidden_size)):
        mine = getattr(config, name)
        if mine != theirs:
            raise UserError(
                f"walk.graft needs a dense checkpoint with the teacher's {name} {theirs}; {target.to} has {mine}; leave walk.graft off"
            )
    if blocks < 2:
        raise UserError("walk.graft judges on a block that is kept back and needs at least two; give more text")


def graft(
    student: Student,
    target: Target,
    teacher: Teacher,
    data: "Blocks",
    init: str,
    config: WalkConfig,
    seed: int = 0,
    progress: Callable[..., None] | None = None,
) -> Student:
    """Layer by layer, put the walk's FFN in place of the sibling's own where KL(teacher || student) on the held-out blocks falls.

    The walk's FFN is made of the teacher's experts, refitted and fitted to what the sibling lacks of the teacher's layer output. Each decision
    stands on the ones before it, so that the student never ends further from the teacher on these blocks than it began. Costs two passes of the
    teacher: over the held-out blocks and over all. Raises UserError where layers do not correspond.
    """
    from moe2dense.student.build import held_out, on_cpu

    check_graft(target, teacher, len(data))
    model, card = student.model.eval().requires_grad_(False), student.card
    base, steps = parse_method(init)
    config = replace(config, local_steps=local_steps(config.local_steps, polished=False))
    held = held_out(len(data), config.hold_out, seed)
    judge = _Judge(student, teacher, data[torch.nonzero(held).flatten()])
    mask, positions = masks(teacher, data.input_ids, data.attention_mask, data.document_ids)
    carrier = Carrier(model, card, data.input_ids, mask, positions)
    real = torch.ones_like(data.input_ids) if data.attention_mask is None else data.attention_mask
    stats = RoutingStats(neurons=True)
    state = Walk(
        teacher, carrier, target, base, steps, config, seed, held, real.reshape(-1).bool(), stats, carrier.embed()
    )
    best = judge.kl()
    for made in map(on_cpu, teacher.stream(data.input_ids, data.attention_mask, data.document_ids, observers=[stats])):
        begun, module = time.monotonic(), carrier.ffn(made.index)
        own = {name: value.detach().clone() for name, value in adapter.saved_tensors(module).items()}
        ffn, fate, record = build_ffn(state, made, made.index)
        put_ffn(module, card, ffn)
        found = judge.kl()
        record |= {"kl_own": round(best, 6), "kl_grafted": round(found, 6), "grafted": found < best}
        if found < best:
            best = found
        else:
            for name, value in own.items():
                assign(module, name, value)
        state.hidden = carrier.run(made.index, state.hidden)
        state.fate.append(fate if record["grafted"] else None)
        state.history.append(record | {"seconds": round(time.monotonic() - begun, 2)})
        if progress:
            progress("graft", len(state.fate), len(carrier.body.layers), kl=best)
    model.requires_grad_(True)
    return Student(model, card, state.fate, str(teacher.path), "checkpoint+graft", data.tokens, state.history)


class _Judge:
    """KL(teacher || student) on blocks, the teacher's side computed once."""

    def __init__(self, student: Student, teacher: Teacher, blocks: "Blocks"):
        self.model = student.model
        mask, positions = masks(teacher, blocks.input_ids, blocks.attention_mask, blocks.document_ids)
        self.carrier = Carrier(self.model, student.card, blocks.input_ids, mask, positions)
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
            mean = kl_of(self.model, self.carrier, head, self.head, self.targets, part, self.real)
            total += float(mean) * float(self.real[part].sum())
        return total / float(self.real.sum().clamp_min(1))
