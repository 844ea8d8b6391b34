"""Run in mlx-lm's environment: load one exported student and print one line of JSON with what mlx-lm makes of it."""

import importlib.metadata
import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load_model

folder, reference = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
model, _ = load_model(folder)


def log_p(ids):
    logits = model(mx.array([ids]))[0].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


greedy = []
for ids in reference["prompts"]:
    row = list(ids)
    for _ in range(reference["new"]):
        row.append(int(mx.argmax(log_p(row)[-1])))
    greedy.append(row[len(ids) :])
tops = []
for row in log_p(reference["prompts"][-1])[:-1]:
    chosen = mx.argsort(-row)[: reference["top"]].tolist()
    tops.append({str(i): float(row[i]) for i in chosen})
print("ANSWER " + json.dumps({"version": importlib.metadata.version("mlx-lm"), "greedy": greedy, "tops": tops}))
