"""What a detour and the student's own words are worth, on examples/tiny-mixtral at equal teacher positions.

    python benchmarks/regimes.py progressive --data FOLDER [--tokens 98304] [--seeds 3]
    python benchmarks/regimes.py on-policy --data FOLDER [--tokens 98304] [--seeds 3]
    python benchmarks/regimes.py peers --data FOLDER [--tokens 98304] [--seeds 3]

progressive: 40% of the teacher made at once, against 47% first and 40% from that; build and training share the tokens.
on-policy: one built student of 40%, trained on fixed text or on its own; it then continues held-out prompts freely and the
teacher's nats per token on what it wrote are its "own text" column (the teacher's on its own samples stand above).
peers: the same student beside an average of itself, a peer, more heads or noisy views.
Seeds change the text's order, every draw and the build. Numbers are means over seeds with 95 % t-intervals; `change` is the paired
difference to the first row. The build is shortened (--build) so that a table takes minutes.
"""

import argparse
import copy
import time
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import torch
from scipy import stats

import moe2dense as m2d
from moe2dense.config.schema import BuildConfig
from moe2dense.config.training import RegimeConfig, TrainConfig
from moe2dense.data.blocks import Blocks
from moe2dense.data.load import load_blocks
from moe2dense.distillation.regimes.make import make_regime
from moe2dense.distillation.regimes.online import trainable
from moe2dense.distillation.targets.memory import hidden_targets
from moe2dense.evaluation.reference import reference
from moe2dense.exporting.api import export
from moe2dense.generation.in_memory import continued
from moe2dense.generation.sampling import Sampling
from moe2dense.student.dense_teacher import target_from
from moe2dense.student.target.resolve import resolve_target

ROOT = Path(__file__).parent.parent

TINY = ROOT / "examples" / "tiny-mixtral"
BLOCK, PROMPT, HELD_OUT = 256, 32, 48


@dataclass
class Bench:
    """One seed: the teacher, its text, and what students are judged on."""

    data: str
    tokens: int
    seed: int
    build: BuildConfig
    truth: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.teacher = m2d.load_teacher(TINY, memory="2GB")
        tokenizer = self.teacher.tokenizer()
        self.train = load_blocks(self.data, tokenizer, BLOCK, "train", tokens=self.tokens, seed=self.seed)
        self.held_out = load_blocks(self.data, tokenizer, BLOCK, "valid", tokens=HELD_OUT * BLOCK, seed=0)
        self.truth = {"valid": reference(self.teacher, self.held_out)}
        if any(Path(self.data).glob("ood.*")):
            ood = load_blocks(self.data, tokenizer, BLOCK, "ood", tokens=HELD_OUT * BLOCK, seed=0)
            self.truth["ood"] = reference(self.teacher, ood)

    def scores(self, student) -> dict[str, float]:
        """KL on both held-out texts and likelihood."""
        scores = {name: m2d.evaluate(student, truth, seed=0) for name, truth in self.truth.items()}
        return {f"KL {k}": float(v.kl) for k, v in scores.items()} | {"NLL": float(scores["valid"].nll)}

    @torch.no_grad()
    def own_text(self, model) -> dict[str, float]:
        """The teacher's nats per token on free continuations of 32 tokens by 224, and the share of distinct bigrams."""
        heads = self.held_out.input_ids
        ids = continued(model, heads, PROMPT, Sampling(seed=99), list(range(len(heads))))
        logits = self.teacher.run(ids).logits[:, PROMPT - 1 : -1].log_softmax(-1)
        nll = -logits.gather(2, ids[:, PROMPT:, None])[..., 0]
        bigrams = [len(set(pairwise(row))) / (len(row) - 1) for row in ids[:, PROMPT:].tolist()]
        return {"own text": float(nll.mean()), "distinct": 100 * sum(bigrams) / len(bigrams)}


