"""GGUF teachers: every type of block against gguf's and transformers' own unpacking, and whole files against transformers' logits."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers.integrations.gguf import dequant

from moe2dense.errors import UserError
from moe2dense.families.resolve import resolve_teacher
from moe2dense.teacher.load import load_teacher
from moe2dense.weights.checkpoint import Checkpoint
from moe2dense.weights.formats.gguf import FAMILIES as GGUF_FAMILIES
from moe2dense.weights.formats.gguf import gguf_weights
from tests.teacher.families import blocks, make

gguf = pytest.importorskip("gguf")
KINDS = gguf.GGMLQuantizationType
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 12345.0}, "rotary_dim": 8,
    "mlp_only_layers": [],
}  # fmt: skip
ARCHS = {model: arch for arch, family in GGUF_FAMILIES.items() for model in family.model_types}
# names of a layer's stacked experts that gguf's own table knows, by the hub's names of their parts
MERGED = {
    "block_sparse_moe.experts.w1": "layers.{}.feed_forward.experts.w1", "block_sparse_moe.experts.w2": "layers.{}.feed_forward.experts.w2",
    "block_sparse_moe.experts.w3": "layers.{}.feed_forward.experts.w3", "mlp.experts.gate_proj": "model.layers.{}.mlp.experts.gate_proj",
    "mlp.experts.up_proj": "model.layers.{}.mlp.experts.up_proj", "mlp.experts.down_proj": "model.layers.{}.mlp.experts.down_proj",
}  # fmt: skip


def merged(tensors, layers):
    """Tensors by the names that gguf's table knows, the experts of a layer as one."""
    found, stacks = {}, {}
    for name, value in tensors.items():
        parts = name.split(".")
        if "experts" in parts:
            at = parts.index("experts")
            key = MERGED[".".join([*parts[at - 1 : at + 1], parts[at + 2]])].format(parts[2]) + ".weight"
            stacks.setdefault(key, {})[int(parts[at + 1])] = value
        else:
            found[name] = value
    return found | {name: torch.stack([rows[e] for e in sorted(rows)]) for name, rows in stacks.items()}


