"""Open a checkpoint as a teacher: find it, its family's card, and how its experts are routed, rounded and computed."""

import warnings
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from moe2dense.errors import UserError
from moe2dense.families.cards import TeacherCard, read_teacher_card, teacher_cards
from moe2dense.families.resolve import checkpoint_folder, family_card, fetch, has_experts, resolve_teacher
from moe2dense.modeling.internals import read_config
from moe2dense.teacher.card_check import check_card, is_shipped
from moe2dense.teacher.fake_quant import BITS
from moe2dense.teacher.model import Teacher
from moe2dense.teacher.sampled_routing import Resample
from moe2dense.weights.files import refuse_adapter

_PROBE_TOKENS = 16


def find_card(config: PreTrainedConfig, card: TeacherCard | str | Path | None) -> TeacherCard | None:
    """Return the card of a config's family; None for a dense model. Raises UserError for an MoE family without one."""
    if isinstance(card, TeacherCard):
        return card
    if card:
        return read_teacher_card(card)
    text = config.get_text_config()
    shipped = teacher_cards().get(text.model_type)
    if shipped is not None:  # some classes are of sparse and dense models alike
        return family_card(config) if getattr(text, shipped.num_experts, None) or has_experts(text) else None
    return family_card(config) if has_experts(text) else None


def experts_per_token(config: PreTrainedConfig, card: TeacherCard | None) -> int:
    """Return how many experts a token uses. Raises UserError where that is not one number."""
    own = getattr(config.get_text_config(), card.top_k, None) if card else None
    if not isinstance(own, int):
        raise UserError(
            "teacher.top_k and teacher.draws need a teacher with one number of experts per token; leave them out"
        )
    return own


def widen_routing(config: PreTrainedConfig, card: TeacherCard | None, top_k: int) -> None:
    """Let every token use `top_k` experts. Raises UserError for a number the model cannot do."""
    experts_per_token(config, card)
    text = config.get_text_config()
    assert card is not None
    if not 1 <= top_k <= getattr(text, card.num_experts):
        raise UserError(
            f"teacher.top_k must lie between 1 and the teacher's {getattr(text, card.num_experts)} experts; found {top_k}"
        )
    setattr(text, card.top_k, top_k)


def check_quantize(quantize: str, card: TeacherCard | None, experts: str) -> str:
    """Return the expert backend of a teacher that is rounded as it is read: only `streamed` reads experts one by one.

    Raises UserError for an unknown rounding, or a teacher or backend that cannot be rounded.
    """
    if not quantize:
        return experts
    if quantize not in BITS:
        raise UserError(f"teacher.quantize must be one of {', '.join(BITS)}; found {quantize!r}")
    if card is None or experts not in ("auto", "streamed"):
        what = "a model without experts" if card is None else f"experts={experts!r}"
        raise UserError(f"teacher.quantize rounds experts as they are read, which {what} cannot do; leave it out")
    return "streamed"


def load_teacher(
    path: str | Path,
    memory: str | int = "auto",
    experts: str = "auto",
    device: str = "auto",
    card: TeacherCard | str | Path | None = None,
    quantize: str = "",
    top_k: int = 0,
    draw: int | None = None,
    seed: int = 0,
    gpu_memory: str | int = "auto",
) -> Teacher:
    """Open a teacher: a folder in hub layout, a hub id, or a known name.

    memory: of this machine for weights and hidden states, such as "2GB"; auto = half of what is free. gpu_memory: of the GPU, where
    one computes; auto = what is free but a tenth.
    experts: auto | streamed | grouped_mm | megablocks. device: auto | cpu | cuda.
    card: the family's card, for a family that is not shipped; a model without experts needs none and has `.card` None.
    quantize: int8 | int4 | nf4 rounds every expert as it is read (simulated: nothing gets smaller); top_k: experts per token, in the
    place of the checkpoint's own number; draw: draw that many from the router's distribution, each number another time (`seed`).
    What the checkpoint holds and is not used is said in a warning, and in `.remarks`.
    Raises UserError naming file and tensor when the checkpoint is incomplete or damaged.
    """
    folder = _folder_of(path, card)
    config = read_config(str(folder))
    family = find_card(config, card)
    backend, resample = check_quantize(quantize, family, experts), None
    if family is not None and not is_shipped(family):
        check_card(config, family)
    if draw is not None:
        own = experts_per_token(config, family)
        plain = Teacher(folder, read_config(str(folder)), family, memory, "streamed", device, gpu_memory=gpu_memory)
        resample = Resample(top_k or own, normalizes(plain), draw, seed)
    if top_k:
        widen_routing(config, family, top_k)
    if resample is not None:
        widen_routing(config, family, getattr(config.get_text_config(), family.num_experts if family else ""))
    teacher = Teacher(folder, config, family, memory, backend, device, quantize, resample, gpu_memory)
    for remark in teacher.remarks:
        warnings.warn(remark, stacklevel=2)
    return teacher


def _folder_of(path: str | Path, card: TeacherCard | str | Path | None) -> Path:
    """Return the folder of a teacher, downloaded where it is a hub id or a known name. Raises UserError without one."""
    folder = checkpoint_folder(path)
    if not folder.exists():
        folder = fetch(resolve_teacher(str(path), str(card) if isinstance(card, (str, Path)) else ""))
    if not (folder / "config.json").is_file():
        refuse_adapter(folder)
        raise UserError(
            f"teacher {folder} has no config.json; give the folder of a checkpoint as transformers saves it"
        )
    return folder


def normalizes(teacher: Teacher) -> bool:
    """Return whether the weights of a token's chosen experts add up to one constant, as its first sparse layer shows."""
    vocabulary = teacher.shapes[teacher.embedding_name].shape[0]
    stream = teacher.stream((torch.arange(_PROBE_TOKENS) * 7919 % vocabulary)[None])
    for layer_pass in stream:
        if layer_pass.top_k_weights is not None:
            sums = layer_pass.top_k_weights.double().sum(1)
            stream.close()
            return bool((sums.max() - sums.min()) < 0.02 * sums.mean())
    return True
