"""NF4, FP4 and INT8 checkpoints of bitsandbytes: against loops, against bitsandbytes itself where it is installed, and end to end."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe2dense.errors import UserError
from moe2dense.teacher.load import load_teacher
from moe2dense.weights.formats import bitsandbytes as ours
from tests.teacher.families import blocks, make

KINDS = ["nf4", "nf4-nested", "int8"]
# QLoRA's appendix E
NF4 = torch.tensor(
    [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0, 0.0795803, 0.1609302, 0.2461123,
     0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
)  # fmt: skip


def to_4bit(weight, name, block, nested):
    """(tensors on disk, weight they stand for) of an NF4 weight, value by value."""
    flat = weight.flatten()
    blocks_ = -(-len(flat) // block)
    absmax = torch.stack([flat[i * block : (i + 1) * block].abs().max() for i in range(blocks_)])
    state = {"quant_type": "nf4", "blocksize": block, "dtype": "float32", "shape": list(weight.shape)}
    stored = {name + ".quant_map": NF4.clone()}
    if nested:
        code, offset, size = torch.linspace(-1, 1, 256), absmax.mean().item(), 4
        shifted = absmax - offset
        largest = torch.stack([part.abs().max().clamp(min=1e-6) for part in shifted.split(size)])
        index = torch.stack([(code - s / largest[i // size]).abs().argmin() for i, s in enumerate(shifted)])
        absmax = torch.stack([code[k] * largest[i // size] + offset for i, k in enumerate(index)])
        stored |= {f"{name}.absmax": index.to(torch.uint8), f"{name}.nested_absmax": largest}
        stored[name + ".nested_quant_map"] = code
        state |= {"nested_blocksize": size, "nested_dtype": "float32", "nested_offset": offset}
    else:
        stored[name + ".absmax"] = absmax
    codes = [int((NF4 - x / absmax[i // block]).abs().argmin()) for i, x in enumerate(flat)]
    values = torch.stack([NF4[c] * absmax[i // block] for i, c in enumerate(codes)])
    codes += [0] * (len(codes) % 2)
    stored[name] = torch.tensor([[a << 4 | b] for a, b in zip(codes[::2], codes[1::2], strict=True)], dtype=torch.uint8)
    stored[name + ".quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return stored, values.view(weight.shape)


def to_int8(weight, name):
    largest = weight.abs().amax(1)
    q = torch.round(weight * 127 / largest[:, None]).to(torch.int8)
    base = name.removesuffix("weight")
    stored = {name: q, base + "SCB": largest, base + "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return stored, torch.stack([q[i].float() * largest[i] / 127 for i in range(len(q))])


def quantize(folder, kind, keep=("lm_head",)):
    """Rewrite a checkpoint with every linear quantised; returns the tensors it stands for."""
    stored, plain = {}, {}
    for key, value in load_file(folder / "model.safetensors").items():
        linear = value.ndim == 2 and "embed" not in key and not key.startswith(keep)
        if not linear:
            stored[key] = plain[key] = value
            continue
        made, plain[key] = to_int8(value, key) if kind == "int8" else to_4bit(value, key, 16, kind == "nf4-nested")
        stored |= made
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": kind != "int8"}
    (folder / "config.json").write_text(json.dumps(config))
    return plain


def dequantized(reference, plain, folder):
    """transformers' model of the tensors that a quantised checkpoint stands for."""
    reference.save_pretrained(folder)
    save_file(plain, folder / "model.safetensors", {"format": "pt"})
    model = type(reference).from_pretrained(folder, dtype=torch.float32)
    model.set_experts_implementation("eager")
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_teacher(name, kind, tmp_path):
    reference = make(name, tmp_path)
    plain = quantize(tmp_path, kind)
    model, ids = dequantized(reference, plain, tmp_path / "plain"), blocks(reference)
    want = model(ids).logits
    for memory in ("auto", "17MB"):
        teacher = load_teacher(tmp_path, memory=memory)
        teacher.resident, teacher._layers = memory == "auto", {}
        assert teacher.ignored == []
        assert (teacher.run(ids).logits - want).abs().max() <= 1e-4
    assert (want - reference(ids).logits).abs().max() > 1e-3  # it did change the model
    for key, value in model.state_dict().items():
        assert torch.allclose(teacher.tensor(key), value, atol=1e-6), key


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_equals_bitsandbytes(kind, nested, tmp_path):
    import bitsandbytes.functional as theirs  # pyright: ignore[reportMissingImports]

    weight = torch.randn(33, 640)
    packed, state = theirs.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
    stored = {"a.weight": packed, **{f"a.weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
    save_file(stored, tmp_path / "model.safetensors")
    from moe2dense.weights.checkpoint import Checkpoint

    got = ours.read_weight(Checkpoint(tmp_path), "a.weight")
    assert torch.allclose(got, theirs.dequantize_4bit(packed, state), atol=1e-6) and got.shape == (33, 640)


def test_what_is_missing_is_named(tmp_path):
    make("mixtral", tmp_path)
    quantize(tmp_path, "nf4")
    path, name = tmp_path / "model.safetensors", "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    tensors = load_file(path)
    state = f"{name}.quant_state.bitsandbytes__nf4"
    save_file({k: v for k, v in tensors.items() if k != state}, path)
    with pytest.raises(UserError, match=rf"model.safetensors: tensor '{name}' has no readable quant_state"):
        load_teacher(tmp_path)
    save_file({k: v for k, v in tensors.items() if k != name + ".absmax"}, path)
    with pytest.raises(UserError, match=rf"tensor '{name}' has dtype uint8 and no tensor of scales beside it"):
        load_teacher(tmp_path)
    wrong = json.loads(bytes(tensors[state].tolist())) | {"shape": [3, 3]}
    tensors[state] = torch.tensor(list(json.dumps(wrong).encode()), dtype=torch.uint8)
    save_file(tensors, path)
    with pytest.raises(UserError, match=rf"tensor '{name}' has shape \[3, 3\], the config says \[13, 24\]"):
        load_teacher(tmp_path)
    del tensors[name + ".quant_map"]
    save_file(tensors | {state: load_file_state(name)}, path)
    with pytest.raises(UserError, match=rf"tensor '{name}.quant_map' is missing"):
        load_teacher(tmp_path)
    scales = {name + ".quant_map": torch.ones(16), name + ".absmax": torch.ones(19)}
    save_file(tensors | {state: load_file_state(name)} | scales, path)
    with pytest.raises(UserError, match=rf"tensor '{name}.absmax' has 19 values, unpacking '{name}' takes 20"):
        load_teacher(tmp_path)


def load_file_state(name):
    state = {"quant_type": "nf4", "blocksize": 16, "shape": [13, 24]}
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def test_a_method_that_is_not_read_is_refused(tmp_path):
    make("mixtral", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for found, named in (({"quant_method": "aqlm"}, "aqlm"), ({"bits": 4}, "an unnamed method")):
        (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": found}))
        with pytest.raises(UserError, match=f"is quantised with {named}, which cannot be read; give a checkpoint"):
            load_teacher(tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_resident_on_cuda(kind, tmp_path):
    reference = make("mixtral", tmp_path, hidden_size=32, intermediate_size=16)
    model, ids = dequantized(reference, quantize(tmp_path, kind), tmp_path / "plain"), blocks(reference)
    teacher = load_teacher(tmp_path, device="cuda")
    assert teacher.resident and teacher.backend == "grouped_mm"
    got, want = teacher.run(ids).logits, model(ids).logits
    assert got is not None and (got.float().cpu().argmax(-1) == want.argmax(-1)).float().mean() > 0.8