def permuted(value, heads):
    """Rows of Q or K as llama.cpp's converter orders them for rotary pairs side by side."""
    return value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def write(folder, model_type, path, kind=KINDS.Q8_0, arch=None):
    """Write a saved model's weights as a GGUF file: matrices in `kind`, the rest in float32. Return them as they unpack."""
    arch, plain = arch or ARCHS[model_type], {}
    number = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHS[model_type])
    names = gguf.get_tensor_name_map(number, 2)
    writer = gguf.GGUFWriter(path, arch)
    stored = load_file(folder / "model.safetensors")
    for name, value in merged(stored, 2).items():
        stem, _, suffix = name.rpartition(".")
        target = names.get_name(stem) or names.get_name(name)
        if name.endswith("e_score_correction_bias"):
            target, suffix = f"blk.{name.split('.')[2]}.exp_probs_b", "bias"
        assert target, name
        heads = {"q_proj": 4, "k_proj": 2}.get(stem.rpartition(".")[2], 0) if arch == "llama" else 0
        value = permuted(value, heads) if heads else value
        value = value[0] if stem.endswith("shared_expert_gate") else value
        data = value.numpy()
        if value.dim() > 1 and "norm" not in name and ".gate." not in name:
            packed = gguf.quants.quantize(data, kind)
            writer.add_tensor(f"{target}.{suffix}", packed, raw_dtype=kind)
        else:
            writer.add_tensor(f"{target}.{suffix}", data.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name, value in stored.items():
        packed = value.dim() > 1 and ".gate." not in name and "shared_expert_gate" not in name
        rounded = gguf.quants.dequantize(gguf.quants.quantize(value.numpy(), kind), kind) if packed else value.numpy()
        plain[name] = torch.from_numpy(np.ascontiguousarray(rounded)).float()
    return plain


@pytest.mark.parametrize("kind", [KINDS.Q8_0, KINDS.F32, KINDS.F16], ids=lambda k: k.name)
@pytest.mark.parametrize("model_type", sorted(ARCHS))
def test_teacher(tmp_path, model_type, kind):
    from safetensors.torch import save_file

    reference = make(model_type, tmp_path, **SIZES)
    plain = write(tmp_path, model_type, tmp_path / "m.gguf", kind)
    reference.save_pretrained(tmp_path / "plain")
    save_file(plain, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    (tmp_path / "model.safetensors").unlink()
    model = type(reference).from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    ids = blocks(reference)
    with torch.no_grad():
        want = model(ids).logits
    for memory in ("auto", "17MB"):
        teacher = load_teacher(tmp_path / "m.gguf", memory=memory)
        assert teacher.ignored == []
        assert (teacher.run(ids).logits - want).abs().max() <= 2e-4 * want.abs().max()
    source = teacher.weights.expert_sources("model.layers.1.mlp.experts.down_proj", 2)[0]
    before = teacher.checkpoint.bytes_read
    value = teacher.weights.packed[source.key].read(teacher.checkpoint)
    assert torch.equal(value, plain[source.key])
    assert teacher.checkpoint.bytes_read - before == teacher.weights.source_bytes(source)
    assert resolve_teacher(str(tmp_path / "m.gguf")).path == tmp_path


def random_blocks(kind, rows, columns):
    """Random bytes of blocks whose half-precision factors are small numbers."""
    count, size = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng()
    data = generator.integers(0, 256, (rows, columns // count, size), dtype=np.uint8)
    halves = {
        "Q4_0": [0], "Q4_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
        "IQ4_NL": [0], "IQ4_XS": [0], "IQ2_XXS": [0], "IQ2_XS": [0], "IQ3_XXS": [0], "IQ3_S": [0], "IQ2_S": [0],
    }[kind.name]  # fmt: skip
    for place in halves:
        data[..., place : place + 2] = generator.random((rows, columns // count, 1)).astype(np.float16).view(np.uint8)
    return data.reshape(rows, -1)


@pytest.mark.parametrize(
    "name",
    [
        "Q4_0",
        "Q4_1",
        "Q8_0",
        "Q2_K",
        "Q3_K",
        "Q4_K",
        "Q5_K",
        "Q6_K",
        "IQ4_NL",
        "IQ4_XS",
        "IQ2_XXS",
        "IQ2_XS",
        "IQ3_XXS",
        "IQ3_S",
        "IQ2_S",
    ],
)
def test_every_type_of_block(tmp_path, name):
    """One expert of a stack: as gguf unpacks the whole, difference 0, and as transformers' own code does."""
    kind = KINDS[name]
    data = np.stack([random_blocks(kind, 4, 512) for _ in range(3)])
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen3moe")
    writer.add_tensor("blk.0.ffn_down_exps.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = Checkpoint(tmp_path)
    packed = gguf_weights(checkpoint.tensors, tmp_path, tmp_path / "m.gguf", "qwen3_moe", (4, 2))
    whole = gguf.quants.dequantize(data, kind)
    assert len(packed.weights) == 3
    for e in range(3):
        weight = packed.weights[f"model.layers.0.mlp.experts.{e}.down_proj.weight"]
        assert weight.shape(checkpoint) == (4, 512)
        before = checkpoint.bytes_read
        got = weight.read(checkpoint)
        assert checkpoint.bytes_read - before == weight.nbytes(checkpoint) == data[e].nbytes
        assert np.array_equal(got.numpy(), whole[e]) and np.isfinite(whole[e]).all() and np.abs(whole[e]).max() > 0
        theirs = dequant.dequantize(torch.from_numpy(data[e]), kind.value)
        assert (got - theirs.reshape(got.shape)).abs().max() <= 1e-5 * got.abs().max()
        assert torch.equal(weight.read(checkpoint, 1, 3), got[1:3])


def test_what_cannot_be_read_is_refused(tmp_path):
    make("mixtral", tmp_path, **SIZES)
    path = tmp_path / "m.gguf"
    write(tmp_path, "mixtral", path, arch="deepseek2")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="m.gguf is of the architecture deepseek2; MoE files that are read: llama, "):
        load_teacher(tmp_path)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2])
    with pytest.raises(UserError, match="m.gguf is truncated|cannot be read as GGUF"):
        load_teacher(tmp_path)
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="holds several GGUF models .m.gguf, other.gguf"):
        load_teacher(tmp_path)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/x.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="no config.json beside it; copy config.json and the tokenizer's files"):
        load_teacher(tmp_path / "alone/x.gguf")


def test_parts_of_a_file_are_read_as_one(tmp_path):
    reference = make("qwen3_moe", tmp_path, **SIZES)
    write(tmp_path, "qwen3_moe", tmp_path / "m.gguf", KINDS.F32)
    (tmp_path / "model.safetensors").unlink()
    whole = gguf.GGUFReader(tmp_path / "m.gguf")
    half = len(whole.tensors) // 2
    for number, tensors in enumerate((whole.tensors[:half], whole.tensors[half:]), 1):
        writer = gguf.GGUFWriter(tmp_path / f"p-0000{number}-of-00002.gguf", "qwen3moe")
        for tensor in tensors:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    (tmp_path / "m.gguf").unlink()
    ids = blocks(reference)
    want = reference(ids).logits
    assert (load_teacher(tmp_path).run(ids).logits - want).abs().max() <= 2e-4 * want.abs().max()
    (tmp_path / "p-00002-of-00002.gguf").unlink()
    with pytest.raises(UserError, match="holds 1 of 2 parts of p"):
        load_teacher(tmp_path)
