"""How much of a held-out text was trained on, against a search by hand."""

import pytest
import torch

from moe2dense.data import overlap
from moe2dense.data.blocks import Blocks
from moe2dense.data.overlap import overlap_warning, seen_share


def random_ids(n, s, seed, vocabulary=7):
    return torch.randint(0, vocabulary, (n, s), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("window, chunk", [(3, 2**20), (4, 2**20), (4, 5), (40, 2**20)])
def test_pieces_are_found_wherever_they_stand(monkeypatch, window, chunk):
    """Also across the borders of blocks and of what is looked at together; few token ids, so that some pieces recur."""
    monkeypatch.setattr(overlap, "_CHUNK", chunk)
    held_out, training = random_ids(9, 11, 0), random_ids(20, 13, 1)
    text = " ".join(map(str, training.flatten().tolist()))
    size = min(window, 11)
    pieces = [row[i : i + size] for row in held_out.tolist() for i in range(0, 11 - size + 1, size)]
    want = sum(f" {' '.join(map(str, p))} " in f" {text} " for p in pieces) / len(pieces)
    assert seen_share(Blocks(held_out), Blocks(training), window) == pytest.approx(want)
    assert (0 < want < 1) == (window < 40)


def test_shares_of_real_text(tiny, text, tokenizer):
    from moe2dense.data.load import load_blocks

    train, valid = (load_blocks(text, tokenizer, 128, split, tokens=16_384) for split in ("train", "valid"))
    assert seen_share(valid, train) == 0 and seen_share(train[:9], train) == 1
    half = Blocks(torch.cat([valid.input_ids[:6], train.input_ids[3:9]]))
    assert seen_share(half, train) == 0.5
    assert seen_share(train, valid[:0]) == 0  # nothing was trained on


def test_what_is_said():
    assert overlap_warning(0.01) == ""
    assert overlap_warning(0.4, "out-of-distribution").startswith(
        "40% of the out-of-distribution text stands word for word"
    )
