"""From the name in train.regime to the regime, with the models it needs."""

import importlib

from transformers import PreTrainedModel

from moe2dense.config.training import RegimeConfig
from moe2dense.distillation.regime import Regime
from moe2dense.distillation.regimes.checks import check_regime
from moe2dense.distillation.regimes.registry import REGIMES
from moe2dense.distillation.regimes.served import served_regime
from moe2dense.distillation.targets.served.server import TeacherServer
from moe2dense.modeling.kinds import BuiltStudent
from moe2dense.teacher.kinds import AnyTeacher


def make_regime(
    name: str,
    options: RegimeConfig | None = None,
    teacher: AnyTeacher | None = None,
    peer: BuiltStudent | PreTrainedModel | None = None,
    server: TeacherServer | None = None,
) -> Regime | None:
    """Make the regime called `name` for one run of `distill`; None for "".

    teacher: a Teacher or a transformers model (on-policy, policy-gradient, online); peer: the second student (mutual).
    server: one that runs the teacher, in its place where the regime asks the teacher anew. Raises UserError for an unknown name,
    options outside their range, and a model that is missing.
    """
    options = options or RegimeConfig()
    check_regime(name, options)
    if name and server is not None and REGIMES[name].writes_text:
        return served_regime(name, server, options)
    return implementation(name).create(options, teacher, peer) if name else None


def implementation(name: str) -> type[Regime]:
    """Return the class of the regime called `name`."""
    module, _, class_name = REGIMES[name].implementation.partition(":")
    return getattr(importlib.import_module(module), class_name)
