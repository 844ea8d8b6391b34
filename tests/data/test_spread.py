"""Held-out blocks come from as many passages as there are, and every token knows its passage and its work."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from moe2dense.data.blocks import Blocks, join_blocks
from moe2dense.data.load import load_blocks
from moe2dense.data.spread import level_shares, spread_over_passages

TEACHER = Path(__file__).parents[2] / "examples/tiny-mixtral"
WORDS = ["sea", "mill", "stone", "queen", "field", "storm", "bridge", "lamp", "harbour", "winter", "letter"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TEACHER)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def written(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_every_token_knows_its_passage_and_its_work(tmp_path, tokenizer):
    records = [{"text": f"{w} " * 30, "source": "a book" if i % 2 else ""} for i, w in enumerate(WORDS)]
    blocks = load_blocks(written(tmp_path / "x.jsonl", records), tokenizer, 17, "all")
    passages, works = blocks.passages.flatten(), blocks.works.flatten()
    ends = blocks.input_ids.flatten() == tokenizer.eos_token_id
    assert torch.equal(passages, torch.cat([torch.zeros(1), ends[:-1]]).cumsum(0).long())
    texts = [tokenizer.decode(blocks.input_ids.flatten()[passages == p]) for p in passages.unique().tolist()]
    in_book = [any(WORDS[i] in text for i in range(1, len(WORDS), 2)) for text in texts]
    book = {int(works[passages == p][0]) for p, inside in enumerate(in_book) if inside}
    assert len(book) == 1 and works.unique().numel() == 1 + in_book.count(False)


def test_held_out_blocks_come_from_every_passage(tmp_path, tokenizer):
    records = [{"text": f"passage {i}: " + f"{w} " * (40 if i else 900)} for i, w in enumerate(WORDS)]
    path = written(tmp_path / "x.jsonl", records)
    first = load_blocks(path, tokenizer, 16, "all", tokens=16 * 12, seed=1)
    spread = load_blocks(path, tokenizer, 16, "all", tokens=16 * 12, seed=1, spread=True)
    assert len(first) == len(spread) == 12
    assert first.passages.unique().numel() < 8 and spread.passages.mode(1).values.unique().numel() >= 10
    everything = load_blocks(path, tokenizer, 16, "all", seed=1)
    assert set(spread.keys()) <= set(everything.keys())  # whole blocks of the packed text, in its order


@pytest.mark.parametrize("sizes,count,shares", [([5, 5, 5], 6, [2, 2, 2]), ([1, 9, 9], 7, [1, 3, 3]), ([4, 4], 8, [4, 4]), ([3] * 7, 3, [1, 0, 1, 0, 1, 0, 0])])  # fmt: skip
def test_shares_are_level(sizes, count, shares):
    assert level_shares(sizes, count) == shares


def test_random_shares_are_as_level_as_they_can_be():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        sizes = torch.randint(
            1, 30, (int(torch.randint(1, 20, (1,), generator=generator)),), generator=generator
        ).tolist()
        count = int(torch.randint(1, sum(sizes) + 1, (1,), generator=generator))
        shares = level_shares(sizes, count)
        assert sum(shares) == count and all(0 <= k <= n for k, n in zip(shares, sizes, strict=True))
        unfilled = [k for k, n in zip(shares, sizes, strict=True) if k < n]
        assert not unfilled or max(shares) <= min(unfilled) + 1


def test_joined_texts_keep_their_passages_apart():
    ids = torch.zeros(2, 3, dtype=torch.int64)
    a = Blocks(ids, passages=torch.tensor([[0, 0, 1], [1, 2, 2]]))
    b = Blocks(ids, passages=torch.tensor([[5, 5, 5], [6, 6, 6]]), works=torch.zeros(2, 3, dtype=torch.int64))
    joined = join_blocks([a, b])
    assert joined.passages.tolist() == [[0, 0, 1], [1, 2, 2], [3, 3, 3], [4, 4, 4]]
    assert joined.works.tolist() == [[0, 0, 1], [1, 2, 2], [3, 3, 3], [3, 3, 3]]
    assert joined[[2, 0]].passages.tolist() == [[3, 3, 3], [0, 0, 1]]
    assert join_blocks([a, Blocks(ids)]).passages is None
    assert len(spread_over_passages(Blocks(ids.repeat(5, 1)), 4)) == 4
