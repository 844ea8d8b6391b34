"""Which files of a folder are its weights: transformers' own choice, or a refusal that names the file."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe2dense.errors import UserError
from moe2dense.student.open import open_student
from moe2dense.teacher.load import load_teacher
from moe2dense.weights.checkpoint import Checkpoint
from moe2dense.weights.files import holds_weights, weight_files
from moe2dense.weights.remarks import unread_files
from tests.teacher.families import blocks, make

INDEX = "model.safetensors.index.json"


def shard(model, folder):
    """Save a model in shards, without model.safetensors."""
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 3


@pytest.fixture
def both(tmp_path):
    """A folder with the shards of one model and the single file of another."""
    old = make("mixtral", tmp_path / "both", seed=0)
    shard(old, tmp_path / "both")
    new = make("mixtral", tmp_path / "new", seed=1)
    (tmp_path / "new" / "model.safetensors").rename(tmp_path / "both" / "model.safetensors")
    return tmp_path / "both", new


def logits(folder, ids):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        return model(ids).logits


def test_a_single_file_goes_before_an_index(both):
    folder, new = both
    ids = blocks(new)
    with pytest.warns(UserWarning, match=f"model.safetensors is read, .* shards of {INDEX} .* hold other weights"):
        teacher = load_teacher(folder)
    assert (teacher.run(ids).logits - logits(folder, ids)).abs().max() <= 1e-4
    assert (teacher.run(ids).logits - new(ids).logits).abs().max() <= 1e-4
    assert "delete the ones that are not meant" in unread_files(Checkpoint(folder))[0]


def test_a_left_over_index_is_said_and_equal_copies_are_not(both):
    folder, new = both
    shard(new, folder)
    new.save_pretrained(folder)  # transformers deletes the shards of before and leaves their index
    assert (folder / INDEX).is_file() and not list(folder.glob("model-*"))
    (remark,) = unread_files(Checkpoint(folder))
    assert f"{INDEX} is a leftover" in remark
    whole = load_file(folder / "model.safetensors")
    save_file(whole, folder / "a.safetensors", {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(whole, "a.safetensors")}))
    assert unread_files(Checkpoint(folder)) == []


def test_the_file_that_the_config_names_is_read(both):
    folder, _ = both
    config = json.loads((folder / "config.json").read_text())
    for name in (INDEX, "model.safetensors"):
        (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
        ids = torch.randint(3, 100, (2, 9))
        assert (load_teacher(folder).run(ids).logits - logits(folder, ids)).abs().max() <= 1e-4
    for name, message in (("weights.bin", "no safetensors file"), ("../other.safetensors", "outside the folder")):
        (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
        with pytest.raises(UserError, match=message):
            weight_files(folder)


def test_a_shard_holds_more_than_its_index_names(both):
    """transformers reads shards whole; a tensor in two of them is refused unless both are the same."""
    folder, _ = both
    (folder / "model.safetensors").unlink()
    table = json.loads((folder / INDEX).read_text())
    name, file = next((n, f) for n, f in table["weight_map"].items() if n == "model.norm.weight")
    del table["weight_map"][name]
    assert file in table["weight_map"].values()
    (folder / INDEX).write_text(json.dumps(table))
    ids = torch.randint(3, 100, (2, 9))
    assert (load_teacher(folder).run(ids).logits - logits(folder, ids)).abs().max() <= 1e-4
    other = next(f for f in table["weight_map"].values() if f != file)
    value = load_file(folder / file)[name]
    tensors = load_file(folder / other)
    save_file({**tensors, name: value}, folder / other, {"format": "pt"})
    assert name in Checkpoint(folder).tensors
    save_file({**tensors, name: value + 1}, folder / other, {"format": "pt"})
    with pytest.raises(UserError, match=f"both hold tensor '{name}', with different values"):
        Checkpoint(folder)


def test_an_adapter_beside_the_weights_is_refused(tmp_path):
    from peft import LoraConfig, get_peft_model

    reference = make("mixtral", tmp_path)
    ids = blocks(reference)
    before = reference(ids).logits
    options = LoraConfig(r=2, lora_alpha=64, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(reference, options).save_pretrained(tmp_path)
    assert (logits(tmp_path, ids) - before).abs().max() > 0.1  # transformers applies it unasked
    with pytest.raises(UserError, match=r"holds an adapter \(adapter_config\.json\).* merge_and_unload"):
        load_teacher(tmp_path)
    with pytest.raises(UserError, match="holds an adapter"):
        weight_files(tmp_path)
    (tmp_path / "config.json").unlink()  # an adapter alone, without the weights it belongs to
    for look in (load_teacher, open_student):
        with pytest.raises(UserError, match="holds an adapter"):
            look(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["pytorch_model.bin"], "holds pickled weights"),
        (["model.fp16.safetensors"], r"only a variant \(model.fp16.safetensors\).*rename it to model.safetensors"),
        (["model.safetensors.index.bf16.json"], "rename it to model.safetensors.index.json"),
        (["model-00001-of-00002.safetensors"], "model-00001-of-00002.safetensors is there without an index"),
        ([], "has neither model.safetensors nor"),
    ],
)
def test_folders_without_weights_that_are_read(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_bytes(b"")
    assert holds_weights(tmp_path) == any(not f.endswith(".bf16.json") for f in files)
    with pytest.raises(UserError, match=message):
        weight_files(tmp_path)


def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(UserError, match="outside the folder"):
        weight_files(tmp_path)
    for damaged in ("{}", "[]", '{"weight_map": {"a": 3}}'):
        (tmp_path / INDEX).write_text(damaged)
        with pytest.raises(UserError, match="not valid JSON with a weight_map"):
            weight_files(tmp_path)
