"""Peak memory stays near the budget, hidden states spill beyond it, and macro-batches give what one batch gives."""

import json
import resource
import struct
import subprocess
import sys
import tempfile

import pytest
import torch
from transformers import MixtralConfig

from moe2dense.errors import UserError
from moe2dense.teacher.buffers import Arena, SpillFolder
from moe2dense.teacher.cost import memory_budget, split_budget
from moe2dense.teacher.load import load_teacher
from tests.teacher.families import blocks, make

CHILD = """
import resource, sys, torch
from moe2dense.teacher.load import load_teacher
import transformers.models.mixtral.modeling_mixtral
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
torch.set_num_threads(1)
before = peak()
teacher = load_teacher(sys.argv[1], memory="300MB", experts="streamed")
assert not teacher.resident and teacher.backend == "streamed"
out = teacher.run(torch.randint(0, 4000, (4, 16)), logits=False)
assert out.hidden_states.isfinite().all()
print(before, peak(), teacher.checkpoint.bytes_read)
"""


def hollow_mixtral(folder, **sizes) -> int:
    """A Mixtral checkpoint whose experts are zeros that take no disk; returns its size."""
    config = MixtralConfig(**sizes, architectures=["MixtralForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    h, f, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    shapes = {
        "model.embed_tokens.weight": (config.vocab_size, h),
        "lm_head.weight": (config.vocab_size, h),
        "model.norm.weight": (h,),
    }
    for i in range(config.num_hidden_layers):
        p = f"model.layers.{i}."
        shapes |= {p + f"self_attn.{n}_proj.weight": (h, h) if n in "qo" else (kv, h) for n in "qkvo"}
        shapes |= {p + n: (h,) for n in ("input_layernorm.weight", "post_attention_layernorm.weight")}
        shapes[p + "block_sparse_moe.gate.weight"] = (config.num_local_experts, h)
        for e in range(config.num_local_experts):
            for w, shape in (("w1", (f, h)), ("w2", (h, f)), ("w3", (f, h))):
                shapes[f"{p}block_sparse_moe.experts.{e}.{w}.weight"] = shape
    header, at = {}, 0
    for name, shape in shapes.items():
        n = 2 * int(torch.tensor(shape).prod())
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + n]}
        at += n
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
        for name, entry in header.items():
            if ".experts." not in name:  # everything but the experts is random, so that all of them are chosen
                file.seek(8 + len(text) + entry["data_offsets"][0])
                file.write(torch.randn(entry["shape"]).bfloat16().view(torch.int16).numpy().tobytes())
    return at


def test_peak_memory_of_a_model_larger_than_the_budget(tmp_path):
    size = hollow_mixtral(
        tmp_path, vocab_size=4000, hidden_size=1024, intermediate_size=3584, num_hidden_layers=6, num_attention_heads=16,
        num_key_value_heads=4, num_local_experts=8, head_dim=64,
    )  # fmt: skip
    assert size > 1_000_000_000
    child = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-2000:]
    before, after, read = map(int, child.stdout.split())
    assert after - before < 450_000_000, (before, after)
    assert 0.95 * size < read <= size  # each expert once; of the embedding table the rows in use, and no head


def test_hidden_states_spill_and_nothing_changes(tmp_path, monkeypatch):
    reference = make("qwen2_moe", tmp_path)
    ids = blocks(reference, n=6, s=31)
    teacher = load_teacher(tmp_path, memory="16MB")
    spilled = []
    real = SpillFolder.tensor
    monkeypatch.setattr(SpillFolder, "tensor", lambda *a: spilled.append(a[1]) or real(*a))
    monkeypatch.setattr(teacher, "plan", teacher.plan.__class__(**{**vars(teacher.plan), "hidden_bytes": 20_000}))
    assert (teacher.run(ids).logits - reference(ids).logits).abs().max() <= 1e-4
    assert len(spilled) >= 4


