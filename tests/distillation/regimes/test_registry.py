"""Every regime of the registry is a class that trains a student, and says rightly whether it brings targets."""

import subprocess
import sys

import pytest

from moe2dense.config.training import RegimeConfig
from moe2dense.distillation.api import distill
from moe2dense.distillation.regime import Regime
from moe2dense.distillation.regimes.checks import brings_targets
from moe2dense.distillation.regimes.make import implementation, make_regime
from moe2dense.distillation.regimes.registry import REGIMES, writes_text
from moe2dense.errors import UserError
from tests.distillation.regimes.test_peers import make_peer
from tests.distillation.tiny_run import make_blocks, make_student, make_teacher, same, settings, weights


@pytest.mark.parametrize("name", REGIMES)
def test_rows_name_their_class(name):
    row, regime = REGIMES[name], implementation(name)
    assert issubclass(regime, Regime) and regime.name == row.name == name
    assert row.title and row.paper and row.help and regime.__doc__


@pytest.mark.parametrize("share", ["0.5", "1"])
@pytest.mark.parametrize("name", REGIMES)
def test_every_regime_trains(name, share):
    options = RegimeConfig(share=share, rollout_steps=2)
    regime = make_regime(name, options, make_teacher(), make_peer())
    assert regime.name == name and regime.brings_targets == brings_targets(name, options)
    student, before = make_student(), weights(make_student())
    config = settings(epochs=0.5, alpha=0.3, loss="reverse_kl" if name == "policy-gradient" else "forward_kl")
    teacher = None if regime.brings_targets else make_teacher()
    history = distill(student, teacher, make_blocks(), config=config, regime=regime).history
    assert len(history) == 3 and all(record["loss"] == record["loss"] for record in history)
    assert not same(before, weights(student))


def test_no_name_is_no_regime():
    assert make_regime("") is None and not writes_text("") and not brings_targets("", RegimeConfig(share="1"))
    with pytest.raises(UserError, match="'on-polcy' is unknown .did you mean 'on-policy'"):
        make_regime("on-polcy")


def test_rows_and_checks_load_no_torch():
    modules = (
        "moe2dense.distillation",
        "moe2dense.distillation.checks",
        "moe2dense.distillation.regimes",
        "moe2dense.distillation.regimes.checks",
        "moe2dense.distillation.regimes.registry",
        "moe2dense.distillation.targets.registry",
    )
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
