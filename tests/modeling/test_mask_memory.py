"""The bytes of masks as they are counted, against what a pass makes and keeps."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe2dense.data.blocks import Blocks
from moe2dense.modeling.attention import attention_setting, planned_mask_use
from moe2dense.modeling.block_masks import make_block_mask, mask_nbytes
from moe2dense.modeling.forward import final_hidden, model_inputs
from moe2dense.modeling.mask_memory import MaskUse, dense_bytes, mask_bytes, masked_layers, tile_bytes

SIZES = {
    "vocab_size": 11, "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
BLOCKS, LENGTH = 2, 300


def config_of(family="llama", **changes):
    return AutoConfig.for_model(family, **SIZES | changes)


def kept_pairs(config, setting, documents):
    """Bytes of the tensors with a number for each pair of tokens that a pass keeps for its backward pass."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    storages = {}

    def note(tensor):
        if tensor.shape[-2:] == (LENGTH, LENGTH):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.ones(BLOCKS, LENGTH, dtype=torch.int64)
    numbers = (torch.arange(LENGTH) // 70).expand(BLOCKS, -1) if documents else None
    with attention_setting(setting), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        hidden = final_hidden(model, model_inputs(Blocks(ids, document_ids=numbers)))
    assert hidden.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize(
    ("family", "changes", "documents"),
    [
        ("llama", {}, True),
        ("llama", {}, False),
        ("mistral", {"sliding_window": 50}, False),
        ("gemma3_text", {"sliding_window": 50, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}, False),
    ],
)  # fmt: skip
def test_what_a_pass_keeps_of_dense_masks_is_counted(family, changes, documents):
    config = config_of(family, **changes)
    layers = masked_layers(config, LENGTH, documents)
    counted = mask_bytes(config, MaskUse(documents), BLOCKS, LENGTH, 4, again=False)
    kept = kept_pairs(config, "sdpa", documents)
    assert kept == dense_bytes(BLOCKS, LENGTH, 0, len(layers), 4)
    assert counted - kept == dense_bytes(BLOCKS, LENGTH, len(set(layers)))  # the masks themselves
    assert kept_pairs(config, "flex", documents) == 0


def test_tiles_are_counted_as_they_are_made():
    for blocks, length in ((2, 300), (1, 128), (3, 1025)):
        mask = make_block_mask(lambda b, h, q, k: q >= k, blocks, length, torch.device("cpu"))
        assert mask_nbytes(mask) == tile_bytes(blocks, length)
    config = config_of()
    assert mask_bytes(config, MaskUse(True, tiles=True), 2, 300, 4, again=False) == tile_bytes(2, 300)
    assert mask_bytes(config, MaskUse(), 2, 300, 4, again=False) == 0
    assert tile_bytes(1, 32768) < 1.1e6 and dense_bytes(1, 32768) > 1e9


def test_layers_that_need_a_mask():
    window = config_of("mistral", sliding_window=50)
    assert (
        masked_layers(window, 49, documents=False) == []
        and masked_layers(window, 50, documents=False) == ["window"] * 3
    )
    hybrid = config_of("qwen3_next", num_hidden_layers=4)
    assert masked_layers(hybrid, 64, documents=True) == ["full"]
    once = mask_bytes(config_of(), MaskUse(True), 1, 64, 2, again=True)
    assert once == 64**2 * (1 + 2)  # one layer's copy at a time


def test_how_a_plan_expects_masks_to_be_made():
    llama = AutoModelForCausalLM.from_config(config_of())
    for asked, on_gpu, length, tiles in (
        ("auto", True, 1024, True), ("auto", True, 1023, False), ("auto", False, 4096, False), ("sdpa", True, 4096, False),
        ("flex", False, 64, True),
    ):  # fmt: skip
        assert planned_mask_use(llama, asked, on_gpu, length, documents=True) == MaskUse(True, tiles)
    dropping = AutoModelForCausalLM.from_config(config_of(attention_dropout=0.1))
    assert not planned_mask_use(dropping, "auto", True, 4096, documents=True).tiles
