"""What a process holds while it trains falls with the number of processes, where weights and optimiser are spread over them."""

import multiprocessing

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from moe2dense.common.counters import metered, resident_memory
from moe2dense.common.processes import join_processes
from moe2dense.data.blocks import Blocks
from moe2dense.distillation.api import distill
from moe2dense.distillation.targets.memory import hidden_targets
from moe2dense.weights import sharded
from tests.distillation.test_processes import as_rank, free_port
from tests.distillation.tiny_run import settings

SIZES = dict(
    vocab_size=61, hidden_size=512, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=32, tie_word_embeddings=False,
)  # fmt: skip


def student(width=2048):
    """Return a student with 31 million parameters, all but a few in its layers."""
    torch.manual_seed(2)
    return MistralForCausalLM(MistralConfig(**SIZES, intermediate_size=width))


def note_peak(rank, processes, port, out):
    """Train two steps, and write by how much memory grew at most."""
    as_rank(rank, processes, port)
    sharded.FILE_BYTES = 8_000_000  # as little of this small model's part as of a large one's
    blocks = Blocks(torch.randint(0, 61, (8, 12), generator=torch.Generator().manual_seed(0)))
    config = settings(batch=48, micro_batch=1, optimizer="adamw", save_every=100, shard=True)
    with join_processes():
        targets = hidden_targets(student(32).eval(), blocks)
        options = dict(data=blocks, targets=targets, config=config, seed=3)
        distill(student(32), out=out / f"small-{processes}", **options)  # what is loaded once
        before = resident_memory()
        with metered() as cost:
            distill(student(), out=out / f"run-{processes}", **options)
    (out / f"{processes}-{rank}").write_text(str(cost.memory - before))


@pytest.mark.slow
def test_what_training_holds_falls_with_the_number_of_processes(tmp_path, monkeypatch):
    """Weights, gradients and two moments, 16 bytes a parameter, are spread, as is the copy of weights and moments that is being saved."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "100000")  # what is freed is given back, as that of large tensors is
    context = multiprocessing.get_context("spawn")
    for processes in (1, 2, 4):
        port = free_port()
        started = [context.Process(target=note_peak, args=(r, processes, port, tmp_path)) for r in range(processes)]
        for process in started:
            process.start()
        for process in started:
            process.join(300)
        assert [p.exitcode for p in started] == [0] * processes
    grown = {n: max(int((tmp_path / f"{n}-{rank}").read_text()) for rank in range(n)) for n in (1, 2, 4)}
    assert grown[1] > 16 * sum(p.numel() for p in student().parameters()), grown
    assert grown[2] < 0.65 * grown[1] and grown[4] < 0.4 * grown[1], grown
