"""One distillation run: steps, validation, checkpoints and their resumption."""

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe2dense.common.processes import joined, leave_processes
from moe2dense.config.training import TrainConfig
from moe2dense.distillation.adapters import merge_adapters
from moe2dense.distillation.batches import Batches
from moe2dense.distillation.batching import total_steps
from moe2dense.distillation.checkpoints import (
    Checkpoints,
    on_cpu,
    optimizer_fields,
    optimizer_tensors,
    restore_optimizer,
    written_behind,
)
from moe2dense.distillation.fsdp import own_part, shard, shard_like
from moe2dense.distillation.log import Interrupts, MetricsFile, memory_bytes
from moe2dense.distillation.objective import Objective
from moe2dense.distillation.optimizers import make_optimizer, muon_matrices
from moe2dense.distillation.regime import Regime, RunView
from moe2dense.distillation.setup import (
    check_documents,
    check_head,
    compile_layers,
    make_accelerator,
    prepare_model,
    release_layers,
    step_in_backward,
)
from moe2dense.distillation.step import StepPlan, asked_anywhere, plan_step, train_step, validate
from moe2dense.errors import UserError
from moe2dense.losses.feature_match import FeatureMatch
from moe2dense.modeling.precision import cast_weights
from moe2dense.weights.fingerprint import text_hash
from moe2dense.weights.finite import all_finite

# settings that may change between a run and its continuation
_FREE_SETTINGS = (
    "save_every", "eval_every", "report_to", "targets", "targets_disk", "tokens", "gradient_checkpointing", "shard", "fit_memory",
    "compile",
)  # fmt: skip
_RNG = "rng/state"  # name of the random state in a checkpoint
_REGIME = "regime/"  # prefix of a regime's tensors in a checkpoint


@dataclass
class TrainResult:
    """steps and tokens (positions seen, replays included) of the whole run; unique: positions the teacher answered.

    history: one record per step with `step`, `tokens`, `loss`, `parts`, `lr`, ..., and `valid_kl`, `valid_nll`,
    `valid_rare_kl` where they were measured, step 0 included.
    """

    steps: int
    tokens: int
    unique: int
    history: list[dict[str, Any]] = field(default_factory=list)
    best_step: int | None = None
    seconds: float = 0.0


