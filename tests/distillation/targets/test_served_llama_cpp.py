"""Targets from a real llama.cpp server (xllamacpp), which is asked once a position."""

import pytest
import torch

from moe2dense.data.load import load_blocks
from moe2dense.distillation.targets.served.server import connect
from moe2dense.distillation.targets.served.write import write_served_targets
from moe2dense.distillation.targets.store import open_targets, read_manifest
from moe2dense.exporting.api import export
from tests.exporting.conftest import tiny as small
from tests.exporting.llama_cpp import LlamaCpp


@pytest.mark.slow
def test_llama_cpp_gives_the_models_own_top_k(tmp_path, text, tokenizer, tiny):
    pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    model = small("mistral", seed=6, vocab_size=4096, hidden_size=64, intermediate_size=96, max_position_embeddings=256)
    export(model, tmp_path / "g", tokenizer=str(tiny), format="gguf", dtype="float32")
    llama = LlamaCpp(tmp_path / "g/model-f32.gguf")
    blocks = load_blocks(text, tokenizer, 24, tokens=3 * 24)
    server = connect(llama.server.listening_address, 9, parallel=1)
    assert server.protocol.name == "llama.cpp"
    write_served_targets(server, blocks, tokenizer, tmp_path / "store")
    rows = open_targets(tmp_path / "store", blocks, tokenizer=tokenizer).batch(range(3))
    with torch.no_grad():
        top = model(blocks.input_ids).logits.log_softmax(-1).flatten(0, 1).topk(9)
    assert (rows.ids == top.indices).float().mean() > 0.99
    torch.testing.assert_close(rows.log_p, top.values, rtol=5e-3, atol=5e-3)
    assert read_manifest(tmp_path / "store")["source"]["kind"] == "llama.cpp"
