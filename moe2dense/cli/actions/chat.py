"""Talk with a student, and with its teacher beside it, as `moe2dense chat` asks."""

from pathlib import Path

from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel

from moe2dense.cli.actions.common import open_teacher
from moe2dense.config.schema import RunConfig
from moe2dense.errors import UserError
from moe2dense.exporting.stacks import served_model
from moe2dense.exporting.tokenizer import load_tokenizer
from moe2dense.generation.dialogue import talk
from moe2dense.generation.sampling import Sampling
from moe2dense.modeling.load import load_model
from moe2dense.teacher.kinds import AnyTeacher


def run_chat(
    what: Path, teacher: str | None, settings: RunConfig, *, tokens: int, temperature: float, top_p: float
) -> None:
    """Read lines and print what the models answer until an empty line. Raises UserError for bad input."""
    if tokens < 1:
        raise UserError(f"--tokens must be at least 1; found {tokens}")
    sampling = Sampling(temperature, top_p, seed=settings.seed)
    folder = served_model(what)
    if folder.suffix == ".gguf":
        raise UserError(f"{folder} is a GGUF file; `moe2dense serve` starts llama.cpp on it")
    tokenizer = load_tokenizer(folder)
    model = load_model(folder).eval()
    models: dict[str, AnyTeacher] = {"student": model}
    window = model.config.max_position_embeddings
    if teacher is not None:
        models["teacher"] = open_teacher(teacher, settings.teacher)
    given = None if model.generation_config is None else model.generation_config.eos_token_id
    stop = {i for i in (given if isinstance(given, list) else [given]) if isinstance(i, int)}
    stop |= {i for i in [tokenizer.eos_token_id] if isinstance(i, int)}
    console = Console()
    how = "in turns" if tokenizer.chat_template else "as one running text: its tokenizer has no chat template"
    console.print(f"{folder}: {how}. An empty line ends it.", highlight=False, markup=False)
    with _Answers(console) as answers:
        talk(models, tokenizer, answers.read, answers.show, sampling, min(tokens, window - 1), stop, window)


class _Answers:
    """What is read from and shown at a terminal: each model's answer in a panel of its own, as it grows."""

    def __init__(self, console: Console):
        self.console = console
        self.live: Live | None = None

    def __enter__(self) -> "_Answers":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def read(self) -> str | None:
        """Return the next line; None for an empty one, or at the end of input."""
        self._close()
        try:
            line = self.console.input("> ")
        except (EOFError, KeyboardInterrupt):
            return None
        return line or None

    def show(self, answers: dict[str, str]) -> None:
        """Show the answers as they are now."""
        panels = [Panel(escape(text), title=name) for name, text in answers.items()]
        if self.live is None:
            self.live = Live(console=self.console, auto_refresh=False, transient=False)
            self.live.start()
        self.live.update(Columns(panels, equal=True, expand=True), refresh=True)
