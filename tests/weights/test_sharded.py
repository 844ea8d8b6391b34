"""Parts of checkpoints are written as files of limited size."""

import torch

from moe2dense.weights import sharded


def test_a_file_holds_no_more_than_its_limit_or_one_tensor(monkeypatch):
    monkeypatch.setattr(sharded, "FILE_BYTES", 100)
    sizes = {"a": 10, "b": 15, "c": 1, "large": 40, "d": 5, "e": 20, "f": 1}  # of four bytes each
    numbers = sharded.file_numbers({name: torch.zeros(size) for name, size in sizes.items()})
    assert numbers == {"a": 1, "b": 1, "c": 2, "large": 3, "d": 4, "e": 4, "f": 5}
    assert sharded.file_numbers({}) == {}
