"""Every format of the registry writes and reads what the losses that name it can use."""

import pkgutil

import pytest
import torch

from moe2dense.distillation.targets.formats import Format, StoreOptions, written_temperature
from moe2dense.distillation.targets.registry import TARGET_FORMATS
from moe2dense.distillation.targets.store import open_targets
from moe2dense.distillation.targets.write import write_targets
from moe2dense.losses.distillation import distillation_loss
from moe2dense.losses.registry import DIVERGENCES
from tests.distillation.tiny_run import make_blocks, make_teacher


@pytest.mark.parametrize("name", TARGET_FORMATS)
def test_rows_name_their_class(name):
    row = TARGET_FORMATS[name]
    kind = pkgutil.resolve_name(row.implementation)
    assert issubclass(kind, Format) and kind.name == row.name == name
    assert row.title and row.help and kind.__doc__
    assert kind(StoreOptions(name)).bytes_per_token(64, 1000) > 0


@pytest.mark.parametrize("name", TARGET_FORMATS)
def test_a_format_serves_the_divergences_that_name_it(name, tmp_path):
    blocks = make_blocks(2)
    targets = open_targets(write_targets(make_teacher(), blocks, tmp_path, name), blocks)
    row = TARGET_FORMATS[name]
    assert row.whole == all(name in divergence.target_formats for divergence in DIVERGENCES.values())
    assert (written_temperature(targets.batch([0])) is None) == row.whole
    for divergence in DIVERGENCES.values():
        if name in divergence.target_formats:
            rows = targets.batch([1])
            logits = torch.zeros(len(rows), 61, requires_grad=True)
            loss = distillation_loss(logits, None, rows, loss=divergence.name).total
            assert loss > 0 and torch.autograd.grad(loss, logits)[0].abs().sum() > 0
