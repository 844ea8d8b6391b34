"""On a pretended GPU long packed blocks attend through tiles, which are made there; torch's kernels are stood in for."""

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface

from moe2dense.modeling import attention
from moe2dense.modeling.attention import attention_setting
from moe2dense.modeling.block_masks import attend_by_rows
from moe2dense.teacher import skeleton
from moe2dense.teacher.load import load_teacher
from tests.device.pretend import PretendedCuda
from tests.teacher.families import make

SHORTEST = 1024  # tokens of a block from which tiles are the default on a GPU


@pytest.mark.parametrize(
    ("length", "setting", "tiles"), [(SHORTEST, "auto", True), (SHORTEST, "sdpa", False), (400, "auto", False)]
)
def test_a_streamed_teacher(length, setting, tiles, tmp_path, monkeypatch, mostly_there):
    make("mixtral", tmp_path, hidden_size=64, max_position_embeddings=SHORTEST, sliding_window=200)
    monkeypatch.setattr(skeleton, "compute_dtype", lambda device: torch.float32)
    monkeypatch.setattr(attention, "has_triton", lambda: True)
    monkeypatch.setattr(attention, "_kernel_fault", lambda *_: "")
    ids = torch.randint(3, 101, (1, length), generator=torch.Generator().manual_seed(0))
    documents = (torch.arange(length) // 300)[None]
    want = load_teacher(tmp_path, device="cpu").run(ids, document_ids=documents, logits=False).hidden_states
    masks = []

    def kernels(_module, query, key, value, mask, scaling, softcap=None, s_aux=None):
        masks.append(mask)
        assert query.is_cuda and mask.kv_indices.is_cuda
        return attend_by_rows(query, key, value, mask, scaling, softcap, s_aux).transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface()._global_mapping, "flex_attention", kernels)
    with PretendedCuda() as counts, attention_setting(setting):
        teacher = load_teacher(tmp_path, device="cuda")
        got = teacher.run(ids, document_ids=documents, logits=False).hidden_states
    assert bool(masks) == tiles and all(isinstance(mask, BlockMask) for mask in masks)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=3e-5)
    mostly_there(counts)
