"""Layer-major decoding with a cache against transformers' own forward over the whole text."""

import pytest
import torch

from moe2dense.errors import UserError
from moe2dense.teacher.decode import Decoder, cache_bytes, sequences_that_fit
from moe2dense.teacher.load import load_teacher
from tests.teacher.families import FAMILIES, make

FAST = ("mixtral", "deepseek_v3", "gpt_oss")  # sliding window; latent attention; sinks


@pytest.mark.parametrize("family", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_cached_logits_are_those_of_a_whole_forward(family, tmp_path):
    model = make(family, tmp_path)
    teacher = load_teacher(tmp_path, memory="64MB", experts="streamed")
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, 101, (n,), generator=generator).tolist() for n in (3, 7, 1, 12, 11)]
    decoder = Decoder(teacher, texts)
    logits = decoder.prefill()
    for step in range(11):
        for text, row in zip(texts, logits, strict=True):
            if step % 5 == 0:
                torch.testing.assert_close(row, model(torch.tensor([text])).logits[0, -1], rtol=1e-3, atol=5e-4)
        tokens = torch.randint(3, 101, (len(texts),), generator=generator)
        texts = [[*text, int(token)] for text, token in zip(texts, tokens, strict=True)]
        if step == 6:  # a sequence leaves, another is repeated
            kept = torch.tensor([0, 2, 2, 4])
            decoder.select(kept)
            texts, tokens = [texts[i] for i in kept.tolist()], tokens[kept]
        logits = decoder.step(tokens)
    caches = [
        layer for group in decoder.groups for layer in group.cache.layers if getattr(layer, "keys", None) is not None
    ]
    held = sum((layer.keys.nbytes + layer.values.nbytes) for layer in caches)
    assert held <= len(texts) * (12 + 11) * cache_bytes(teacher.config, 4)


def test_groups_do_not_change_anything(tmp_path, monkeypatch):
    make("mixtral", tmp_path)
    texts = [[5, 6, 7], [8], [9, 10, 11, 12], [13, 14]]

    def run(chunk):
        teacher = load_teacher(tmp_path, memory="64MB")
        teacher.chunk_tokens = chunk
        decoder = Decoder(teacher, texts)
        first = decoder.prefill()
        return first, decoder.step(first.argmax(-1)), len(decoder.groups)

    a, b = run(2048), run(4)
    assert (a[2], b[2]) == (1, 2)
    torch.testing.assert_close(a[:2], b[:2], rtol=1e-5, atol=1e-5)


def test_memory_that_holds_no_sequence(tmp_path):
    make("mixtral", tmp_path)
    teacher = load_teacher(tmp_path, memory="64MB")
    assert sequences_that_fit(teacher, 100) > 1
    with pytest.raises(UserError, match="raise --memory"):
        sequences_that_fit(teacher, 10**9)
