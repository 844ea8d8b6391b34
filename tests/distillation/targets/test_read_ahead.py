"""Reading ahead changes when the store is read, never what is read."""

import threading
import time

from moe2dense.distillation.batching import micro_batches, step_blocks
from moe2dense.distillation.targets.read_ahead import ReadAhead


class Slow:
    """Targets whose reading takes a while and is written down."""

    def __init__(self, seconds=0.0):
        self.seconds, self.read, self.threads = seconds, [], set()

    def __len__(self):
        return 10

    def batch(self, indices):
        time.sleep(self.seconds)
        self.read.append(tuple(indices))
        self.threads.add(threading.current_thread().name)
        return tuple(indices)


def passes(steps, rank=0, world=1, micro=2):
    return [p for s in range(steps) for p in micro_batches(step_blocks(10, 4, s, 7), rank, world, micro)]


def test_every_pass_gets_its_own_blocks_and_few_are_held():
    targets = Slow()
    ahead = ReadAhead(targets, 10, 4, 2.0, 7, 2, depth=2)
    order = passes(5)
    for i, part in enumerate(order):
        assert ahead.batch(part) == tuple(part)
        assert len(ahead._waiting) <= 2 and len(targets.read) <= i + 3
    ahead.close()
    assert sorted(targets.read) == sorted(map(tuple, order)) and len(targets.threads) == 2
    assert len(ahead) == 10


def test_a_run_may_start_in_the_middle_go_back_and_ask_for_something_else():
    targets = Slow()
    ahead = ReadAhead(targets, 10, 4, 2.0, 7, 2)
    order = passes(5)
    for part in (*order[4:7], *order[2:10], [1, 2, 3], [1], *order[:3]):
        assert ahead.batch(part) == tuple(part)
    ahead.close()


def test_each_rank_reads_its_share():
    for rank in (0, 1):
        targets = Slow()
        ahead = ReadAhead(targets, 10, 4, 2.0, 7, 2, rank, 2)
        order = passes(5, rank, 2)
        for part in order:
            ahead.batch(part)
        ahead.close()
        assert sorted(targets.read) == sorted(map(tuple, order))


def test_reading_overlaps_computing():
    ahead = ReadAhead(Slow(0.05), 10, 4, 2.0, 7, 2)
    start = time.perf_counter()
    for part in passes(5):
        ahead.batch(part)
        time.sleep(0.05)  # a step
    spent = time.perf_counter() - start
    ahead.close()
    assert spent < 0.85, "10 reads and 10 steps of 0.05 s take 1 s one after the other"


def test_faults_reach_the_reader():
    import pytest

    class Broken(Slow):
        def batch(self, indices):
            if len(self.read) == 1:
                raise ValueError("a damaged shard")
            return super().batch(indices)

    ahead = ReadAhead(Broken(), 10, 4, 2.0, 7, 2)
    order = passes(2)
    ahead.batch(order[0])
    with pytest.raises(ValueError, match="damaged"):
        ahead.batch(order[1])
    ahead.close()
