"""A checkpoint whose tensors do not fit is refused by name, wherever a model is loaded from one."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe2dense.errors import UserError
from moe2dense.evaluation.baselines import open_baseline
from moe2dense.modeling.load import load_model
from moe2dense.student.open import open_student
from moe2dense.teacher.load import load_teacher
from tests.exporting.conftest import tiny


@pytest.fixture
def folder(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    return tmp_path


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    save_file(edit(tensors), folder / "model.safetensors", {"format": "pt"})


def without(part):
    return lambda tensors: {k: v for k, v in tensors.items() if part not in k}


def test_a_whole_checkpoint_is_loaded(folder):
    model = load_model(folder)
    assert model.dtype == torch.float32
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in load_file(folder / "model.safetensors").items())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: {"_orig_mod." + k: v for k, v in t.items()}, r"names that torch\.compile gives them \(_orig_mod\.\S+"),
        (lambda t: {k.replace("layers.1.", "layers.1._orig_mod."): v for k, v in t.items()}, "torch.compile"),
        (lambda t: {"module." + k: v for k, v in t.items()}, r"DistributedDataParallel .* save the model inside it"),
        (lambda t: {"base_model.model." + k: v for k, v in t.items()}, "peft"),
        (without("layers.1."), r"9 tensors are not in the checkpoint.* model\.layers\.1\.\S+, \S+, \S+, \.\.\."),
        (without("lm_head"), r"tensor lm_head\.weight is not in the checkpoint, so transformers would start it at random"),
        (lambda t: {**t, "extra.weight": torch.ones(2)}, r"extra\.weight is in the checkpoint but not part of the arch"),
        (lambda t: {**t, "lm_head.weight": torch.ones(97, 23)}, r"lm_head\.weight is of another shape than config\.json"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(folder, edit, message):
    change(folder, edit)
    with pytest.raises(UserError, match=f"--to {folder} cannot be used: .*{message}"):
        load_model(folder, "--to")
    for load in (open_student, open_baseline):
        with pytest.raises(UserError, match=message):
            load(str(folder))


def test_what_cannot_be_read_is_said(folder):
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="--to .* cannot be loaded"):
        load_model(folder, "--to")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds pickled weights"):
        load_model(folder)


def test_a_streamed_model_names_the_wrapper_too(folder):
    change(folder, lambda t: {"_orig_mod." + k: v for k, v in t.items()})
    with pytest.raises(UserError, match=r"no tensor for parameter .* torch\.compile .*_orig_mod"):
        load_teacher(folder)


def test_a_head_that_is_neither_tied_nor_there_is_refused(folder):
    change(folder, without("lm_head"))
    with pytest.raises(UserError, match=r"'lm_head\.weight'; config\.json says that it is not tied"):
        load_teacher(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    ids = torch.randint(3, 97, (2, 9))
    assert (load_teacher(folder).run(ids).logits - load_model(folder).eval()(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("kept", ["both", "lm_head", "model.embed_tokens"])
def test_tied_tensors_are_read_as_transformers_reads_them(folder, kept):
    """Both with other values: not tied. One alone: it serves as both."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    if kept != "both":
        change(folder, without("embed_tokens" if kept == "lm_head" else "lm_head"))
    ids = torch.randint(3, 97, (2, 9))
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
    if kept == "both":
        with pytest.warns(UserWarning, match=r"ties lm_head\.weight .* they are not tied, as in transformers"):
            teacher = load_teacher(folder)
    else:
        teacher = load_teacher(folder)
        assert teacher.remarks == []
    assert (teacher.run(ids).logits - want).abs().max() < 1e-4
    assert teacher.config.tie_word_embeddings == (kept != "both")  # a student's config copies it
