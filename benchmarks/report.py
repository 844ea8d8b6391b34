"""Measure how long the report of a large run takes to render, and how big the page is.

python benchmarks/report.py [--layers 48] [--experts 128] [--out FOLDER]
"""

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from moe2dense.reporting.html import save_report

DOMAINS = ["code", "mathematics", "law", "biology", "fiction", "news", "dialogue", "encyclopedia"]
SENTENCE = "the model routes each token through two experts and adds what they return to the residual stream of state"
WORDS = SENTENCE.split()


def made_up_report(layers: int = 4, experts: int = 8, seed: int = 0) -> dict[str, Any]:
    """Return a report with every part filled by made-up numbers, of the shape and size of a real one. For tests and timing."""
    rng = random.Random(seed)

    def estimate(x: float, spread: float = 0.06) -> dict[str, float]:
        return {"value": x, "low": x * (1 - spread), "high": x * (1 + spread)}

    def scores(kl: float) -> dict[str, Any]:
        group = {
            "kl": estimate(kl),
            "nll": estimate(3.6 + kl),
            "teacher_nll": estimate(3.6),
            "agreement": estimate(1 / (1 + kl)),
        }
        by_domain = {
            d: {"tokens": 2000 + 10 * i, "blocks": 9, **group, "kl": estimate(kl * (0.7 + 0.1 * i), 0.2)}
            for i, d in enumerate(DOMAINS)
        }
        by_decile = [
            {"decile": i + 1, "tokens": 2448, "blocks": 96, **group, "kl": estimate(kl * (2 - i / 8))}
            for i in range(10)
        ]
        by_position = [{"start": 0 if g == 0 else 2 ** (g - 1), "end": 2**g, "tokens": 96 * 2 ** max(g - 1, 0), "blocks": 96, **group,
                  "kl": estimate(kl * (0.8 + 0.06 * g))} for g in range(9)]  # fmt: skip
        return {
            "kl": estimate(kl), "nll": estimate(3.618 + kl, 0.01), "teacher_nll": estimate(3.618, 0.01), "perplexity": estimate(37.3 * 2.718**kl, 0.03),
            "teacher_perplexity": estimate(37.3, 0.03), "agreement": estimate(1 / (1 + 1.5 * kl), 0.02), "top5": estimate(1 / (1 + kl), 0.01),
            "correlation": estimate(1 / (1 + kl / 2), 0.01), "ece": estimate(0.02 + kl / 40), "teacher_ece": estimate(0.02), "entropy": estimate(3.4),
            "entropy_gap": estimate(0.03 + kl / 9), "rare_kl": estimate(kl * 2, 0.1), "by_domain": by_domain, "by_decile": by_decile,
            "by_position": by_position, "tokens": 24480, "blocks": 96, "clusters": 27, "unit": "works", "rare_by": "the training text",
            "worst_tokens": [{"id": i, "count": 4 + i, "kl": 2 - i / 8, "teacher_nll": 3.0, "nll": 5.0 - i / 8} for i in range(12)],
        }  # fmt: skip

    size, active = 6.7e6, 3.2e6
    return {
        "schema": 1, "created": "2026-01-01T12:00:00Z",
        "teacher": {"name": "tiny-mixtral" if layers < 9 else "made-up-moe", "bytes": size * 2, "model_type": "mixtral",
                    "num_hidden_layers": layers, "hidden_size": 192, "vocab_size": 4096, "num_experts": experts, "top_k": 2,
                    "expert_width": 256, "shared_width": 0, "parameters": size, "active_parameters": active},
        "student": {"parameters": 3.2e6, "bytes": 6.4e6, "architecture": "MistralForCausalLM", "method": "layerwise", "width": 512,
                    "layers": layers, "moe_shaped": False},
        "cost": {"parameters_ratio": 0.478, "active_ratio": 1.0, "tokens": 500_000, "build_tokens": 5_120, "flops": 1.6e13,
                 "scratch_ratio": 0.013},
        "rows": {"teacher": scores(0.0), "student": scores(0.106), "before": scores(0.21), "control": scores(0.82)},
        "ood": {"student": scores(0.151), "control": scores(1.02)},
        "retention": {"overall": estimate(0.87, 0.02), "kept": estimate(0.87, 0.02), "allow_loss": [],
                      "by_domain": {d: estimate(0.93 - 0.03 * i, 0.04) for i, d in enumerate(DOMAINS)}},
        "history": _history(0.21, 0.106, rng), "control_history": _history(5.6, 0.82, rng),
        "transfer": _transfer(layers, experts, rng), "train_scores": scores(0.098),
        "samples": _samples(), "apart": None, "skills": _skills(), "choice": None, "build": [],
        "tokens": {str(i): f" {WORDS[i]}" for i in range(12)},
        "run": {"command": "moe2dense convert examples/tiny-mixtral --to 3.2m --tokens 500k --control --out out",
                "config": {"model": "examples/tiny-mixtral", "to": "3.2m", "seed": 0, "train": {"lr": 1e-3, "loss": "forward_kl"}},
                "plan": {}, "versions": {"moe2dense": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
                "timings": {"build": 43.0, "targets": 15.0, "train-student": 180.0, "evaluate": 22.0},
                "hashes": {"teacher": "9f2c41d07b13e5aa", "model": "11d4c5e0aa7781c2"},
                "data": {"train": {"path": "examples/text", "blocks": 1953, "tokens": 499_968},
                         "ood": {"path": "examples/text/ood", "blocks": 96, "tokens": 24_576}}},
        "diagnosis": [{"id": "few_calibration_tokens", "severity": "warning", "title": "Few calibration tokens",
                       "finding": "The student was built from 5,120 tokens for 512 neurons a layer; 20 a neuron (10,240) are advisable.", "remedy": "Raise --tokens; the build uses a share of them."}],
    }  # fmt: skip


def _skills() -> dict[str, Any]:
    rows = []
    for i, title in enumerate(("Arithmetic", "Copying", "Induction", "Brackets", "Training text", "Code")):
        solved = {"teacher": 0.25 + i / 8, "student": 0.25 + i / 9, "before": 0.25 + i / 10, "control": 0.25 + i / 20}
        scores = {k: {"value": v, "low": v - 0.15, "high": min(1.0, v + 0.15)} for k, v in solved.items()}
        kept = {
            k: None if i < 2 else (solved[k] - 0.25) / (solved["teacher"] - 0.25)
            for k in ("student", "before", "control")
        }
        rows.append(
            {
                "name": title.lower(),
                "title": title,
                "help": "A small task.",
                "tasks": 20,
                "scores": scores,
                "retention": kept,
            }
        )
    return {"chance": 0.25, "skills": rows}


def _samples() -> dict[str, Any]:
    rows = [{"domain": d, "prompt": "Once upon a time", "teacher": " there was a king.", "student": " there was a queen.",
             "text": " there lived a miller."} for d in DOMAINS[:3]]  # fmt: skip
    scores = {w: {"teacher": 2.1 + i / 4, "student": 2.2 + i / 5, "judge": 0.8 + i / 9, "distinct": 0.8 + i / 20}
              for i, w in enumerate(("teacher", "student", "text"))}  # fmt: skip
    return {"rows": rows, "scores": scores, "how": "The teacher wrote from memory.", "prompt_tokens": 32, "tokens": 32, "temperature": 0.0,
            "judge": "third-model", "sheet": ["samples.csv", "samples-key.csv"]}  # fmt: skip


def _history(start: float, end: float, rng: random.Random) -> list[dict[str, Any]]:
    out = []
    for step in range(1, 241):
        kl = end + (start - end) * 0.985**step
        row = {"step": step, "tokens": step * 2048, "loss": kl * (1 + rng.gauss(0, 0.05)), "lr": 1e-3, "tokens_per_second": 2900.0,
               "parts": {"kl": kl, "ce": 3.6 + kl}}  # fmt: skip
        if step % 40 == 0:
            row |= {"valid_kl": kl, "valid_rare_kl": 2 * kl, "valid_nll": 3.618 + kl}
        out.append(row)
    return out


def _transfer(layers: int, experts: int, rng: random.Random) -> dict[str, Any]:
    rows, ranked = [], []
    for index in range(layers):
        load = [rng.gammavariate(2.0, 1.0) for _ in range(experts)]
        total = sum(load)
        load = [2 * x / total for x in load]
        kept = [min(1.0, rng.betavariate(4, 2)) for _ in range(experts)]
        coverage = [max(-0.05, min(1.0, k * 0.9 + rng.gauss(0.05, 0.06) - 0.1 * index / layers)) for k in kept]
        measured = [x > 0.12 / experts for x in load]
        metrics = {
            "coverage": [round(c, 4) if s else None for c, s in zip(coverage, measured, strict=True)],
            "error_after": [
                round(max(0.02, 0.7 * (1 - c)), 4) if s else None for c, s in zip(coverage, measured, strict=True)
            ],
            "error_before": [
                round(max(0.05, 1.0 - c), 4) if s else None for c, s in zip(coverage, measured, strict=True)
            ],
            "cosine_after": [round(c, 4) if s else None for c, s in zip(coverage, measured, strict=True)],
            "cosine_before": [round(c * 0.9, 4) if s else None for c, s in zip(coverage, measured, strict=True)],
            "kl_after": [round(0.2 - 0.12 * c, 4) if s else None for c, s in zip(coverage, measured, strict=True)],
            "kl_before": [round(0.4 - 0.22 * c, 4) if s else None for c, s in zip(coverage, measured, strict=True)],
            "kept_energy": [round(k, 4) for k in kept],
            "kept_neurons": [round(k * 0.6, 4) for k in kept],
            "load": [round(x, 5) for x in load],
            "mean_weight": [round(rng.uniform(0.3, 0.7), 4) for _ in range(experts)],
            "alpha": [round(x * 0.5, 5) for x in load],
            "energy_share": [round(x / 2, 5) for x in load],
            "replaceability": [round(rng.betavariate(2, 5), 4) for _ in range(experts)],
            "lift": [round(1 + rng.expovariate(2), 3) for _ in range(experts)],
        }
        shares = [[rng.gammavariate(3, 1) for _ in DOMAINS] for _ in range(experts)]
        rows.append({
            "index": index, "metrics": metrics, "measured": measured, "tokens": [int(x * 24480) for x in load],
            "blocks": [min(96, int(x * 24480)) for x in load],
            "coverage_low": [None if v is None else v - 0.04 for v in metrics["coverage"]],
            "coverage_high": [None if v is None else v + 0.04 for v in metrics["coverage"]],
            "kl_low": [None if v is None else v * 0.9 for v in metrics["kl_after"]],
            "kl_high": [None if v is None else v * 1.1 for v in metrics["kl_after"]],
            "error_zero": [1.0] * experts, "error_mean": [0.9] * experts, "error_random": [0.6] * experts,
            "provenance": ["kept" if k > 0.9 else "partly kept" if k > 0.02 else "dropped" for k in kept],
            "neurons_from": [int(k * 100) for k in kept], "other_neurons": {"shared": 0, "new": 7, "mixed": 0},
            "replaced_by": [rng.randrange(experts) for _ in range(experts)], "lift_chance": [1.35] * experts,
            "domains": [[round(x / sum(s), 4) for x in s] for s in shares],
            "contexts": [[[" ".join(rng.choices(WORDS, k=5)) + " ", rng.choice(WORDS), " " + " ".join(rng.choices(WORDS, k=4)),
                           rng.choice(DOMAINS), round(rng.random(), 3)] for _ in range(6)] for _ in range(experts)],
            "rollup": {"coverage": sum(x * max(0, min(1, c)) for x, c in zip(load, coverage, strict=True)) / 2,
                       "error_before": 0.4 + 0.2 * index / layers, "error_after": 0.2 + 0.2 * index / layers,
                       "stream_before": 0.1 + 0.3 * index / layers, "stream_after": 0.05 + 0.2 * index / layers, "measured": sum(measured)},
        })  # fmt: skip
        ranked += [(coverage[e], index, e) for e in range(experts) if measured[e]]
    ranked.sort()
    return {
        "layers": rows, "domains": DOMAINS, "domain_share": [1 / len(DOMAINS)] * len(DOMAINS), "least_tokens": 64, "tokens": 24480,
        "inputs": "teacher", "model": {"transferred": sum(r["rollup"]["coverage"] for r in rows) / layers, "reproduced": 0.84, "reproduced_before": 0.71, "experts": layers * experts,
                                       "measured": len(ranked)},
        "worst": [[i, e] for _, i, e in ranked[:8]], "best": [[i, e] for _, i, e in ranked[:-9:-1]],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.out or Path(temporary)
        report = made_up_report(args.layers, args.experts)
        start = time.perf_counter()
        page = save_report(report, folder)
        seconds = time.perf_counter() - start
        print(f"{args.layers} layers x {args.experts} experts: rendered in {seconds:.2f} s, "
              f"report.html {page.stat().st_size / 1e6:.2f} MB, report.json {(folder / 'report.json').stat().st_size / 1e6:.2f} MB")  # fmt: skip


if __name__ == "__main__":
    main()
