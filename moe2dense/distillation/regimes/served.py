"""On-policy distillation from a teacher that a server runs: the student writes, the server gives its likeliest tokens at every word."""

from typing import Any

import torch
from torch import Tensor

from moe2dense.common.processes import gather_rows, my_share, world
from moe2dense.config.training import RegimeConfig
from moe2dense.distillation.regimes.on_policy import OnPolicy, WindowTargets
from moe2dense.distillation.targets.served.live import TopKTargets, ask_targets
from moe2dense.distillation.targets.served.server import TeacherServer
from moe2dense.errors import UserError

_IDS, _LOG_P = "teacher_ids", "teacher_log_p"


class ServedOnPolicy(OnPolicy):
    """On-policy distillation with the k likeliest tokens that a server gives, the rest of the mass in one bucket."""

    def __init__(self, server: TeacherServer, options: RegimeConfig):
        self.server, self.options = server, options
        self.window = None

    def settings(self) -> dict[str, Any]:
        """Return the regime's options and which served model answers, wherever its server is."""
        return super().settings() | {"served_model": self.server.model, "k": self.server.k}

    def _teacher_answers(self) -> dict[str, Tensor]:
        mine = self.blocks if len(self.blocks) < world()[1] else self.blocks[my_share(len(self.blocks))]
        answers = ask_targets(self.server, mine)
        if mine is self.blocks:
            return {_IDS: answers.ids, _LOG_P: answers.log_p}
        return {_IDS: gather_rows(answers.ids), _LOG_P: gather_rows(answers.log_p)}

    def _window_targets(self, rollouts: dict[str, Tensor]) -> WindowTargets:
        return TopKTargets(rollouts.pop(_IDS), rollouts.pop(_LOG_P).to(torch.float32))


def served_regime(name: str, server: TeacherServer, options: RegimeConfig) -> ServedOnPolicy:
    """Return the regime called `name` with a served teacher. Raises UserError for one that needs more of its teacher than a server gives."""
    if name != OnPolicy.name:
        raise UserError(f"train.regime {name!r} needs the teacher itself; with a served one only on-policy can be used")
    return ServedOnPolicy(server, options)
