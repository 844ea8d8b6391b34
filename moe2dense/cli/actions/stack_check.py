"""Try an export in the stack that it is for, where that is installed here: the same likeliest tokens as in transformers."""

import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from moe2dense.common.http import RequestFailed
from moe2dense.distillation.targets.served.answers import TopK
from moe2dense.distillation.targets.served.protocols import PROTOCOLS
from moe2dense.distillation.targets.served.server import TeacherServer, connect
from moe2dense.errors import UserError
from moe2dense.exporting.stacks import Stack

_K, _SEQUENCES, _LENGTH = 20, 4, 24
_MOST_KL = 0.02  # nats between the stack and transformers, whose arithmetic differs in the last digits of bfloat16
_START = 600.0  # seconds that a stack may take until it answers


def check_in_stack(
    model: PreTrainedModel, exported: Path, stack: Stack, flags: tuple[str, ...], console: Console
) -> None:
    """Start a stack on an export, compare a few distributions with the model's and stop it; print what was found.

    A stack that is not installed, or that gives no log-probabilities, is said to be untried. Raises UserError where it does not start or
    computes something else.
    """
    if stack.name not in PROTOCOLS or stack.executable() is None:
        why = (
            "it gives no log-probabilities" if stack.name not in PROTOCOLS else f"it is not installed; {stack.install}"
        )
        console.print(f"not tried in {stack.name}: {why}", highlight=False, markup=False)
        return
    port = free_port()
    extra = ("--max-logprobs", str(_K)) if stack.name == "vllm" else ()
    command = stack.start(exported, port, (*flags, *extra))
    console.print(f"trying the export in {stack.name} ...", highlight=False)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            server = _reach(f"http://127.0.0.1:{port}", stack, process, log)
            kl = _difference(model, server)
        except RequestFailed as error:
            raise UserError(
                f"--for {stack.name}: it loads the export and then fails ({error}); the export is in {exported}"
            ) from None
        finally:
            process.terminate()
            process.wait()
    if not kl <= _MOST_KL:
        raise UserError(
            f"--for {stack.name}: it loads the export and computes something else (KL {kl:.3g} nats per token from transformers); the export "
            f"is in {exported}"
        )
    console.print(
        f"seen in {stack.name} {server.version}: KL {kl:.2g} nats per token from transformers", highlight=False
    )


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def _reach(url: str, stack: Stack, process: subprocess.Popen, log: IO[bytes]) -> TeacherServer:
    """Wait until a stack answers. Raises UserError with its last line where it ends before, or takes too long."""
    deadline = time.monotonic() + _START
    while process.poll() is None and time.monotonic() < deadline:
        try:
            return connect(url, _K, kind=stack.name, tries=1)
        except UserError:
            time.sleep(0.5)
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    reason = lines[-1][:200] if lines else "it said nothing"
    raise UserError(f"--for {stack.name}: it does not start on the export ({reason})")


@torch.no_grad()
def _difference(model: PreTrainedModel, server: TeacherServer) -> float:
    """Return the mean KL from the model to the server over the positions of a few random sequences."""
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, int(vocabulary), (_SEQUENCES, _LENGTH), generator=draw)
    log_p = model(input_ids=ids.to(model.device), use_cache=False).logits.double().log_softmax(-1).cpu()
    answers = server.likeliest(ids.tolist())
    return sum(float(_kl(row, answer).mean()) for row, answer in zip(log_p, answers, strict=True)) / len(answers)


def _kl(log_p: Tensor, answer: TopK) -> Tensor:
    """Return the KL [n] of log-probabilities [n, V] from an answer's k tokens and one bucket for the rest."""
    p, q = log_p.gather(1, answer.ids).exp(), answer.log_p.double().exp()
    rest_p, rest_q = (1 - p.sum(1)).clamp(min=1e-9), (1 - q.sum(1)).clamp(min=1e-9)
    return (p * (p / q).log()).sum(1) + rest_p * (rest_p / rest_q).log()
