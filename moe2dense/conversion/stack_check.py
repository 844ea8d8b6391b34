"""Try an export in the stack that it is for, where that is installed here: the same likeliest tokens as in transformers."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe2dense.common.http import RequestFailed
from moe2dense.distillation.targets.served.answers import TopK
from moe2dense.distillation.targets.served.protocols import PROTOCOLS
from moe2dense.distillation.targets.served.server import TeacherServer, connect
from moe2dense.errors import UserError
from moe2dense.exporting.model_card import add_sentence
from moe2dense.exporting.running import running
from moe2dense.exporting.stacks import STACKS, Stack, flags_of, served_model
from moe2dense.modeling.head import model_head
from moe2dense.student.types import Student

# V vocabulary, k likeliest tokens, n positions

_K, _SEQUENCES, _LENGTH = 20, 4, 24
# a short life needs no compiled kernels, and little memory
_SMALL_VLLM = (
    "--enforce-eager", "--max-logprobs", str(_K), "--max-model-len", "64", "--max-num-seqs", str(_SEQUENCES),
)  # fmt: skip
_MOST_KL = 0.02  # nats between the stack and transformers, whose arithmetic differs in the last digits of bfloat16


@dataclass(frozen=True)
class StackCheck:
    """What became of an export in the stack that it is for.

    untried: why it was not tried; failure: what is wrong there; kl: mean nats per token from transformers; equal: positions, of
    `positions`, where both find the same token likeliest.
    """

    stack: str
    version: str = ""
    untried: str = ""
    failure: str = ""
    kl: float = 0.0
    equal: int = 0
    positions: int = 0

    def sentence(self) -> str:
        """Return the result as one sentence."""
        if self.untried:
            return f"Not tried in {self.stack}: {self.untried}."
        if self.failure:
            return f"Tried in {self.stack}: {self.failure}."
        return (
            f"Seen in {self.stack} {self.version}: KL {self.kl:.2g} nats per token from transformers, and the same likeliest token at "
            f"{self.equal} of {self.positions} positions."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as JSON holds them."""
        return asdict(self)


def check_export(student: Student, folder: Path, stack: str) -> StackCheck:
    """Try an export of a student in the stack that it is for, with that host's flags, and add what was seen to its model card."""
    check = check_in_stack(student.model, served_model(folder), STACKS[stack], flags_of(student.card, STACKS[stack]))
    add_sentence(folder, check.sentence())
    return check


def check_in_stack(model: PreTrainedModel, exported: Path, stack: Stack, flags: tuple[str, ...]) -> StackCheck:
    """Start a stack on an export, in processes of its own, compare a few distributions with the model's and stop it.

    Nothing is raised: that a stack is not installed, gives no log-probabilities, does not start within ten minutes or computes
    something else is in the result.
    """
    if stack.name == "transformers":
        return StackCheck(stack.name, untried="it read the export back when that was written")
    if stack.name not in PROTOCOLS:
        return StackCheck(stack.name, untried="its server gives no log-probabilities of a prompt")
    if stack.executable() is None:
        return StackCheck(stack.name, untried=f"it is not installed here ({stack.install})")
    small = _SMALL_VLLM if stack.name == "vllm" else ()
    try:
        with running(
            stack, exported, (*flags, *small), lambda url: connect(url, _K, kind=stack.name, tries=1)
        ) as server:
            kl, equal, positions = _difference(model, server)
    except RequestFailed as error:
        return StackCheck(stack.name, failure=f"it loads the export and then fails ({error})")
    except UserError as error:
        return StackCheck(stack.name, failure=str(error))
    if not kl <= _MOST_KL:
        wrong = f"it loads the export and computes something else (KL {kl:.3g} nats per token from transformers)"
        return StackCheck(stack.name, server.version, failure=wrong, kl=kl, equal=equal, positions=positions)
    return StackCheck(stack.name, server.version, kl=kl, equal=equal, positions=positions)


@torch.no_grad()
def _difference(model: PreTrainedModel, server: TeacherServer) -> tuple[float, int, int]:
    """Return the mean KL from the model to the server over the positions of a few random sequences, and where the likeliest agree."""
    vocabulary = model_head(model).weight.shape[0]
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (_SEQUENCES, _LENGTH), generator=draw)
    log_p = model(input_ids=ids.to(model.device), use_cache=False).logits.double().log_softmax(-1).cpu()
    answers = server.likeliest(ids.tolist())
    pairs = list(zip(log_p, answers, strict=True))
    kl = sum(float(_kl(row, answer).mean()) for row, answer in pairs) / len(pairs)
    equal = sum(int((row.argmax(1) == answer.ids[:, 0]).sum()) for row, answer in pairs)
    return kl, equal, ids.numel()


def _kl(log_p: Tensor, answer: TopK) -> Tensor:
    """Return the KL [n] of log-probabilities [n, V] from an answer's k tokens and one bucket for the rest."""
    p, q = log_p.gather(1, answer.ids).exp(), answer.log_p.double().exp()
    rest_p, rest_q = (1 - p.sum(1)).clamp(min=1e-9), (1 - q.sum(1)).clamp(min=1e-9)
    return (p * (p / q).log()).sum(1) + rest_p * (rest_p / rest_q).log()
