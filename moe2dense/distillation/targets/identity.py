"""Tell one teacher from another, so that targets are only taken for those of the teacher that wrote them."""

import json

import torch
import xxhash

from moe2dense.teacher.kinds import AnyTeacher, teacher_head
from moe2dense.teacher.model import Teacher
from moe2dense.weights.fingerprint import checkpoint_fingerprint, tensors_fingerprint

_SAYS_NOTHING = ("transformers_version", "dtype", "architectures")  # config fields that differ between disk and memory
SERVED = "served"
_HEAD_ROWS = 256  # of the language-model head that are hashed


def teacher_identity(teacher: AnyTeacher) -> str:
    """Return what tells a teacher from another, in three parts: "answer-kind-weights".

    answer: a hash of its config, a sample of its head, and how its experts are rounded and drawn. kind: disk or memory, by which its
    tensors have other names. weights: a hash of values of a sample of its tensors.
    """
    if isinstance(teacher, Teacher):
        return f"{_answer(teacher)}-disk-{checkpoint_fingerprint(teacher.path)}"
    return f"{_answer(teacher)}-memory-{tensors_fingerprint(dict(teacher.named_parameters()))}"


def served_identity(model: str, vocabulary: str) -> str:
    """Return what tells a served teacher from another: the name its server has for it, and a hash of its vocabulary.

    Its address is left out, since a server may come back at another. Which weights it runs, nothing here can say.
    """
    return f"{xxhash.xxh3_128_hexdigest(model.encode())}-{SERVED}-{vocabulary}"


def same_teacher(first: str, second: str) -> bool:
    """Return whether two identities are one teacher's; the weights of one on disk and one in memory are not compared."""
    answer, kind, _ = first.split("-")
    other_answer, other_kind, _ = second.split("-")
    return first == second if kind == other_kind else answer == other_answer


def _answer(teacher: AnyTeacher) -> str:
    """Return a hash of the parts of a teacher that are the same on disk and in memory."""
    config = teacher.config.to_dict()
    settings = {k: v for k, v in sorted(config.items()) if not k.startswith("_") and k not in _SAYS_NOTHING}
    if isinstance(teacher, Teacher):
        settings |= {"quantize": teacher.quantize} if teacher.quantize else {}
        settings |= {"draws": str(teacher.resample)} if teacher.resample is not None else {}
    weight = teacher_head(teacher).weight
    rows = weight[:: max(1, len(weight) // _HEAD_ROWS)].detach().to("cpu", torch.bfloat16).contiguous()
    return xxhash.xxh3_128_hexdigest(
        json.dumps(settings, default=str, sort_keys=True).encode() + rows.view(torch.int16).numpy().tobytes()
    )
