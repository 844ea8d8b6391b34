"""Check a machine's GPU in one go: the tests that need one, then a Mixtral of real width and two layers, ending in a table.

    python benchmarks/gpu_check.py                  # a GPU of 24 GB or more, 12 GB of disk: about five minutes on an H100
    python benchmarks/gpu_check.py --share 0.05     # the same with a twentieth of the widths
    python benchmarks/gpu_check.py --no-tests

The model has random weights. It is streamed and, where it fits, run resident over the same text; then a student of the width of one
expert is built from it, with its neurons chosen, refitted and fitted. Peak memory is torch's own, on the GPU.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe2dense.common.devices import pick_device
from moe2dense.common.units import show_bytes, show_count
from moe2dense.config.schema import BuildConfig
from moe2dense.data.blocks import Blocks
from moe2dense.families.cards import student_host
from moe2dense.modeling.shape import teacher_geometry
from moe2dense.student.build.api import build_student
from moe2dense.student.target.dense_config import dense_config
from moe2dense.student.target.resolve import Target
from moe2dense.teacher.load import load_teacher
from moe2dense.teacher.model import Teacher

LAYERS, HIDDEN, WIDTH, EXPERTS, VOCABULARY = 2, 4096, 14336, 8, 32000
BLOCK, BLOCKS = 512, 24


def make_teacher(folder: Path, share: float, device: torch.device) -> None:
    """Write a random Mixtral of `LAYERS` layers, its widths a share of the real ones."""
    heads = max(4, round(32 * share))
    config = AutoConfig.for_model(
        "mixtral", num_hidden_layers=LAYERS, hidden_size=128 * heads, intermediate_size=max(64, round(WIDTH * share / 64) * 64),
        num_local_experts=EXPERTS, num_experts_per_tok=2, vocab_size=VOCABULARY, num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4), max_position_embeddings=4096,
    )  # fmt: skip
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to("cpu").save_pretrained(folder)


def measured(work: Callable[[], object], device: torch.device) -> tuple[float, int, object]:
    """Return (seconds, peak bytes on the GPU, result) of some work."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    begun = time.perf_counter()
    result = work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - begun, torch.cuda.max_memory_allocated(device), result


def student_target(teacher: Teacher) -> Target:
    """Return a dense student as wide as one expert."""
    assert teacher.card is not None
    card, width = student_host(teacher.card.host), int(teacher.config.intermediate_size)
    shape = teacher_geometry(teacher.config, teacher.card)
    return Target("check", "check", card, width, dense_config(teacher.config, card, width), 0, shape)


def check(folder: Path, share: float, device: torch.device) -> list[tuple[str, str, str, str]]:
    """Return rows (what, seconds, peak memory, remark)."""
    make_teacher(folder, share, device)
    data = Blocks(torch.randint(3, VOCABULARY, (BLOCKS, BLOCK), generator=torch.Generator().manual_seed(0)))
    rows, answers = [], []
    for experts in ("streamed", "grouped_mm"):
        teacher = load_teacher(folder, experts=experts, device="cuda")
        teacher.run(data.input_ids[:1], logits=False)
        read = teacher.checkpoint.bytes_read
        seconds, peak, output = measured(lambda teacher=teacher: teacher.run(data.input_ids, logits=False), device)
        answers.append(output.hidden_states)  # type: ignore[attr-defined]
        remark = (
            f"{show_count(data.tokens / seconds)} tokens/s, {show_bytes(teacher.checkpoint.bytes_read - read)} read"
        )
        rows.append((f"teacher, {experts}", f"{seconds:.2f}", show_bytes(peak), remark))
        del teacher
    difference = float((answers[0].float() - answers[1].float()).norm() / answers[0].float().norm())
    rows.append(("streamed and resident differ by", "", "", f"{difference:.2g} of the states"))
    teacher = load_teacher(folder, experts="streamed", device="cuda")
    config = BuildConfig(local_steps=100, layer_steps=50, gram_tokens=0)
    seconds, peak, student = measured(
        lambda: build_student(teacher, student_target(teacher), data, init="obs+refit+local+layer", config=config),
        device,
    )
    for record in student.history:  # type: ignore[attr-defined]
        steps = ", ".join(
            f"{name.removeprefix('error_')} {record[name]:.4f}" for name in record if name.startswith("error")
        )
        rows.append((f"build, layer {record['layer']}", f"{record['seconds']:.1f}", "", steps))
    rows.append(("build, whole", f"{seconds:.1f}", show_bytes(peak), f"{data.tokens} tokens"))
    return rows


def main() -> int:
    """Run the tests and the check; print the table. Return the tests' exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--folder", default=None, help="where the model is written; a temporary folder by default")
    options = parser.parse_args()
    device = pick_device("cuda")
    code = 0 if options.no_tests else subprocess.call([sys.executable, "-m", "pytest", "-m", "gpu", "-q"])
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = check(Path(folder), options.share, device)
    print(
        f"\n{torch.cuda.get_device_name(device)}, torch {torch.__version__}, tests {'passed' if code == 0 else 'FAILED'}\n"
    )
    print("| what | seconds | peak memory | |\n|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    return code


if __name__ == "__main__":
    sys.exit(main())
