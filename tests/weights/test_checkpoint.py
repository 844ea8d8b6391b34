"""Reading byte ranges, and every way a checkpoint can be damaged: one sentence naming file and tensor, before anything runs."""

import gc
import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe2dense.errors import UserError
from moe2dense.teacher.load import load_teacher
from moe2dense.weights import checkpoint as module
from moe2dense.weights.checkpoint import Checkpoint
from tests.teacher.families import blocks, make


@pytest.fixture
def folder(tmp_path):
    """A tiny Mixtral in several shards."""
    model = make("mixtral", tmp_path)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors").unlink()
    return tmp_path


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def holder(folder, part):
    """(file, name) of the first tensor whose name contains `part`."""
    where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    name = next(n for n in where if part in n)
    return folder / where[name], name


def rewrite_header(path, change):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("preadv", [False, True])
def test_reads_equal_safetensors(folder, monkeypatch, drop, preadv):
    monkeypatch.setattr(module, "_PREADV", preadv)
    found = Checkpoint(folder, drop_pages=drop)
    assert len(shards(folder)) > 3
    want = {n: t for path in shards(folder) for n, t in load_file(path).items()}
    assert set(found.tensors) == set(want) and found.nbytes == sum(t.nbytes for t in want.values())
    for name, value in want.items():
        assert torch.equal(found.read(name), value)
        buffer = torch.empty(value.nbytes, dtype=torch.uint8)
        assert torch.equal(found.read(name, buffer=buffer), value)
        if value.ndim > 1:
            assert torch.equal(found.read(name, 1, 4), value[1:4]) and found.read(name, 2, 2).numel() == 0
    found.close()
    assert torch.equal(found.read(name), value)


def test_every_dtype_and_scalars(tmp_path):
    values = {str(i): torch.arange(6).view(2, 3).to(t) for i, t in enumerate(module.DTYPES.values())}
    values["scalar"] = torch.tensor(3.5)
    save_file(values, tmp_path / "model.safetensors")
    found = Checkpoint(tmp_path)
    for name, value in values.items():
        got = found.read(name)
        assert got.dtype == value.dtype and torch.equal(got.float(), value.float())


def test_truncated_shard(folder):
    path, _ = holder(folder, "layers.1.block_sparse_moe.experts.2.w2")
    os.truncate(path, path.stat().st_size - 5)
    with pytest.raises(UserError, match=f"{path.name} is truncated: tensor '.*' ends at byte .* download it again"):
        load_teacher(folder)
    os.truncate(path, 7)
    with pytest.raises(UserError, match=f"{path.name} is not a safetensors file"):
        load_teacher(folder)


def test_flipped_header(folder):
    path, _ = holder(folder, "experts.1.w1")
    data = bytearray(path.read_bytes())
    data[3] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{path.name} is not a safetensors file: its header claims"):
        load_teacher(folder)
    data[3] ^= 0x40
    data[12] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{path.name} has a damaged header"):
        load_teacher(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [3, 3]}, "of shape .3, 3. and dtype F32 needs 36 bytes, its header says"),
        ({"dtype": "BF16"}, "needs .* bytes, its header says"),
        ({"dtype": "X9"}, "has dtype 'X9', which is not one of"),
        ({"data_offsets": [8, "a"]}, "entry for tensor .* is damaged"),
        ({"data_offsets": [-8, 16]}, "bytes, its header says"),
    ],
)
def test_wrong_header_entries(folder, change, message):
    path, name = holder(folder, "layers.1.block_sparse_moe.experts.1.w3")
    rewrite_header(path, lambda header: header[name].update(change))
    with pytest.raises(UserError, match=f"(?s){path.name}.*{name}.*{message}|{path.name}.*{message}"):
        load_teacher(folder)


def test_overlapping_tensors(tmp_path):
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, tmp_path / "model.safetensors")
    rewrite_header(tmp_path / "model.safetensors", lambda h: h["b"].update({"data_offsets": [8, 24]}))
    with pytest.raises(UserError, match="tensors 'a' and 'b' overlap"):
        Checkpoint(tmp_path)


def drop(folder, part):
    """Take a tensor out of the checkpoint, index included."""
    path, name = holder(folder, part)
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path)
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    del table["weight_map"][name]
    index.write_text(json.dumps(table))
    return name


def test_missing_expert(folder):
    drop(folder, "layers.2.block_sparse_moe.experts.3.w3")
    with pytest.raises(UserError, match=r"expert 3 of parameter 'model.layers.2.mlp.experts.gate_up_proj' is missing"):
        load_teacher(folder)


def test_missing_tensor(folder):
    drop(folder, "layers.1.self_attn.k_proj")
    with pytest.raises(UserError, match=r"no tensor for parameter 'model.layers.1.self_attn.k_proj.weight'"):
        load_teacher(folder)


