"""The command that starts a planned run on the machine it was planned for."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe2dense.config.flags import option_entries


def command_to_start(options: Mapping[str, Any], config: Path | None, processes: int = 1) -> str:
    """Return the command line of a conversion with these options, by dotted key, and this settings file, in so many processes."""
    launcher = ["torchrun", "--nproc-per-node", str(processes), "-m"] if processes > 1 else []
    words = [*launcher, "moe2dense", "convert"]
    for key, value in options.items():
        flag = option_entries()[key].flag
        if key == "model":
            words.append(str(value))
        elif isinstance(value, bool):
            words.append(flag if value else f"--no-{flag.removeprefix('--')}")
        else:
            words += [flag, str(value)]
    words += ["--config", str(config)] if config else []
    return shlex.join(words)