def build(bench: Bench, source, target, text: Blocks):
    """A built student; the build takes the first half of the text."""
    return m2d.build_student(source, target, text[: max(1, len(text) // 2)], config=bench.build, seed=bench.seed)


def progressive(bench: Bench, tmp: Path) -> dict[str, dict[str, float]]:
    """Both routes to 40%, each of bench.tokens positions in all."""
    config, rows = TrainConfig(), {}
    large, small = (resolve_target(to, bench.teacher.config, bench.teacher.card) for to in ("47%", "40%"))
    start_time = time.perf_counter()
    student = build(bench, bench.teacher, small, bench.train)
    m2d.distill(student, bench.teacher, bench.train, config=config, seed=bench.seed)
    rows["direct, 40%"] = bench.scores(student) | {"seconds": time.perf_counter() - start_time}
    start_time, half = time.perf_counter(), len(bench.train) // 2
    first = build(bench, bench.teacher, large, bench.train[:half])
    m2d.distill(first, bench.teacher, bench.train[:half], config=config, seed=bench.seed)
    export(first, tmp / str(bench.seed), tokenizer=str(TINY), dtype="float32", overwrite=True)
    intermediate_teacher = m2d.load_teacher(tmp / str(bench.seed), memory="2GB")
    student = build(bench, intermediate_teacher, target_from(intermediate_teacher, small), bench.train[half:])
    m2d.distill(student, intermediate_teacher, bench.train[half:], config=config, seed=bench.seed)
    rows["47%, then 40%"] = bench.scores(student) | {"seconds": time.perf_counter() - start_time}
    return rows


def compared(bench: Bench, variants: dict, start, row_of) -> dict[str, dict[str, float]]:
    """Every variant (TrainConfig options, regime, RegimeConfig options) from one student."""
    rows, targets = {}, hidden_targets(bench.teacher, bench.train)
    for name, (options, regime, regime_options) in variants.items():
        student, peer = copy.deepcopy(start), None
        if regime == "mutual":
            peer = m2d.build_student(bench.teacher, "40%", bench.train[:96], init="obs+refit", seed=bench.seed + 1)
        source = trainable(bench.teacher) if regime == "online" else bench.teacher
        chosen_regime = make_regime(regime, RegimeConfig(**regime_options), source, peer)
        fixed_targets = None if chosen_regime is not None and chosen_regime.brings_targets else targets
        start_time = time.perf_counter()
        m2d.distill(
            student,
            data=bench.train,
            targets=fixed_targets,
            config=TrainConfig(**options),
            seed=bench.seed,
            regime=chosen_regime,
        )
        rows[name] = row_of(student) | {"seconds": time.perf_counter() - start_time}
        print(f"seed {bench.seed}: {name}: {rows[name]}", flush=True)
    return rows


def on_policy(bench: Bench, _: Path) -> dict[str, dict[str, float]]:
    """Fixed text against own text, by divergence and share."""
    start = build(bench, bench.teacher, "40%", bench.train)
    own = "on-policy"
    variants = {
        "fixed, forward KL": ({}, "", {}),
        "half own, forward KL": ({}, own, {"share": "0.5"}),
        "fixed, reverse KL": ({"loss": "reverse_kl"}, "", {}),
        "half own, reverse KL": ({"loss": "reverse_kl"}, own, {"share": "0.5"}),
        "all own, reverse KL": ({"loss": "reverse_kl"}, own, {"share": "1"}),
        "policy gradient": (
            {"loss": "reverse_kl", "alpha": 1.0},
            "policy-gradient",
            {"share": "0.8", "rollout_steps": 4},
        ),
        "all own, policy gradient": ({"loss": "reverse_kl"}, "policy-gradient", {"share": "1", "teacher_mix": 0.2}),
    }

    def row_of(student) -> dict[str, float]:
        return bench.scores(student) | bench.own_text(student.model)

    return compared(bench, variants, start, row_of)


def peers(bench: Bench, _: Path) -> dict[str, dict[str, float]]:
    """A second model or view beside the teacher."""
    start = build(bench, bench.teacher, "40%", bench.train)
    variants = {
        "teacher alone": ({}, "", {}),
        "ema 0.2": ({}, "ema", {"share": "0.2"}),
        "peer 0.2 (mutual)": ({}, "mutual", {"share": "0.2"}),
        "views 0.2": ({}, "multiview", {"share": "0.2"}),
        "two heads (mtp)": ({}, "mtp", {}),
        "online teacher": ({}, "online", {}),
    }
    return compared(bench, variants, start, bench.scores)


def table(rows: list[dict[str, dict[str, float]]]) -> None:
    """Means over seeds with their 95 % intervals, and the paired change of each column to the first row."""
    names, columns = list(rows[0]), list(next(iter(rows[0].values())))
    print(f"\n| | {' | '.join(columns)} | change of {columns[0]} |\n|{'---|' * (len(columns) + 2)}")

    def shown(values: list[float], digits: int) -> str:
        mean = sum(values) / len(values)
        if len(values) < 2:
            return f"{mean:.{digits}f}"
        error = float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))
        return f"{mean:.{digits}f} ±{error:.{digits}f}"

    for name in names:
        cells = [shown([r[name][c] for r in rows], 0 if c in ("seconds", "distinct") else 3) for c in columns]
        change = [r[name][columns[0]] - r[names[0]][columns[0]] for r in rows]
        print(f"| {name} | {' | '.join(cells)} | {'' if name == names[0] else shown(change, 4)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["progressive", "on-policy", "peers"])
    parser.add_argument("--data", default=str(ROOT / "examples" / "text"))
    parser.add_argument("--tokens", type=int, default=98_304)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--build", type=int, default=200, help="local steps of the build")
    args = parser.parse_args()
    import tempfile

    short = replace(BuildConfig(), local_steps=args.build, heal_epochs=1.0)
    run = {"progressive": progressive, "on-policy": on_policy, "peers": peers}[args.what]
    start_time, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as tmp:
        for seed in range(args.seeds):
            rows.append(run(Bench(args.data, args.tokens, seed, short), Path(tmp)))
            print(f"seed {seed}: {rows[-1]}", flush=True)
    table(rows)
    print(f"\n{args.seeds} seeds, {args.tokens} teacher positions each, {time.perf_counter() - start_time:.0f} s")


if __name__ == "__main__":
    main()
