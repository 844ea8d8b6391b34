"""load_teacher: a checkpoint, larger than memory or not, as something that runs layer by layer."""

from pathlib import Path
from typing import Any

import torch

from moe2dense.errors import UserError
from moe2dense.families.cards import TeacherCard, read_teacher_card, teacher_cards
from moe2dense.families.resolve import family_card, fetch, has_experts, resolve_teacher
from moe2dense.modeling import internals
from moe2dense.teacher.fake_quant import BITS
from moe2dense.teacher.model import Teacher
from moe2dense.teacher.sampled_routing import Resample


def find_card(config: Any, card: TeacherCard | str | Path | None) -> TeacherCard | None:
    """The card of a config's family; None for a dense model. Raises UserError for an MoE family without one."""
    if isinstance(card, TeacherCard):
        return card
    if card:
        return read_teacher_card(card)
    text = config.get_text_config()
    if text.model_type in teacher_cards():
        return teacher_cards()[text.model_type]
    return family_card(config) if has_experts(text) else None


def number_of_experts(config: Any, card: TeacherCard | None) -> int:
    """How many experts a token uses. Raises UserError where that is not one number."""
    own = getattr(config.get_text_config(), card.top_k, None) if card else None
    if not isinstance(own, int):
        raise UserError(
            "teacher.top_k and teacher.draws need a teacher with one number of experts per token; leave them out"
        )
    return own


def widen_routing(config: Any, card: TeacherCard | None, top_k: int) -> None:
    """Let every token use `top_k` experts. Raises UserError for a number the model cannot do."""
    number_of_experts(config, card)
    text = config.get_text_config()
    assert card is not None
    if not 1 <= top_k <= getattr(text, card.num_experts):
        raise UserError(
            f"teacher.top_k must lie between 1 and the teacher's {getattr(text, card.num_experts)} experts; found {top_k}"
        )
    setattr(text, card.top_k, top_k)


def check_quantize(quantize: str, card: TeacherCard | None, experts: str) -> str:
    """The expert backend of a teacher that is rounded as it is read: only `streamed` reads experts one by one. Raises UserError."""
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
) -> Teacher:
    """A teacher from a folder in hub layout, a hub id, or a known name.

    memory: budget for weights and hidden states, such as "2GB"; auto = half of what is free.
    experts: auto | streamed | grouped_mm | megablocks. device: auto | cpu | cuda.
    card: the family's card, for a family that is not shipped; a model without experts needs none and has `.card` None.
    quantize: int8 | int4 | nf4 rounds every expert as it is read (simulated: nothing gets smaller); top_k: experts per token, in the
    place of the checkpoint's own number; draw: draw that many from the router's distribution, each number another time (`seed`).
    Raises UserError naming file and tensor when the checkpoint is incomplete or damaged.
    """
    folder = Path(path)
    if not folder.exists():
        folder = fetch(resolve_teacher(str(path), str(card) if isinstance(card, (str, Path)) else ""))
    if not (folder / "config.json").is_file():
        raise UserError(
            f"teacher {folder} has no config.json; give the folder of a checkpoint as transformers saves it"
        )
    config = internals.read_config(str(folder))
    found = find_card(config, card)
    backend, resample = check_quantize(quantize, found, experts), None
    if draw is not None:
        own = number_of_experts(config, found)
        plain = Teacher(folder, internals.read_config(str(folder)), found, memory, "streamed", device)
        resample = Resample(top_k or own, normalizes(plain), draw, seed)
    if top_k:
        widen_routing(config, found, top_k)
    if resample is not None:
        widen_routing(config, found, getattr(config.get_text_config(), found.num_experts if found else ""))
    return Teacher(folder, config, found, memory, backend, device, quantize, resample)


# n blocks, S block length, T = n S tokens, E experts, K drawn of them
_PROBE = 16  # tokens


def normalizes(teacher: "Teacher") -> bool:
    """Whether the weights of a token's chosen experts sum up to one constant, as a few tokens of its first sparse layer show."""
    vocabulary = teacher.shapes[teacher.embedding_name].shape[0]
    stream = teacher.stream((torch.arange(_PROBE) * 7919 % vocabulary)[None])
    for made in stream:
        if made.top_k_weights is not None:
            sums = made.top_k_weights.double().sum(1)
            stream.close()
            return bool((sums.max() - sums.min()) < 0.02 * sums.mean())
    return True
