"""Which steps a build takes."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from moe2dense.config import WalkConfig
from moe2dense.data import Blocks
from moe2dense.student.build import build_student
from moe2dense.student.steps import local_steps, steps_of
from moe2dense.teacher.load import load_teacher

sys.path.insert(0, str(Path(__file__).parent.parent / "teacher"))
from families import make

SHORT = WalkConfig(
    local_steps=4, local_batch=16, layer_steps=4, layer_batch=46, polish_epochs=1, polish_batch=46, hold_out=0.3
)


def test_steps_of_an_init():
    assert steps_of("walk", polished=False) == ["refit", "local", "layer", "polish"]
    assert steps_of("walk", polished=True) == ["refit", "local", "polish"]
    assert steps_of("walk", polished=True, join="post_norm") == ["refit", "local", "layer", "polish"]
    assert steps_of("obs+polish+layer+refit", polished=True) == ["refit", "layer", "polish"]  # as asked, in order
    assert steps_of("concat", polished=True) == []


@pytest.mark.parametrize(
    ("family", "init", "epochs", "fitted"),
    [
        ("mixtral", "walk", 1.0, False),
        ("mixtral", "walk", 0.0, True),
        ("mixtral", "obs+refit+layer+polish", 1.0, True),
        ("flex_olmo", "walk", 1.0, True),  # its host norms what the FFN writes
    ],
)
def test_whole_layers_are_fitted_where_no_polish_follows(tmp_path, family, init, epochs, fitted):
    make(family, tmp_path)
    ids = torch.randint(5, 60, (7, 13), generator=torch.Generator().manual_seed(0))
    config = dataclasses.replace(SHORT, polish_epochs=epochs)
    teacher = load_teacher(tmp_path, experts="streamed")
    student = build_student(teacher, "80%", Blocks(ids), init=init, config=config)
    layers = [record for record in student.history if "layer" in record]
    assert len(layers) == student.model.config.num_hidden_layers
    assert [("layer_after" in record) for record in layers] == [fitted] * len(layers)
    assert any("polish_kl_after" in record for record in student.history) == (epochs > 0)


def test_local_steps_are_as_wanted_or_by_what_follows():
    assert local_steps(7, polished=True) == local_steps(7, polished=False) == 7
    assert 0 < local_steps(0, polished=True) < local_steps(0, polished=False)
