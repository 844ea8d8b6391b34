"""Targets are only those of the teacher that wrote them: its body, its rounding and its drawing of experts count."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe2dense.data.blocks import Blocks
from moe2dense.distillation.targets.identity import same_teacher, teacher_identity
from moe2dense.distillation.targets.store import open_targets
from moe2dense.distillation.targets.write import write_targets
from moe2dense.errors import UserError
from moe2dense.teacher.load import load_teacher
from tests.teacher.families import make


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("identity")
    make("mixtral", path)
    return path


def with_other_tensors(folder, to, part):
    """Copy a checkpoint, the tensors with `part` in their names negated."""
    to.mkdir()
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    changed = {k: -v if part in k else v for k, v in tensors.items()}
    save_file(changed, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.parametrize("part", ["experts.4.w2", "self_attn.v_proj", "layers.1.input_layernorm"])
def test_targets_of_another_body_are_refused(folder, tmp_path, part):
    blocks = Blocks(torch.randint(3, 100, (3, 7)))
    teacher, other = load_teacher(folder), load_teacher(with_other_tensors(folder, tmp_path / "other", part))
    write_targets(teacher, blocks, tmp_path / "store")
    assert len(open_targets(tmp_path / "store", blocks, teacher=load_teacher(folder))) == 3
    with pytest.raises(UserError, match="written by another teacher"):
        open_targets(tmp_path / "store", blocks, teacher=other)
    with pytest.raises(UserError, match="targets of another teacher"):
        write_targets(other, blocks, tmp_path / "store")


def test_rounding_and_drawing_tell_teachers_apart(folder):
    options = [
        {}, {"quantize": "int4"}, {"quantize": "int8"}, {"top_k": 3}, {"draw": 0}, {"draw": 1}, {"draw": 0, "seed": 5},
    ]  # fmt: skip
    identities = [teacher_identity(load_teacher(folder, **o)) for o in options]
    assert len(set(identities)) == len(options)
    assert all(same_teacher(a, b) == (a == b) for a in identities for b in identities)
    assert identities == [teacher_identity(load_teacher(folder, **o)) for o in options]


def test_one_teacher_on_disk_and_in_memory(folder, tmp_path):
    model = make("mixtral", tmp_path)
    on_disk, in_memory = teacher_identity(load_teacher(tmp_path)), teacher_identity(model)
    assert same_teacher(on_disk, in_memory)
    with torch.no_grad():
        model.model.layers[2].mlp.experts.down_proj.neg_()
    assert not same_teacher(in_memory, teacher_identity(model))
    assert not same_teacher(teacher_identity(make("mixtral", tmp_path / "b", seed=3)), on_disk)
