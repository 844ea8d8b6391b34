"""Write docs/serving.md from docs/serving.json, which the slow tests of tests/exporting/serving write: `python docs/generate_serving.py`."""

import json
from pathlib import Path

from moe2dense.families.cards import student_cards

DOCS = Path(__file__).parent
STACKS = {"vllm": "vLLM", "llama_cpp": "llama.cpp", "mlx": "mlx-lm"}
_HEAD = """\
# Serving, as seen

<!-- Written by docs/generate_serving.py from serving.json, which tests/exporting/serving/test_serving.py writes. -->

Each host was exported from a random student in float32 and loaded in the stack itself, on a CPU. **Seen** means that all greedy tokens after
{prompts} prompts ({new} tokens each) equal transformers', and gives the mean KL from transformers over the positions of one prompt, of the {top}
likeliest tokens and the rest. Everything else names what happened. transformers itself is checked at every export.

`moe2dense convert --for STACK` and `moe2dense export --for STACK` go by this table: where the family's usual host is not served they take one
that is and computes the same, or refuse with the reason. `moe2dense serve` adds the flags. On a CPU vLLM 0.32 turns queries and keys wrongly where they
come head by head; `--compilation-config` leaves that kernel out. `--model-impl transformers` is transformers' own code within vLLM.

"""


def _cell(seen: dict | None, reason: str) -> str:
    """One host in one stack."""
    if seen and seen["equal"] == seen["of"]:
        flags = f", with `{seen['flags']}`" if seen.get("flags") else ""
        return f"seen, KL {seen['kl']:.1g}{flags}"
    if reason.startswith("no:"):
        return reason
    return "not tried"


def page() -> str:
    """The page as Markdown."""
    results = json.loads((DOCS / "serving.json").read_text(encoding="utf-8"))
    lines = [_HEAD.format(**results["how"])]
    versions = ", ".join(f"{STACKS[name]} {run['version']} ({run['date']})" for name, run in results["stacks"].items())
    lines.append(f"Versions: {versions}.\n\n")
    lines.append(f"| host | {' | '.join(STACKS.values())} |\n|{'---|' * (1 + len(STACKS))}\n")
    for name, card in sorted(student_cards().items()):
        if card.host:
            continue
        cells = [_cell(results["hosts"].get(name, {}).get(stack), card.loads.get(stack, "")) for stack in STACKS]
        lines.append(f"| {card.title} (`{name}`) | {' | '.join(cells)} |\n")
    for stack, title in STACKS.items():
        rows = (row.get(stack) for row in results["hosts"].values())
        count = sum(bool(seen) and seen["equal"] == seen["of"] for seen in rows)
        lines.append(f"\n{title}: {count} hosts seen.\n" if stack == "vllm" else f"{title}: {count} hosts seen.\n")
    return "".join(lines)


if __name__ == "__main__":
    (DOCS / "serving.md").write_text(page(), encoding="utf-8")
