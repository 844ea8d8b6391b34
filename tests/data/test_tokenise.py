"""A text that is too large for memory is tokenised once, into files, and gives the blocks of one that is not."""

import dataclasses
import json
import os
from collections import Counter

import numpy as np
import pytest
import torch

from moe2dense.data import blocks as blocks_module
from moe2dense.data import tokenise
from moe2dense.data.blocks import Blocks, join_blocks
from moe2dense.data.counts import TextCounts
from moe2dense.data.documents import Document
from moe2dense.data.load import load_blocks
from moe2dense.data.options import TextOptions
from moe2dense.data.pack import packed
from moe2dense.data.token_files import TokenFiles
from moe2dense.data.token_text import Layout, TokenBuilder, _commonest
from moe2dense.distillation.batches import Batches
from moe2dense.errors import UserError
from tests.data.test_load import jsonl, rows, tokenizer  # noqa: F401

COLUMNS = (
    "input_ids",
    "attention_mask",
    "document_ids",
    "labels_mask",
    "passages",
    "works",
    "prefix_mask",
    "calls_mask",
)
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.fixture
def mapped(tmp_path, monkeypatch):
    """Whatever is read is mapped, in a cache of its own; savings after every batch, batches of 7 passages."""
    monkeypatch.setenv("MOE2DENSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenise, "_BATCH", 7)
    monkeypatch.setattr(tokenise, "_SAVE_EVERY", 1)
    monkeypatch.setattr(blocks_module, "_IN_MEMORY", 64)
    monkeypatch.setattr(blocks_module, "_CHUNK", 48)

    def switch(on):
        monkeypatch.setattr(tokenise, "LARGE", 0 if on else 2**24)
        monkeypatch.setattr(tokenise, "_LARGE_BYTES", 0 if on else 2**26)

    return switch


def same(large: Blocks, small: Blocks) -> None:
    """Two texts are equal in every column, taken row by row, in slices and in any order; so are their keys and labels."""
    assert large.folder is not None and small.folder is None
    assert large.domains == small.domains and large.keys() == small.keys() and large.tokens == small.tokens
    order = torch.randperm(len(small), generator=torch.Generator().manual_seed(1))
    for index in ([0], order[:3], slice(1, 4), slice(len(small) - 2, None), order, slice(0, len(small))):
        part, expected = large[index], small[index]
        assert part.domains == expected.domains
        for name in COLUMNS:
            ours, theirs = getattr(part, name), getattr(expected, name)
            assert (ours is None) == (theirs is None), name
            if ours is not None:
                if name == "document_ids":  # only where they change counts
                    ours, theirs = ours - ours[:, :1], theirs - theirs[:, :1]
                assert torch.equal(ours.long(), theirs.long()), (name, index)
                assert part.folder is not None or getattr(part, name).dtype == getattr(expected, name).dtype, name
        assert torch.equal(part.labels(), expected.labels()) and torch.equal(part.loss_mask(), expected.loss_mask())
    ours, theirs = Batches(large, None), Batches(small, None)
    assert ours.denominators(range(len(small))) == theirs.denominators(range(len(small)))


def varied(n):
    """Records of three kinds, some with a work, some that cannot be used."""
    chat = [{"role": "user", "content": "What is the sea?"}, {"role": "assistant", "content": "It is wide."}]
    kinds = [{}, {"source": "one"}, {"source": "two"}, {}]
    records = [r | kinds[i % 4] for i, r in enumerate(rows(n))]
    records[5] = {"text": None}
    records[9] = {"messages": chat, "domain": "chat"}
    return records


def chats(n):
    """Conversations of many lengths."""
    return [
        {
            "messages": [
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": "Because " + "it is " * (i % 5)},
            ]
        }
        for i in range(n)
    ]


@pytest.mark.parametrize("kind", ["plain", "varied", "bos", "masks", "whole"])
@pytest.mark.parametrize("tokens", [None, 600])
def test_a_mapped_text_has_the_blocks_of_one_in_memory(tmp_path, tokenizer, mapped, kind, tokens):  # noqa: F811
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    records = varied(60) if kind == "varied" else chats(60) if kind == "whole" else rows(60)
    path = jsonl(tmp_path / "train.jsonl", records)
    options = TextOptions(
        bos="on" if kind == "bos" else "off", chat_template=str(template), fit="whole" if kind == "whole" else "cut"
    )
    counts = [TextCounts(), TextCounts()]
    results = []
    for on, count in zip((False, True), counts, strict=True):
        mapped(on)
        masks = "on" if kind == "masks" else "auto"
        results.append(load_blocks(path, tokenizer, 16, "all", tokens, 3, masks, options=options, counts=count))
    small, large = results
    same(large, small)
    if tokens is None:
        assert counts[0].to_dict() == counts[1].to_dict()


def test_a_mixture_is_mapped_in_its_shuffled_order(tmp_path, tokenizer, mapped):  # noqa: F811
    a = jsonl(tmp_path / "a.jsonl", rows(60))
    b = jsonl(tmp_path / "b.jsonl", [r | {"source": "s"} for r in rows(60, 100)])
    results = []
    for on in (False, True):
        mapped(on)
        results.append(load_blocks({str(a): 0.7, str(b): 0.3}, tokenizer, 16, tokens=320, seed=2))
    same(results[1], results[0])
    other = Blocks(torch.arange(32).view(2, 16), passages=torch.zeros(2, 16, dtype=torch.int64))
    same(join_blocks([results[1], other]), join_blocks([results[0], other]))


class Killed(Exception):
    pass


def test_it_goes_on_where_it_was_stopped(tmp_path, tokenizer, mapped, monkeypatch):  # noqa: F811
    path = jsonl(tmp_path / "train.jsonl", varied(60))
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    options = TextOptions(chat_template=str(template))
    mapped(False)
    small = load_blocks(path, tokenizer, 16, "all", options=options)
    mapped(True)
    tokenised, append, calls, stop_at = [], tokenise.TokenFiles.append, [], [0]
    of = tokenise.Documents.of

    def counted(self, passages):
        tokenised.extend(where for where, _ in passages)
        return of(self, passages)

    def stopping(self, columns, state):
        """Stop in the second and the third call, after some of the bytes are written and before it is said that they are."""
        calls.append(1)
        if len(calls) == stop_at[0]:
            with open(self.folder / "ids.bin", "ab") as file:
                file.write(columns["ids"][:40])
            raise Killed
        append(self, columns, state)

    monkeypatch.setattr(tokenise.Documents, "of", counted)
    monkeypatch.setattr(tokenise.TokenFiles, "append", stopping)
    for number in (2, 3):
        stop_at[0], calls[:] = number, []
        with pytest.raises(Killed):
            load_blocks(path, tokenizer, 16, "all", options=options)
    stop_at[0] = 0
    same(load_blocks(path, tokenizer, 16, "all", options=options), small)
    assert len(tokenised) < 2 * 60, "it began anew"
    before = len(tokenised)
    same(load_blocks(path, tokenizer, 16, "all", options=options), small)
    assert len(tokenised) == before, "what is whole was tokenised again"


def test_more_tokens_go_on_from_fewer(tmp_path, tokenizer, mapped):  # noqa: F811
    path = jsonl(tmp_path / "train.jsonl", varied(40)[10:] + rows(30, 50))
    for tokens in (160, 480, 320):
        mapped(False)
        small = load_blocks(path, tokenizer, 16, "all", tokens)
        mapped(True)
        same(load_blocks(path, tokenizer, 16, "all", tokens), small)
    assert len(list((tmp_path / "cache/text").glob("*/text.json"))) == 1


def test_a_text_is_told_by_its_bytes_and_by_how_it_is_read(tmp_path, tokenizer, mapped):  # noqa: F811
    path = jsonl(tmp_path / "train.jsonl", rows(40))
    mapped(True)
    first = load_blocks(path, tokenizer, 16, "all")
    record = path.stat().st_mtime_ns
    changed = rows(40)
    changed[3]["text"] = changed[3]["text"].replace("sea", "ice")
    jsonl(path, changed)
    os.utime(path, ns=(record, record))
    second = load_blocks(path, tokenizer, 16, "all")
    assert sum(a != b for a, b in zip(first.keys(), second.keys(), strict=False)) > 0
    assert first.folder != second.folder != load_blocks(path, tokenizer, 16, "all", seed=1).folder


def test_damaged_files_are_said(tmp_path, tokenizer, mapped):  # noqa: F811
    path = jsonl(tmp_path / "train.jsonl", rows(40))
    mapped(True)
    folder = load_blocks(path, tokenizer, 16, "all").folder
    assert folder is not None
    (folder / "owners.bin").write_bytes(b"\0" * 8)
    with pytest.raises(UserError, match=r"owners.bin is shorter than it was written; remove"):
        load_blocks(path, tokenizer, 16, "all")
    state = json.loads((folder / "text.json").read_text())
    (folder / "text.json").write_text(json.dumps(state | {"numbering": {}}))
    with pytest.raises(UserError, match="is damaged or was changed by hand"):
        load_blocks(path, tokenizer, 16, "all")


def test_a_files_own_tensor_is_not_written_through(tmp_path, tokenizer, mapped):  # noqa: F811
    """Whoever changes a mapped text in place changes no file."""
    path = jsonl(tmp_path / "train.jsonl", rows(40))
    mapped(True)
    first = load_blocks(path, tokenizer, 16, "all")
    keys = first.keys()
    first.input_ids[0, 0] = 4000
    assert first.keys() != keys and load_blocks(path, tokenizer, 16, "all").keys() == keys


def test_a_small_text_is_in_memory(tmp_path, tokenizer):  # noqa: F811
    path = jsonl(tmp_path / "train.jsonl", rows(40))
    blocks = load_blocks(path, tokenizer, 16, "all")
    assert blocks.folder is None and blocks.input_ids.dtype == torch.int64
    assert not tokenise.is_large(path, "all", None) and not tokenise.is_large(path, "all", 2**24)
    assert tokenise.is_large(path, "all", 2**24 + 1) and tokenise.is_large("owner/name", "train", None)


def test_the_domain_of_a_block_is_that_of_most_of_its_tokens(tokenizer):  # noqa: F811
    generator = np.random.default_rng(0)
    for _ in range(50):
        lengths = generator.integers(1, 6, size=8)
        owners, domain_of = np.repeat(np.arange(8), lengths), generator.integers(0, 3, size=8)
        expected = Counter(domain_of[owners].tolist()).most_common(1)[0][0]
        assert _commonest(owners, domain_of) == expected


def test_tool_calls_are_marked_and_the_closing_token_with_them(tmp_path):
    documents = [
        Document([5, 6, 7], [False, True, True], calls=[False, False, True]),
        Document([8, 9], None),
        Document([10, 2], [True, True], calls=None),
    ]
    small = packed(documents, Layout(4), None, 2)
    assert isinstance(small, Blocks) and small.calls_mask is not None
    assert small.input_ids.tolist() == [[5, 6, 7, 2], [8, 9, 2, 10]]
    assert small.calls_mask.tolist() == [[False, False, True, True], [False] * 4]
    assert packed(documents[1:], Layout(4), None, 2).calls_mask is None
    builder, files = TokenBuilder(2, Layout(4)), TokenFiles(tmp_path / "text", "a fingerprint")
    state = files.begin()
    for document in documents:
        builder.append(document)
    state.numbering = builder.numbering
    files.append(builder.take(), state)
    large = files.text(files.begin()).blocks(Layout(4), None)
    assert isinstance(large, Blocks) and large.calls_mask is not None
    assert large[[1, 0]].calls_mask.tolist() == small.calls_mask[[1, 0]].tolist()
    joined = join_blocks([large, Blocks(torch.ones(1, 4, dtype=torch.int64))])
    assert joined[[2, 0]].calls_mask.tolist() == [[False] * 4, [False, False, True, True]]


def test_counts_come_back_from_json():
    counts = TextCounts()
    counts.used = 3
    counts.skip("a.jsonl line 7", "it is empty")
    counts.notes["a note"] = 1
    again = TextCounts.from_dict(json.loads(json.dumps(counts.to_dict())))
    assert dataclasses.asdict(again) == dataclasses.asdict(counts)
