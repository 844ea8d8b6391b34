"""Describe machines that a plan can be made for: shipped cards such as `1xh100`, or a TOML file of one's own."""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe2dense.common.units import parse_bytes
from moe2dense.errors import UserError, nearest
from moe2dense.families.cards import card_folder

_NAMED = re.compile(r"^(?:(\d+)x)?([a-z0-9-]+)$", re.IGNORECASE)
_RATES, _SIZES, _TEXTS = (
    ("half", "tf32", "single", "double"),
    ("memory", "host_memory", "disk", "bus"),
    ("title", "matches"),
)
CPU = "cpu"


@dataclass(frozen=True)
class Machine:
    """What a plan's times and memory assume.

    half, tf32, single, double: FLOP/s of matrix products in bfloat16, float32 by TF32, float32 and float64, of one device. memory: bytes of one device, for
    a CPU its main memory; host_memory: main memory. disk, bus: bytes a second read from disk, and between main memory and the
    device. share: how much of these rates a run reaches. measured: "products", "disk" or both, where they are not a card's.
    """

    title: str
    single: float
    disk: float
    half: float = 0.0
    tf32: float = 0.0
    double: float = 0.0
    memory: float = 0.0
    host_memory: float = 0.0
    bus: float = 0.0
    count: int = 1
    device: str = CPU
    share: float = 0.4
    measured: tuple[str, ...] = ()
    matches: str = ""  # part of the name that torch gives such a device

    def rate(self, precision: str) -> float:
        """Return the FLOP/s that a run reaches on one device in `half`, `tf32`, `single` or `double`."""
        rates = {
            "half": self.half or self.single,
            "tf32": self.tf32 or self.single,
            "single": self.single,
            "double": self.double or self.single / 2,
        }
        return self.share * rates[precision]


def machine_names() -> list[str]:
    """Return the names of the shipped machines."""
    return sorted(path.stem for path in card_folder("machines").glob("*.toml"))


def peak_of(name: str) -> float:
    """Return the FLOP/s in bfloat16 of a GPU that torch calls `name`; 0 where no shipped machine has such a one."""
    known = (read_machine(path) for path in sorted(card_folder("machines").glob("*.toml")))
    return next((machine.half for machine in known if machine.matches and machine.matches in name), 0.0)


def described_machine(text: str) -> Machine:
    """Return the machine of a name such as `h100` or `8xh100`, or of a TOML file. Raises UserError for anything else."""
    if Path(text).suffix == ".toml":
        return read_machine(Path(text))
    match = _NAMED.match(text.strip())
    name = match[2].lower() if match else ""
    file = card_folder("machines") / f"{name}.toml"
    if match is None or not file.is_file() or match[1] == "0":
        known = machine_names()
        raise UserError(
            f"--machine {text!r} is no machine such as 1xh100, no TOML file that describes one, and not cpu"
            f"{nearest(name, known)}; known are {', '.join(known)}"
        )
    return read_machine(file, int(match[1] or 1))


def read_machine(file: Path, count: int = 0) -> Machine:
    """Read a machine from a TOML file; `count` devices, by default as many as it says. Raises UserError naming file and key."""
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--machine {file} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--machine {file} is not valid TOML: {error}") from error
    known = [*_TEXTS, *_RATES, *_SIZES, "count", "device", "share"]
    for key in table:
        if key not in known:
            raise UserError(f"--machine {file}: unknown key {key!r}{nearest(key, known)}")
    for key in ("title", "single", "memory", "disk"):
        if key not in table:
            raise UserError(f"--machine {file}: missing key {key!r}")
    values: dict[str, Any] = {"device": "cuda"} | table
    for key in _SIZES:
        if key in values:
            values[key] = float(parse_bytes(values[key], f"--machine {file}: {key}"))
    for key in (*_RATES, *_SIZES, "count", "share"):
        number = values.get(key, 1)
        if isinstance(number, bool) or not isinstance(number, (int, float)) or number <= 0:
            raise UserError(f"--machine {file}: {key} must be above 0; found {number!r}")
    if values["device"] not in (CPU, "cuda"):
        raise UserError(f"--machine {file}: device must be cpu or cuda; found {values['device']!r}")
    if count:
        values["count"] = count
    return Machine(**values)