def test_missing_shard_and_missing_from_shard(folder):
    path, name = holder(folder, "layers.1.block_sparse_moe.gate")
    tensors = load_file(path)
    value = tensors.pop(name)
    save_file(tensors, path)
    with pytest.raises(UserError, match=f"{path.name}: tensor '{name}', named in the index, is missing"):
        load_teacher(folder)
    save_file({**tensors, name: value}, path)
    path.unlink()
    with pytest.raises(UserError, match=f"file {path.name}, named in the index, is missing"):
        load_teacher(folder)


def test_wrong_dtype_and_shape(folder):
    path, name = holder(folder, "layers.1.block_sparse_moe.experts.0.w2")
    tensors = load_file(path)
    save_file({**tensors, name: tensors[name].to(torch.int32)}, path)
    with pytest.raises(UserError, match=f"{path.name}: tensor '{name}' has dtype int32"):
        load_teacher(folder)
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, path)
    with pytest.raises(UserError, match=f"'{name}' has dtype float8_e4m3fn and no tensor of scales beside it"):
        load_teacher(folder)
    save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, path)
    with pytest.raises(UserError, match=rf"{path.name}: tensor '{name}' has shape .*, the config says"):
        load_teacher(folder)


def leave_memory(teacher):
    """Let a teacher that fits in memory read its layers anew."""
    teacher.resident = False
    for layer in teacher.layers:
        layer.resident, layer.experts.keep = False, None


def test_shard_deleted_mid_run(folder):
    teacher = load_teacher(folder, memory="17MB")
    leave_memory(teacher)
    path, _ = holder(folder, "layers.2.block_sparse_moe.experts.1.w1")
    stream = teacher.stream(torch.randint(3, 100, (4, 23)))
    next(stream)
    path.unlink()
    with pytest.raises(UserError, match=f"{path.name}.* tensor '"):
        for _ in stream:
            pass
    assert stream.hidden_states is None


def test_shard_cut_short_mid_run(folder):
    teacher = load_teacher(folder, memory="17MB")
    leave_memory(teacher)
    path, _ = holder(folder, "layers.2.block_sparse_moe.experts.1.w1")
    stream = teacher.stream(torch.randint(3, 100, (4, 23)))
    next(stream)
    os.truncate(path, os.path.getsize(path) // 2)
    with pytest.raises(UserError, match=rf"{path.name} ended inside tensor 'model.layers.*': it changed while in use"):
        for _ in stream:
            pass
    assert stream.hidden_states is None


def test_ignored_tensors_are_named(tmp_path):
    """A checkpoint with a multi-token prediction layer more than the model has."""
    reference = make("deepseek_v3", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    extra = {k.replace("layers.2.", "layers.3."): v.clone() for k, v in tensors.items() if "layers.2." in k}
    save_file({**tensors, **extra}, path, {"format": "pt"})
    teacher = load_teacher(tmp_path)
    assert sorted(teacher.ignored) == sorted(extra)
    ids = blocks(reference)
    assert (teacher.run(ids).logits - reference(ids).logits).abs().max() <= 1e-4


def test_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"has neither model\.safetensors nor"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pickled weights"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{]")
    with pytest.raises(UserError, match=r"index.json is not valid JSON"):
        Checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"has no config.json"):
        load_teacher(tmp_path)


def test_bad_inputs(folder):
    teacher, ids = load_teacher(folder), torch.randint(3, 100, (2, 9))
    with pytest.raises(UserError, match=r"input_ids must lie in \[0, 101\)"):
        teacher.run(ids + 100)
    with pytest.raises(UserError, match="attention_mask must have input_ids' shape"):
        teacher.run(ids, attention_mask=torch.ones(2, 8))
    with pytest.raises(UserError, match="input_ids must be integers of shape"):
        teacher.run(ids.float())
    with pytest.raises(UserError, match="the model has no parameter 'nope'"):
        teacher.tensor("nope")
    with pytest.raises(UserError, match="has no tokenizer"):
        teacher.tokenizer()
    with pytest.raises(UserError, match="experts must be one of"):
        load_teacher(folder, experts="quickly")
    with pytest.raises(UserError, match="device must be"):
        load_teacher(folder, device="abacus")


def test_a_checkpoint_that_outlives_the_modules_ends_quietly(folder):
    """A script's global may be deleted after the module it comes from has been emptied, as a leaked reference brings about."""
    script = f"""
import builtins, ctypes
from moe2dense.weights import checkpoint
builtins.kept = checkpoint.Checkpoint({str(folder)!r})
builtins.kept.read(next(iter(builtins.kept.tensors)))
ctypes.pythonapi.Py_IncRef(ctypes.py_object(checkpoint))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_files_are_closed_with_the_object(folder):
    checkpoint = Checkpoint(folder)
    checkpoint.read(next(iter(checkpoint.tensors)))
    files = checkpoint._files
    assert files
    del checkpoint
    gc.collect()
    assert not files
