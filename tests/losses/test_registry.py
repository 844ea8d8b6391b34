"""Every loss that is listed exists, says what it does, and is held by a numerical test."""

import pkgutil
import subprocess
import sys

import pytest
import torch

from moe2dense.errors import UserError
from moe2dense.losses.distillation import distillation_loss
from moe2dense.losses.feature_match import FeatureMatch
from moe2dense.losses.feature_spec import layer_pairs, parse_features
from moe2dense.losses.registry import DIVERGENCES, FEATURE_KINDS, LAYER_MAPS
from moe2dense.losses.teacher_rows import HiddenRows, LogitRows, SampledRows, TopKRows
from moe2dense.modeling.head import Head
from moe2dense.modeling.hooks import feature_name
from tests.losses.test_divergences import TEXTBOOK

ROWS = [*DIVERGENCES.values(), *FEATURE_KINDS.values()]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_has_code_and_help(row):
    assert callable(pkgutil.resolve_name(row.implementation))
    assert row.title and row.help and not row.help.endswith(".")


def test_every_divergence_is_held_against_its_textbook_formula():
    assert {name.partition(":")[0] for name in TEXTBOOK} == DIVERGENCES.keys()


def test_the_number_of_a_divergence_is_an_argument_of_its_function():
    for row in DIVERGENCES.values():
        if row.parameter:
            assert kd_with(f"{row.name}:0.3") != kd_with(row.name)
        else:
            with pytest.raises(UserError, match="unknown"):
                kd_with(f"{row.name}:0.3")


def kd_with(loss: str) -> float:
    """Return the divergence of two fixed distributions."""
    hidden, rows = torch.tensor([[0.0, 1.0, 2.0]]), LogitRows(torch.tensor([[2.0, -1.0, 0.5]]))
    return float(distillation_loss(hidden, None, rows, loss=loss).kd)


@pytest.mark.parametrize("loss", DIVERGENCES)
@pytest.mark.parametrize("stored", ["hidden", "full", "topk", "sampled"])
def test_a_divergence_is_computed_from_the_targets_that_its_row_names(loss, stored):
    log_p = torch.randn(4, 7, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    rows = {
        "hidden": HiddenRows(log_p, Head(torch.eye(7))),
        "full": LogitRows(log_p),
        "topk": TopKRows(*reversed(log_p.topk(3))),
        "sampled": SampledRows(torch.zeros(4, 1).long(), torch.ones(4, 1), torch.zeros(4)),
    }[stored]
    if stored in DIVERGENCES[loss].target_formats:
        assert distillation_loss(torch.zeros(4, 7), None, rows, loss=loss).total.isfinite()
    else:
        with pytest.raises(UserError, match="forward_kl only"):
            distillation_loss(torch.zeros(4, 7), None, rows, loss=loss)


@pytest.mark.parametrize("kind", FEATURE_KINDS)
def test_a_feature_reads_what_its_row_names(kind):
    row = FEATURE_KINDS[kind]
    match = FeatureMatch(f"{kind}:last", (2, 8), (3, 12), 2)
    assert match.teacher_features == tuple(f"{what}-2" for what in row.reads)
    assert match.student_features == tuple(feature_name(f"{what}-1") for what in row.reads)
    if not row.mixes_layers:
        with pytest.raises(UserError, match="learned map"):
            parse_features(f"{kind}:learned")


def test_every_layer_map_is_understood():
    for name in LAYER_MAPS:
        if name != "learned":
            assert layer_pairs(name.replace("K", "2"), 4, 8)


def test_the_rows_load_no_torch():
    code = "import sys, moe2dense.losses.registry, moe2dense.losses.feature_spec; sys.exit(int('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
