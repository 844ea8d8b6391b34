"""Hosts in the stacks that serve them: what docs/serving.json says was seen is what the cards claim, and is seen again.

The slow test runs every host in vLLM (MOE2DENSE_VLLM_PYTHON: a Python that has it), in mlx-lm (MOE2DENSE_MLX_PYTHON: the same) and in llama.cpp
(xllamacpp in this Python), and with MOE2DENSE_WRITE_SERVING=1 writes docs/serving.json anew.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe2dense.exporting.api import export
from moe2dense.exporting.gguf.hosts import HOSTS as GGUF_HOSTS
from moe2dense.families.cards import student_cards
from tests.exporting.serving.hosts import HOSTS, NEW, PROMPTS, TOP, kl, student, write

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "docs" / "serving.json"
_SPEC = importlib.util.spec_from_file_location("generate_serving", ROOT / "docs" / "generate_serving.py")
serving_page = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(serving_page)
STACKS = serving_page.STACKS
PYTHONS = {
    "vllm": os.environ.get("MOE2DENSE_VLLM_PYTHON", ""), "mlx": os.environ.get("MOE2DENSE_MLX_PYTHON", ""), "llama_cpp": sys.executable,
}  # fmt: skip
# what `vllm serve` is given: nothing; its kernel that rotates queries and keys left out, which on a CPU is wrong for those that come head
# by head; transformers' own code of the architecture within vLLM
FLAGS = ("", '--compilation-config {"custom_ops":["-rotary_embedding"]}', "--model-impl transformers")
LETTER = 65  # a plain character of the example's vocabulary


def command(stack: str, hosts: list[str], folder: Path, flags: str) -> list[str]:
    """What runs a stack on exported hosts: mlx-lm and llama.cpp on one of them, vLLM on all, since starting it takes most of the time."""
    script = str(Path(__file__).parent / f"run_{stack}.py")
    if stack == "vllm":
        return [PYTHONS[stack], script, flags, *(str(folder / host) for host in hosts)]
    reference = str(folder / f"{hosts[0]}.json")
    if stack == "llama_cpp":
        place = str(folder / f"{hosts[0]}-gguf")
        return [PYTHONS[stack], "-m", "tests.exporting.serving.run_llama_cpp", place, reference]
    return [PYTHONS[stack], script, str(folder / hosts[0]), reference]


def run(stack: str, hosts: list[str], folder: Path, flags: str = "") -> dict[str, dict]:
    """{"equal", "of", "kl", "version"} of each host in one stack, or {"error"}. A host that ends its process is left out of the next."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    results: dict[str, dict] = {}
    while left := [host for host in hosts if host not in results]:
        now = left if stack == "vllm" else left[:1]
        done = subprocess.run(
            command(stack, now, folder, flags), capture_output=True, text=True, env=environment, cwd=ROOT
        )
        lines = [line.removeprefix("ANSWER ") for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
        for host, line in zip(now, lines, strict=False):
            results[host] = judged(json.loads(line), json.loads((folder / f"{host}.json").read_text()))
        if len(lines) < len(now):
            results[now[len(lines)]] = {"error": (done.stdout + done.stderr)[-2000:]}
    return results


def judged(answer: dict, wanted: dict) -> dict:
    """How a stack's answer compares with transformers'."""
    if "error" in answer:
        return answer
    equal = sum(got == want for got, want in zip(answer["greedy"], wanted["greedy"], strict=True))
    return {"equal": equal, "of": PROMPTS, "kl": kl(wanted, answer["tops"]), "version": answer["version"]}


def seen(stack: str, hosts: list[str], folder: Path, tokenizer: Path) -> dict[str, dict]:
    """What a stack makes of some hosts, with the first of its flags that are right."""
    for host in hosts:
        write(host, folder, tokenizer)
        reference = folder / f"{host}.json"
        reference.write_text(json.dumps(json.loads(reference.read_text()) | {"letter": LETTER}))
        if stack == "llama_cpp":
            export(student(host), folder / f"{host}-gguf", tokenizer=str(tokenizer), format="gguf", dtype="float32")
    results: dict[str, dict] = {}
    for flags in FLAGS if stack == "vllm" else ("",):
        left = [host for host in hosts if results.get(host, {}).get("equal") != PROMPTS]
        for host, result in run(stack, left, folder, flags).items():
            if host not in results or result.get("equal") == PROMPTS:
                results[host] = result | ({"flags": flags} if flags else {})
    return results


@pytest.mark.slow
@pytest.mark.parametrize("stack", STACKS)
def test_what_is_claimed_is_seen(stack, tmp_path, tiny):
    if not PYTHONS[stack]:
        pytest.skip(f"no Python with {stack} is named")
    if stack == "llama_cpp":
        pytest.importorskip("xllamacpp")
    hosts = [h for h in HOSTS if stack != "llama_cpp" or h in GGUF_HOSTS]
    results = seen(stack, hosts, tmp_path, tiny)
    record(stack, results)
    for host, result in results.items():
        claimed = student_cards()[host].loads.get(stack) == "seen"
        assert claimed == (result.get("equal") == PROMPTS), (host, result)
        assert not claimed or result["kl"] < 1e-4, (host, result)


def record(stack: str, results: dict[str, dict]) -> None:
    """Write what was seen of a stack to docs/serving.json, where that is asked for."""
    if not os.environ.get("MOE2DENSE_WRITE_SERVING"):
        return
    table = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"how": {}, "stacks": {}, "hosts": {}}
    table["how"] = {"prompts": PROMPTS, "new": NEW, "top": TOP}
    version = next(r["version"] for r in results.values() if "version" in r)
    table["stacks"][stack] = {"version": version, "date": time.strftime("%Y-%m-%d")}
    for host, result in results.items():
        kept = {name: result[name] for name in ("equal", "of", "kl", "flags") if name in result}
        table["hosts"].setdefault(host, {})[stack] = kept or {"equal": 0, "of": PROMPTS, "kl": None}
    RESULTS.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def test_the_cards_claim_what_was_seen():
    hosts = json.loads(RESULTS.read_text())["hosts"]
    for name, card in student_cards().items():
        if card.host:
            continue
        for stack in STACKS:
            result = hosts.get(name, {}).get(stack)
            right = bool(result) and result["equal"] == result["of"]
            assert (card.loads.get(stack) == "seen") == right, (name, stack, card.loads.get(stack), result)
            flags = tuple((result or {}).get("flags", "").split()) if right else ()
            assert tuple(card.serve_flags.get(stack, ())) == flags, (name, stack)


def test_the_page_is_current():
    assert (ROOT / "docs" / "serving.md").read_text(encoding="utf-8") == serving_page.page(), (
        "run `python docs/generate_serving.py`"
    )
