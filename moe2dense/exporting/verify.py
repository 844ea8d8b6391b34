"""Check that an exported folder is the student: read it back by transformers alone and compare every tensor."""

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from moe2dense.errors import UserError
from moe2dense.exporting.dialects import older_fields
from moe2dense.modeling.forward import evaluation_mode
from moe2dense.modeling.load import load_model

# Parameter names by which a mixture of experts is recognised.
_MOE_TENSOR = re.compile(
    r"(^|\.)(experts?|shared_experts?|router|block_sparse_moe|e_score_correction_bias)(\.|_|$)|\.gate\.weight$"
)
_TEXT = "The year 1987: 3.14159, and “quotes”, naïve café — 漢字 🙂\n\tdef f(x): return x ** 2  # done\n"


class VerificationError(UserError):
    """The written checkpoint is not the student; the message names the tensor or the file."""


def check_dense(folder: Path, moe_shaped: bool) -> None:
    """Check that no tensor of a mixture of experts is left, unless the host is known to keep the wrapper."""
    for name in checkpoint_tensors(folder):
        if not moe_shaped and _MOE_TENSOR.search(name):
            raise VerificationError(f"export: tensor {name} belongs to a mixture of experts; the model is not dense")


def checkpoint_tensors(folder: Path) -> dict[str, Path]:
    """Return the file of every tensor on disk by name; check that the index, where there is one, is right."""
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            files.update(dict.fromkeys(file.keys(), path))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        listed = json.loads(index.read_text())["weight_map"]
        wrong = [name for name in {*listed, *files} if name not in files or listed.get(name) != files[name].name]
        if wrong:
            raise VerificationError(f"export: tensor {min(wrong)} and the index disagree on its file")
    return files


def load_plain(folder: Path, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Load the folder with transformers alone, in fp32; check that every tensor of the architecture is on disk.

    Raises VerificationError naming a tensor that is missing, left over or of another shape.
    """
    try:
        model = load_model(folder, local_files_only=True)
    except UserError as error:
        raise VerificationError(f"export: {error}") from error
    return model.eval().to(device)  # type: ignore[arg-type]


def compare_tensors(loaded: PreTrainedModel, student: PreTrainedModel, dtype: torch.dtype) -> int:
    """Check that every tensor equals the student's rounded to `dtype`, bit for bit; return how many were compared."""
    expected, exported = student.state_dict(), loaded.state_dict()
    for name in sorted({*expected, *exported}):
        if name not in exported:
            raise VerificationError(f"export: tensor {name} is in the student but not in the exported model")
        if name not in expected:
            raise VerificationError(f"export: tensor {name} is in the exported model but not in the student")
        want = rounded(expected[name], dtype)
        got = exported[name].to(want.device)
        if want.shape != got.shape or not torch.equal(want, got.to(want.dtype)):
            raise VerificationError(f"export: tensor {name} differs from the student's after reloading")
    return len(exported)


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `tensor` as it reads back after being stored in `dtype`; integers unchanged."""
    return tensor.detach().to(dtype).float() if tensor.is_floating_point() else tensor.detach()


@torch.no_grad()
def compare_forward(loaded: PreTrainedModel, student: PreTrainedModel, tolerance: float = 1e-4) -> float:
    """Check that the student's own module, run on the exported weights, gives the reloaded model's logits.

    With the tensors equal, this checks what remains: config fields, rope, norms' eps, multipliers, masks. The tolerance is
    relative to the largest logit. Return the largest difference. Raises VerificationError above the tolerance.
    """
    config = loaded.config.get_text_config()
    length = min(33, getattr(config, "max_position_embeddings", 33) or 33)
    seeded = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (2, length), generator=seeded).to(loaded.device)
    with evaluation_mode(student):
        want = torch.func.functional_call(
            student, loaded.state_dict(), kwargs={"input_ids": ids, "use_cache": False}, tie_weights=False
        )
    got = loaded(input_ids=ids, use_cache=False).logits.float()
    want = want.logits.float()
    worst = (want - got).abs().max().item()
    if not worst <= tolerance * max(1.0, want.abs().max().item()):
        raise VerificationError(
            f"export: logits differ by {worst:.3g} after reloading although every tensor is equal; "
            "config.json does not describe the student"
        )
    return worst


def check_config(folder: Path, student: PreTrainedModel, dtype: str) -> None:
    """Check that config.json names the student's class, its dtype and every field of its configuration."""
    config = json.loads((folder / "config.json").read_text())
    want = student.config.to_dict()
    older = older_fields(want)
    named = older.get("architectures", [type(student).__name__])
    if config.get("architectures") != named:
        raise VerificationError(f"export: config.json names {config.get('architectures')}, not {named}")
    if config.get("dtype") != dtype:
        raise VerificationError(f"export: config.json says dtype {config.get('dtype')}, the tensors are {dtype}")
    got = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).to_dict()
    added = older.keys() - want.keys()
    want |= {name: value for name, value in older.items() if name in want}
    skipped = {"architectures", "dtype", "torch_dtype", "_name_or_path", "transformers_version", "quantization_config"}
    different = [key for key in sorted({*want, *got} - skipped - added) if want.get(key) != got.get(key)]
    if different:
        key = different[0]
        raise VerificationError(f"export: config field {key} reads back as {got.get(key)!r}, not {want.get(key)!r}")


def check_tokenizer(folder: Path, source: PreTrainedTokenizerBase) -> None:
    """Check that the exported tokenizer encodes, decodes and formats chats exactly as its source."""
    try:
        copy = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise VerificationError(f"export: the tokenizer files cannot be loaded back: {error}") from error
    if copy.get_vocab() != source.get_vocab():
        raise VerificationError("export: the exported tokenizer has another vocabulary than its source")
    ids = source(_TEXT)["input_ids"]
    if copy(_TEXT)["input_ids"] != ids or copy.decode(ids) != source.decode(ids):
        raise VerificationError("export: the exported tokenizer splits text differently from its source")
    if copy.chat_template != source.chat_template:
        raise VerificationError("export: the chat template was not copied")
