"""Which steps a build takes."""

import dataclasses

import pytest
import torch

from moe2dense.config.schema import BuildConfig
from moe2dense.data.blocks import Blocks
from moe2dense.student.build.api import build_student
from moe2dense.student.init_spec import steps_of
from moe2dense.teacher.load import load_teacher
from tests.teacher.families import make

SHORT = BuildConfig(
    local_steps=4, local_batch=16, layer_steps=4, layer_batch=46, heal_epochs=1, heal_batch=46, hold_out=0.3
)


def test_steps_of_an_init():
    assert steps_of("layerwise", healed=False) == ["refit", "local", "layer", "heal"]
    assert steps_of("layerwise", healed=True) == ["refit", "local", "heal"]
    assert steps_of("layerwise", healed=True, join="post_norm") == ["refit", "local", "layer", "heal"]
    assert steps_of("obs+heal+layer+refit", healed=True) == ["refit", "layer", "heal"]  # as asked, in order
    assert steps_of("concat", healed=True) == []


@pytest.mark.parametrize(
    ("family", "init", "epochs", "fitted"),
    [
        ("mixtral", "layerwise", 1.0, False),
        ("mixtral", "layerwise", 0.0, True),
        ("mixtral", "obs+refit+layer+heal", 1.0, True),
        ("flex_olmo", "layerwise", 1.0, True),  # its host norms what the FFN writes
    ],
)
def test_whole_layers_are_fitted_where_no_heal_follows(tmp_path, family, init, epochs, fitted):
    make(family, tmp_path)
    ids = torch.randint(5, 60, (7, 13), generator=torch.Generator().manual_seed(0))
    config = dataclasses.replace(SHORT, heal_epochs=epochs)
    teacher = load_teacher(tmp_path, experts="streamed")
    student = build_student(teacher, "80%", Blocks(ids), init=init, config=config)
    layers = [record for record in student.history if "layer" in record]
    assert len(layers) == student.model.config.num_hidden_layers
    assert [("layer_after" in record) for record in layers] == [fitted] * len(layers)
    assert any("heal_kl_after" in record for record in student.history) == (epochs > 0)
