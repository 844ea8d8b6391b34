"""Two processes write the dataset of one, also when one of them is killed and the rest goes on alone."""

import dataclasses
import json
import multiprocessing
import os

import pytest
import torch

import moe2dense.generation.dataset as dataset
from moe2dense.generation.dataset import write_text
from moe2dense.teacher.load import load_teacher
from tests.distillation.test_processes import as_rank, free_port
from tests.generation.test_dataset import SMALL, records

pytestmark = pytest.mark.slow
SETTINGS = dataclasses.replace(SMALL, duplicates=0.9, learn_prompt=True)
TOKENS = 900


def worker(rank, world, port, tiny, text, folder, dies, queue):
    """Write, and say which texts this process wrote; rank dies[0] is gone when it is asked for texts the dies[1]-th time."""
    as_rank(rank, world, port)
    torch.distributed.init_process_group("gloo")
    wrote, real = [], dataset.generate

    def noted(*args, **options):
        if rank == dies[0] and len(wrote) == dies[1]:
            os._exit(9)
        results = real(*args, **options)
        wrote.append((options["first"], len(args[1])))
        return results

    dataset.generate = noted
    error = ""
    try:
        write_text(load_teacher(tiny, memory="300MB"), folder, text, SETTINGS, TOKENS, block=64)
    except RuntimeError as lost:  # the other process is gone
        error = type(lost).__name__
    queue.put((rank, wrote, error))
    queue.close()
    queue.join_thread()
    os._exit(0)  # no goodbye to a process that is gone


def launch(tiny, text, folder, dies=(-1, 0), answers=2):
    context, port = multiprocessing.get_context("forkserver"), free_port()
    queue = context.Queue()
    processes = [context.Process(target=worker, args=(r, 2, port, tiny, text, folder, dies, queue)) for r in range(2)]
    for p in processes:
        p.start()
    results = {rank: (wrote, error) for rank, wrote, error in (queue.get(timeout=100) for _ in range(answers))}
    for p in processes:
        p.join(60)
    return results


@pytest.fixture(scope="module")
def one(tiny, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "w"
    return write_text(load_teacher(tiny, memory="300MB"), folder, text, SETTINGS, TOKENS, block=64)


def equal(folder, one):
    written, expected = records(folder), records(one)
    assert [r.pop("nll") for r in written] == pytest.approx([r.pop("nll") for r in expected], abs=2e-4)
    assert written == expected and len(written) > 10
    shards = [json.loads((f / "writing.json").read_text())["shards"] for f in (folder, one)]
    assert len(shards[0]) > 1
    keys = ("file", "from", "to", "texts", "tokens", "dropped")
    assert [[s[k] for k in keys] for s in shards[0]] == [[s[k] for k in keys] for s in shards[1]]
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in one.iterdir())


def test_two_processes_write_the_text_of_one(tiny, text, one, tmp_path):
    results = launch(tiny, text, tmp_path / "w")
    equal(tmp_path / "w", one)
    first, second = (results[r][0] for r in (0, 1))
    assert first[0] == (0, 8) and second[0] == (8, 8) and len(first) > 1


@pytest.mark.parametrize("dead", [0, 1])
@pytest.mark.parametrize("together", [True, False])
def test_a_killed_process_loses_its_own_share_at_most(tiny, text, one, tmp_path, dead, together):
    """Killed in the second round, when the other's share is whole; two processes, or one alone, go on."""
    folder = tmp_path / "w"
    results = launch(tiny, text, folder, (dead, 1), answers=1)
    alive = 1 - dead
    assert results[alive][1] and len(results[alive][0]) == 2
    assert len(json.loads((folder / "writing.json").read_text())["shards"]) == 1
    assert len(list(folder.glob("parts/*.json"))) == 1
    if together:
        again = launch(tiny, text, folder)
        assert (
            again[alive][0] == [] or again[alive][0][0][0] > results[alive][0][1][0]
        )  # its share is not written again
        assert again[dead][0]
    else:
        write_text(load_teacher(tiny, memory="300MB"), folder, text, SETTINGS, TOKENS, block=64)
    equal(folder, one)


def test_an_error_of_the_first_is_everybodys(tiny, text, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "other.txt").write_text("something else")
    context, port = multiprocessing.get_context("forkserver"), free_port()
    queue = context.Queue()
    processes = [context.Process(target=refused, args=(r, port, tiny, text, tmp_path / "w", queue)) for r in range(2)]
    for p in processes:
        p.start()
    assert all("holds no writing.json" in queue.get(timeout=100) for _ in range(2))
    for p in processes:
        p.join(60)


def refused(rank, port, tiny, text, folder, queue):
    """As `moe2dense generate` under torchrun."""
    import io
    from contextlib import redirect_stderr

    from moe2dense.__main__ import main

    as_rank(rank, 2, port)
    with redirect_stderr(io.StringIO()) as said:
        assert main(["generate", str(tiny), "--data", str(text), "--out", str(folder), "--tokens", "200"]) == 2
    queue.put(" ".join(said.getvalue().split()))
