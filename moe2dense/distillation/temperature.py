"""Choose the temperature to distil at, by short trainings that are judged on held-out text.

Losses at different temperatures cannot be compared with each other, so the held-out KL at T = 1 decides.
"""

import copy
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from moe2dense.common.files import atomic_write
from moe2dense.common.processes import launched
from moe2dense.config.training import TrainConfig
from moe2dense.distillation.batches import Batches
from moe2dense.distillation.targets.formats import written_temperature
from moe2dense.distillation.targets.protocols import SteppedTargets
from moe2dense.distillation.trainer import Trainer
from moe2dense.errors import UserError

CANDIDATES = (1.0, 1.5, 2.0, 4.0)
_MAX_STEPS = 40  # of each trial
_SHARE = 0.1  # of the run's own steps that a trial takes
_MARGIN = 0.01  # by which another temperature must beat 1
CHOICE_FILE = "temperature.json"  # in the folder of the training run: the choice, and each candidate's held-out KL


def choose_temperature(
    model: PreTrainedModel,
    batches: Batches,
    held_out: Batches | None,
    config: TrainConfig,
    seed: int = 0,
    candidates: Sequence[float] = CANDIDATES,
    accelerator: Accelerator | None = None,
    device: torch.device | None = None,
) -> tuple[float, dict[float, float]]:
    """Return the best temperature for this student, teacher and text, and the held-out KL that each candidate reached.

    Every trial trains a copy of the model on the same blocks for the same number of steps. Temperature 1 stays unless
    another is better by 1%. Raises UserError without held-out text, or for targets of one temperature only.
    """
    if held_out is None:
        raise UserError("temperature auto needs validation text (valid=) with the teacher's answers")
    if isinstance(batches.targets, SteppedTargets):
        raise UserError(
            "temperature auto needs the targets of all blocks at once; leave --targets-disk out, or set one"
        )
    if batches.targets is None or written_temperature(batches.targets.batch([0])) is not None:
        raise UserError("temperature auto needs `hidden` or `full` targets; sampled and topk hold one temperature only")
    per_step = max(1, config.batch // batches.blocks.input_ids.shape[1])
    steps = len(batches.blocks) * config.epochs / per_step
    epochs = max(1.0, min(_MAX_STEPS, _SHARE * steps)) * per_step / len(batches.blocks)
    scores = {}
    for temperature in candidates:
        trial = dataclasses.replace(
            config, temperature=temperature, temperature_schedule="", epochs=epochs, eval_every=10**9, report_to="none",
            features="",
        )  # fmt: skip
        trainer = Trainer(copy.deepcopy(model), batches, held_out, trial, seed, None, accelerator, device=device)
        history = trainer.run(False, None, quiet=True).history
        scores[temperature] = history[-1]["valid_kl"]
    best = min(scores, key=lambda t: scores[t])
    if 1.0 in scores and scores[best] > (1 - _MARGIN) * scores[1.0]:
        best = 1.0
    return best, scores


def settle_temperature(
    model: PreTrainedModel,
    batches: Batches,
    held_out: Batches | None,
    config: TrainConfig,
    seed: int,
    out: str | Path | None,
    accelerator: Accelerator | None = None,
    device: torch.device | None = None,
) -> float:
    """Choose the temperature once per training run; out/temperature.json tells a resumed run the choice."""
    path = None if out is None else Path(out) / CHOICE_FILE
    if path is not None and path.exists():
        return float(json.loads(path.read_text())["temperature"])
    best, scores = choose_temperature(model, batches, held_out, config, seed, accelerator=accelerator, device=device)
    if path is not None and launched()[0] == 0:
        table = {f"{t:g}": kl for t, kl in scores.items()}
        atomic_write(path, json.dumps({"temperature": best, "valid_kl": table}, indent=1))
    return best
