"""A tokenizer that is a SentencePiece model alone, without tokenizer.json."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from moe2dense.data.load import load_blocks

ROOT = Path(__file__).parents[2]
sentencepiece = pytest.importorskip("sentencepiece")
pytest.importorskip("google.protobuf")
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with tokenizer.model, as Mixtral's first checkpoints have it."""
    place = tmp_path_factory.mktemp("t")
    texts = [json.loads(line)["text"] for line in (ROOT / "examples/text/train.jsonl").read_text().splitlines()[:40]]
    (place / "text.txt").write_text("\n".join(texts))
    sentencepiece.SentencePieceTrainer.train(
        input=str(place / "text.txt"), model_prefix=str(place / "tokenizer"), vocab_size=400, model_type="bpe", byte_fallback=True,
        character_coverage=0.99, minloglevel=2,
    )  # fmt: skip
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (place / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": True}))
    (place / "text.txt").unlink()
    return place


def test_plain_text_is_tokenised_as_sentencepiece_does(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    own = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    text = "The house stood by the river, and nobody had painted its door since spring."
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": text}) + "\n")
    ids = own.encode(text)
    blocks = load_blocks(tmp_path, tokenizer, len(ids))
    assert blocks.input_ids[0].tolist() == [own.bos_id(), *ids][: len(ids)]


def test_answers_of_chats_are_marked(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    talk = [{"role": "user", "content": "what is by the river"}, {"role": "assistant", "content": "a house of stone"}]
    (tmp_path / "train.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 4)
    blocks = load_blocks(tmp_path, tokenizer, 128)
    assert blocks.labels_mask is not None
    learnt = tokenizer.decode(blocks.input_ids[0][blocks.labels_mask[0]])
    assert "a house of stone" in learnt and "river" not in learnt