@pytest.mark.parametrize("experts", ["streamed", "grouped_mm"])
def test_a_teacher_that_fits_is_read_once(tmp_path, experts):
    ids = blocks(make("mixtral", tmp_path, hidden_size=32, intermediate_size=16))
    teacher = load_teacher(tmp_path, memory="200MB", experts=experts)
    first, read = teacher.run(ids, logits=False), teacher.checkpoint.bytes_read
    again = teacher.run(ids, logits=False)
    assert teacher.resident and 0 < teacher.checkpoint.bytes_read - read <= 101 * 32 * 4  # of the embedding table
    assert torch.equal(first.hidden_states, again.hidden_states)


def test_macro_batches_give_what_one_batch_gives(tmp_path, monkeypatch):
    reference = make("deepseek_v3", tmp_path)
    ids, mask = blocks(reference, n=7, s=19), torch.ones(7, 19, dtype=torch.long)
    mask[5, 11:] = 0
    teacher = load_teacher(tmp_path)
    monkeypatch.setattr(teacher, "plan", teacher.plan.__class__(**{**vars(teacher.plan), "macro_batch": 2 * 19 + 5}))
    got = teacher.run(ids, attention_mask=mask).logits[mask.bool()]
    assert (got - reference(ids, attention_mask=mask).logits[mask.bool()]).abs().max() <= 1e-4


def test_arena_keeps_within_its_budget_and_reuses():
    arena = Arena(1000, torch.device("cpu"), SpillFolder())
    a = arena.buffer("a", (10, 10), torch.float32)
    b = arena.buffer("b", (200,), torch.float32)
    assert arena.used == 400 and list(arena.spilled) == ["b"]
    b.copy_(torch.arange(200.0))
    arena.release()
    assert torch.equal(b, torch.arange(200.0)) and arena.buffer("a", (10, 10), torch.float32) is a


def test_full_disk_is_one_sentence(monkeypatch):
    """The kernel itself refuses: a limit on file sizes stands in for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"spilling the buffer 'x' needs 4 MB .* cannot be made: File too large"):
            Arena(0, torch.device("cpu"), SpillFolder()).buffer("x", (1_000_000,), torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_ends_a_run(tmp_path, monkeypatch):
    """One sentence, no result, and nothing left on the disk that is full."""
    reference = make("mixtral", tmp_path / "model")
    (tmp_path / "spill").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spill"))
    teacher = load_teacher(tmp_path / "model", memory="16MB")
    monkeypatch.setattr(teacher, "plan", teacher.plan.__class__(**{**vars(teacher.plan), "hidden_bytes": 60_000}))
    ids, limits = blocks(reference, n=20, s=23), resource.getrlimit(resource.RLIMIT_FSIZE)
    stream = teacher.stream(ids)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"spilling the buffer 'hidden_next' needs 44.2 kB in .*spill/moe2dense"):
            next(stream)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stream.hidden_states is None and not any(p.is_file() for p in (tmp_path / "spill").rglob("*"))
    assert (teacher.run(ids).logits - reference(ids).logits).abs().max() <= 1e-4  # with the disk back, it runs


def test_unwritable_spill_folder(tmp_path):
    with pytest.raises(UserError, match=r"no file can be made in .*missing"):
        SpillFolder(tmp_path / "missing").tensor((4,), torch.float32, "hidden states")


@pytest.mark.parametrize("memory", ["a lot", "1MB", "-3GB"])
def test_bad_budgets(memory):
    with pytest.raises(UserError, match="memory must be"):
        memory_budget(memory)


def test_half_of_what_is_free_is_the_budget_by_default():
    assert memory_budget("auto", free=3_000_000_000) == 1_500_000_000


@pytest.mark.parametrize(("budget", "resident", "least"), [(10**9, True, 4096), (4 * 10**8, False, 4096)])
def test_a_budget_is_spent_once(budget, resident, least):
    total, layer, expert, token = 3 * 10**8, 3 * 10**7, 10**7, 20 * 1024
    split = split_budget(budget, total, layer, expert, token)
    assert split.resident == resident
    weights = total if resident else layer
    assert weights + split.prefetch_bytes + split.hidden_bytes <= budget
    assert split.macro_batch == max(least, split.hidden_bytes // token)
