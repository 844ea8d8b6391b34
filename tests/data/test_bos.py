"""BOS: documents begin as the tokenizer begins a prompt, and nothing learns to predict it."""

from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from moe2dense.data.load import load_blocks
from moe2dense.data.options import TextOptions, document_prefix
from moe2dense.data.vocabulary import check_vocabulary
from moe2dense.errors import UserError
from moe2dense.evaluation.token_metrics import scored_positions
from moe2dense.generation.prompts import read_prompts

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "examples/tiny-mixtral")


def prefixed_by(tokenizer, *tokens):
    ids = [(t, tokenizer.convert_tokens_to_ids(t)) for t in tokens]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join([*tokens, "$A"]), special_tokens=ids
    )
    return tokenizer


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.txt").write_text("\n".join(f"document {i} of a few words" for i in range(40)))
    return tmp_path


@pytest.mark.parametrize("masks", ["on", "off"])
def test_every_document_is_what_the_tokenizer_makes_of_a_prompt(folder, tokenizer, masks):
    blocks = load_blocks(folder, tokenizer, 25, document_masks=masks)
    stream = blocks.input_ids.flatten().tolist()
    documents = [tuple(tokenizer(line)["input_ids"]) for line in (folder / "train.txt").read_text().splitlines()]
    ends = [i for i, t in enumerate(stream) if t == tokenizer.eos_token_id]
    starts = [0, *(i + 1 for i in ends[:-1])]
    cut = [tuple(stream[a:b]) for a, b in zip(starts, ends, strict=True)]
    assert len(cut) > 30 and set(cut) <= set(documents) and len(set(cut)) == len(cut)


def test_nothing_predicts_bos(folder, tokenizer):
    blocks = load_blocks(folder, tokenizer, 25)
    bos = blocks.input_ids == tokenizer.bos_token_id
    labels = blocks.labels()
    assert bool(bos.any()) and not bool((labels == tokenizer.bos_token_id).any())
    expected = torch.ones_like(bos)
    expected[:, :-1] = ~bos[:, 1:]
    assert torch.equal(blocks.loss_mask(), expected)
    assert torch.equal(scored_positions(blocks), ~bos[:, 1:])
    part = blocks[[2, 0]]
    assert torch.equal(part.labels(), labels[[2, 0]])


def test_auto_on_off(folder, tokenizer):
    bos = tokenizer.bos_token_id
    counts = {
        how: int((load_blocks(folder, tokenizer, 25, options=TextOptions(bos=how)).input_ids == bos).sum())
        for how in ("auto", "on", "off")
    }
    assert counts["auto"] == counts["on"] > 30 and counts["off"] == 0
    bare = prefixed_by(tokenizer)
    assert document_prefix(bare) == [] and document_prefix(bare, "on") == [bos]
    assert document_prefix(prefixed_by(tokenizer, "<s>", "</s>")) == [1, 2]
    bare = prefixed_by(tokenizer)
    bare.bos_token = None
    with pytest.raises(UserError, match="no BOS token"):
        document_prefix(bare, "on")
    with pytest.raises(UserError, match="data.bos must be one of"):
        TextOptions(bos="yes")


def test_prompts_begin_with_it(folder, tokenizer):
    for prompt in list(read_prompts(folder, tokenizer, "train", 0, 5, 5))[:4]:
        assert prompt.ids == tokenizer(prompt.text)["input_ids"]


def test_a_tokenizer_larger_than_the_embedding_is_refused(tokenizer):
    check_vocabulary(tokenizer, 4096, "teacher: its tokenizer")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    with pytest.raises(UserError, match=r"4097 tokens, the model's vocabulary 4096: '<pad>' .id 4096.*resize_token"):
        check_vocabulary(tokenizer, 4096, "teacher: its tokenizer")