class Trainer:
    """One run of `distill`. Every process builds the same; a step is a function of weights, optimiser and step number."""

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Batches,
        held_out: Batches | None,
        config: TrainConfig,
        seed: int,
        out: str | Path | None,
        accelerator: Accelerator | None = None,
        match: FeatureMatch | None = None,
        regime: Regime | None = None,
        device: torch.device | None = None,
        after_save: Callable[[], None] | None = None,
    ):
        self.regime = Regime() if regime is None else regime
        self.batches, self.held_out, self.config, self.seed = batches, held_out, config, seed
        self.block = batches.blocks.input_ids.shape[1]
        self.per_step = max(1, config.batch // self.block)
        self.steps = total_steps(len(batches.blocks), self.per_step, config.epochs)
        if next(model.parameters()).dtype != torch.float64:
            model.float()
        check_documents(model, batches.blocks)
        check_head(model, batches.blocks)
        self.was_training, self.start_device = model.training, next(model.parameters()).device
        self.joined_before = joined()
        self.accelerator = accelerator or make_accelerator(config, out, device)
        torch.manual_seed(seed)  # of new adapters and dropout
        self.model = prepare_model(model, config)
        if config.compile:
            compile_layers(self.model)
        if match is not None:
            match.to(next(model.parameters()).dtype)
        objective = Objective(self.model, match, self.regime.extra_loss(self.model))
        self.sharded = config.shard and self.accelerator.num_processes > 1
        if self.sharded:
            self.objective = shard(objective, self.accelerator.device)
            self.optimizer = self.accelerator.prepare(make_optimizer(objective, config))
        else:
            optimizer = make_optimizer(objective, config, muon_matrices(self.model, config))
            self.objective, self.optimizer = self.accelerator.prepare(objective, optimizer)
        if config.step_in_backward:
            step_in_backward(self.optimizer.optimizer, config, self.accelerator.num_processes, self.per_step)
        # the student's parameters under their own names; projectors of features are kept for resuming, never exported
        self.names: dict[Tensor, str] = {
            p: n.removeprefix("model.") for n, p in objective.named_parameters() if p.requires_grad
        }
        main = out is not None and self.accelerator.is_main_process
        self.checkpoints = None if out is None else Checkpoints(Path(out) / "checkpoints", after_save)
        self.metrics = MetricsFile(Path(out) / "metrics.jsonl" if out is not None and main else None)
        self.best: tuple[float, int] | None = None
        self.first_kl: float | None = None
        self.step = 0
        self._copied = after_save is not None  # by a thread, while training goes on
        self._saving: int | None = None  # step of the checkpoint that is being written
        folder = None if out is None else Path(out)
        self.regime.begin(
            RunView(self.model, batches, self.steps, self.per_step, seed, self.accelerator, config, folder)
        )

    def run(self, resume: bool, progress: Callable[..., None] | None, quiet: bool = False) -> TrainResult:
        """Train to the last step and leave the student with its final weights, adapters merged, where it was.

        quiet: do not warn when the student got worse.
        """
        begin = time.perf_counter()
        self._start(resume)
        retried = False
        with Interrupts() as interrupts, self._saves():
            if self.step == 0:
                self._before_training()
            while self.step < self.steps:
                clock = time.perf_counter()
                plan = plan_step(self.config, len(self.batches.blocks), self.per_step, self.step, self.steps, self.seed)
                self.batches.begin_step(self.step)
                batches, plan = self.regime.batches_for(self.step, self.batches, plan)
                try:
                    record = train_step(
                        self.accelerator, self.objective, self.optimizer, batches, plan, self.config,
                        self.regime.pass_context,
                    )  # fmt: skip
                except FloatingPointError as error:
                    if retried or self.checkpoints is None:
                        raise UserError(self._blame(str(error), batches, plan, retried)) from None
                    retried = True
                    self.checkpoints.wait()
                    self.accelerator.wait_for_everyone()
                    self._load(self.checkpoints.steps()[-1])
                    self.metrics.truncate(self.step)
                    continue
                record |= self.regime.after_step(self.step, batches, plan)
                self.step += 1
                seconds = time.perf_counter() - clock
                self._after_step(record, seconds, time.perf_counter() - begin, progress)
                if asked_anywhere(self.accelerator, interrupts.asked) and self.step < self.steps:
                    self._save()
                    self._settle_saved()
                    raise KeyboardInterrupt
        return self._finish(time.perf_counter() - begin, quiet)

    def _start(self, resume: bool) -> None:
        """Continue at the last checkpoint, where there is one. Raises UserError where that was not asked for."""
        if self.checkpoints is not None and (steps := self.checkpoints.steps()):
            if not resume:
                raise UserError(
                    f"{self.checkpoints.folder} holds a training run; continue it with resume, or use another out"
                )
            self._load(steps[-1])
        self.metrics.truncate(self.step or -1)  # step 0 is measured anew

    def _before_training(self) -> None:
        """Measure the student as it is, and save a state to come back to."""
        if self.held_out is not None:
            self.metrics.add({"step": 0, "tokens": 0, "loss": None, "parts": {"kd": None}} | self._measure())
            if not math.isfinite(self.first_kl or 0.0):
                raise UserError(
                    f"the held-out KL is {self.first_kl} before any training, so the student or the targets of the held-out text "
                    f"hold NaN; build the student or write those targets again"
                )
        self._save()

    def _after_step(
        self, record: dict[str, Any], seconds: float, total: float, progress: Callable[..., None] | None
    ) -> None:
        """Measure, log and save, as this step's turn is."""
        last = self.step == self.steps
        tokens = self.step * self.per_step * self.block
        record = {"step": self.step, "tokens": tokens} | record
        record |= {"tokens_per_second": self.per_step * self.block / seconds, "seconds": total}
        record["memory"] = memory_bytes()
        if self.held_out is not None and (last or self.step % self.config.eval_every == 0):
            record |= self._measure()
        self.metrics.add(record)
        self.accelerator.log({k: v for k, v in record.items() if isinstance(v, float)}, step=self.step)
        if last or self.step % self.config.save_every == 0 or (self.best and self.best[1] == self.step):
            self._save()
        if progress:
            numbers = {k: record[k] for k in ("loss", "valid_kl") if k in record}
            progress("distill", self.step, self.steps, tokens=tokens, **numbers)

    def _measure(self) -> dict[str, float]:
        """Return the held-out scores, and note the best KL so far."""
        assert self.held_out is not None
        scores = validate(self.accelerator, self.objective, self.held_out, self.config.micro_batch)
        kl = scores["valid_kl"]
        self.first_kl = kl if self.first_kl is None else self.first_kl
        if self.best is None or kl < self.best[0]:
            self.best = (kl, self.step)
        return scores

    # ---- checkpoints

    @cached_property
    def _text(self) -> tuple[str, str]:
        """Hashes of the blocks and of which of their positions count."""
        return text_hash(self.batches.blocks), self.batches.counted_hash()

    def _identity(self) -> dict[str, Any]:
        """Return what must not change between a run and its continuation."""
        config = {k: v for k, v in asdict(self.config).items() if k not in _FREE_SETTINGS}
        text = {"blocks": len(self.batches.blocks), "text": self._text[0], "tokens to learn": self._text[1]}
        text |= {"targets": self.batches.source} if self.batches.source else {}
        return config | {"seed": self.seed} | text | {f"regime {k}": v for k, v in self.regime.settings().items()}

    def _save(self) -> None:
        """Write a checkpoint of this step and drop all but it and the best. Raises UserError for weights that are not finite."""
        self._check_weights({n: own_part(p.detach()) for p, n in self.names.items()})
        if self.checkpoints is None:
            return
        main = self.accelerator.is_main_process
        metadata = {"best": self.best, "first_kl": self.first_kl, "run": self._identity()}
        best = self.best[1] if self.best else None
        if self.sharded:
            self._save_shards(metadata, best)
            return
        behind = written_behind(self.accelerator.device)
        weights = on_cpu({n: p for p, n in self.names.items()}, main)
        state = optimizer_tensors(self.optimizer.optimizer, self.names, main) | {_RNG: torch.get_rng_state()}
        state |= {f"{_REGIME}{k}": v for k, v in self.regime.state().items()}
        self._settle_saved()
        if main:
            self.checkpoints.save_last(self.step, weights, state, metadata, best, behind)
        self._saving = self.step
        if not (behind or self._copied):
            self._settle_saved()

    def _save_shards(self, metadata: dict[str, Any], best: int | None) -> None:
        """Begin to write this process's part of a checkpoint, once the one before is there."""
        assert self.checkpoints is not None
        self._settle_saved()
        weights = {n: p.detach() for p, n in self.names.items()}
        state = optimizer_fields(self.optimizer.optimizer, self.names) | {_RNG: torch.get_rng_state()}
        parts, main = {"weights": weights, "optimizer": state}, self.accelerator.is_main_process
        self.checkpoints.save_shards(self.step, parts, metadata, best, main, self.accelerator.wait_for_everyone)
        self._saving = self.step

    @contextlib.contextmanager
    def _saves(self) -> Iterator[None]:
        """Wait, when the context ends, for what is being written, whatever ends it."""
        try:
            yield
        except BaseException:
            if self.checkpoints is not None:
                self.checkpoints.wait()
            raise
        self._settle_saved()

    def _settle_saved(self) -> None:
        """Wait until the checkpoint that is being written is there, and tell the regime."""
        if self.checkpoints is None or self._saving is None:
            return
        self.checkpoints.wait()
        self.accelerator.wait_for_everyone()
        saved, self._saving = self._saving, None
        self.regime.saved(saved)

    def _check_weights(self, weights: dict[str, Tensor]) -> None:
        """Raise UserError where training has left NaN or infinity among the weights: after the last step no loss would show it."""
        spoilt = next((name for name, value in weights.items() if not all_finite(value)), None)
        if spoilt is not None:
            raise UserError(
                f"training stopped after step {self.step} of {self.steps}: it left NaN or infinity in {spoilt}; lower --lr (now "
                f"{self.config.lr:g}){self._last_sound()}"
            )

    def _last_sound(self) -> str:
        """Return what can still be used of a run that has to stop, as the end of a sentence; '' where nothing was saved."""
        steps = [] if self.checkpoints is None else self.checkpoints.steps()
        if self.checkpoints is None or not steps:
            return ""
        step = self.best[1] if self.best and self.best[1] in steps else steps[-1]
        return f". {self.checkpoints.path(step)} is as it was before and can be exported or evaluated"

    def _load(self, step: int) -> None:
        """Go to the state of a checkpoint. Raises UserError for one of other settings or text."""
        assert self.checkpoints is not None
        metadata = self.checkpoints.state(step)
        saved, now = metadata["run"], self._identity()
        changed = next((k for k, v in saved.items() if now.get(k) != v), None)
        if changed is not None:
            raise UserError(
                f"checkpoint {self.checkpoints.path(step)} was made with {changed}={saved[changed]} (now "
                f"{now.get(changed)}); use the same settings, or another --out"
            )
        if self.sharded and self.checkpoints.is_sharded(step):
            state = self.checkpoints.load_shards(step, self.names)
        else:
            weights, state, _ = self.checkpoints.load(step)
            with torch.no_grad():
                for parameter, name in self.names.items():
                    parameter.copy_(shard_like(weights[name], parameter))
        torch.set_rng_state(state.pop(_RNG))
        regime_keys = [k for k in state if k.startswith(_REGIME)]
        self.regime.load_state({k.removeprefix(_REGIME): state.pop(k) for k in regime_keys})
        restore_optimizer(self.optimizer.optimizer, self.names, state)
        self.step, self.first_kl = metadata["step"], metadata["first_kl"]
        self.best = (metadata["best"][0], metadata["best"][1]) if metadata["best"] else None

    # ---- ends

    def _blame(self, error: str, batches: Batches, plan: StepPlan, retried: bool) -> str:
        """Return the sentence that stops a run whose numbers are not finite, naming the block where one can be named."""
        where = next(
            (batches.name_of(i) for i in plan.indices if not self._finite(batches, i, plan)), f"blocks {plan.indices}"
        )
        again = ", also after going back to the last checkpoint" if retried else ""
        return (
            f"training stopped at step {self.step + 1} of {self.steps}: {error} at {where}{again}; lower --lr (now "
            f"{self.config.lr:g}), or look at that text and its targets{self._last_sound()}"
        )

    @torch.no_grad()
    def _finite(self, batches: Batches, index: int, plan: StepPlan) -> bool:
        """Return whether the loss on one block is finite."""
        inputs, teacher, options = batches.part([index], self.accelerator.device, plan.alpha > 0)
        options |= {"loss": self.config.loss, "temperature": plan.temperature, "alpha": plan.alpha}
        with self.regime.pass_context([index]):
            total, *_ = self.objective(inputs, teacher if plan.alpha < 1 else None, **options)
        return bool(total.isfinite())

    def _finish(self, seconds: float, quiet: bool) -> TrainResult:
        """Leave the student whole, warn where it got worse, and return the result."""
        self.regime.finish(self.checkpoints.folder.parent if self.checkpoints is not None else None)
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if not self.joined_before:  # else whoever joined the processes has more for them to do
            leave_processes()
        if self.config.compile:
            release_layers(self.model)
        model = merge_adapters(self.model) if self.config.lora else self.model
        model.train(self.was_training)
        if not self.config.shard:
            nn.Module.to(model, self.start_device)
            if self.config.weights != "float32":
                cast_weights(model, torch.float32)
        history = self.metrics.records
        final = next((r["valid_kl"] for r in reversed(history) if "valid_kl" in r), None)
        if not quiet and final is not None and self.first_kl is not None and not final <= self.first_kl:
            warnings.warn(
                f"DISTILLATION MADE THE STUDENT WORSE: validation KL went from {self.first_kl:.4g} to {final:.4g}; lower "
                f"--lr (now {self.config.lr:g}), give more --tokens, or use the student as it was before",
                stacklevel=4,
            )
        seen = self.step * self.per_step
        return TrainResult(
            steps=self.step,
            tokens=seen * self.block,
            unique=(seen if self.regime.always_new else min(len(self.batches.blocks), seen)) * self.block,
            history=history,
            best_step=self.best[1] if self.best else None,
            seconds=seconds,
        )
