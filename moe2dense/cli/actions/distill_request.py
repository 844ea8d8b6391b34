"""What `moe2dense distill` is asked for, as one value. Loads no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe2dense.config.schema import RunConfig

CrossTokenizer = Literal["text", "uld", "aligned"]


@dataclass(frozen=True)
class DistillRequest:
    """Who learns from whom. `settings` holds [train], [write], [regime] and [endpoint], the text, the seed and how a teacher is run."""

    student: str
    out: Path
    settings: RunConfig
    # Exactly one of these is given.
    teacher: str | None = None
    targets: str | Path | None = None  # a folder or a URL
    completions: Path | None = None
    endpoint: str | None = None
    cross_tokenizer: CrossTokenizer = "text"
    tokens: int | None = None  # None: all there are
    resume: bool = False
