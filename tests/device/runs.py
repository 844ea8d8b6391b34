"""Whole runs on a pretended GPU: a tiny random teacher with a tokenizer, and a conversion of it."""

import dataclasses
import shutil
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import tomlkit

import moe2dense as m2d
import moe2dense.conversion.planned_memory as planned_memory
import moe2dense.conversion.planning as planning
import moe2dense.teacher.model as teacher_model
from moe2dense.conversion.results import Result
from moe2dense.distillation.rehearsal import Rehearsal
from moe2dense.families.machines import Machine
from tests.device.counts import Counts
from tests.device.pretend import PretendedCuda
from tests.teacher.families import FAMILIES, make

ROOT = Path(__file__).parents[2]
EXAMPLE, TEXT = ROOT / "examples" / "tiny-mixtral", ROOT / "examples" / "text"
WIDTHS = (
    "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp",
    "shared_intermediate_size",
)  # fmt: skip
SHORT: dict[str, dict[str, Any]] = {
    "data": {"eval_blocks": 1},
    "build": {"min_tokens": 256, "local_steps": 1, "layer_steps": 1, "heal_epochs": 1.0},
    "train": {"epochs": 1.0, "batch": 512, "save_every": 100000, "eval_every": 100000},
    "evaluate": {"samples": 1, "prompt_tokens": 8, "sample_tokens": 3, "skills": 0},
}


STREAMED = {"resident": False, "hidden_bytes": 4000}


def make_teacher(family: str, folder: Path, **sizes: Any) -> Path:
    """Write a random teacher of a family, two layers of it where their kinds do not depend on the number, with the example's tokenizer."""
    if not {"num_hidden_layers", "layer_types", "mlp_layer_types", "layer_group_size"} & FAMILIES[family].keys():
        sizes = {"num_hidden_layers": 2, "mlp_only_layers": []} | sizes
    wide: dict[str, Any] = {name: 32 for name in WIDTHS if name in FAMILIES[family]}
    fields: dict[str, Any] = {"vocab_size": 4096, "pad_token_id": 2} | wide | sizes
    make(family, folder, **fields)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / name, folder / name)
    return folder


@contextmanager
def states_rest(where: str) -> Iterator[None]:
    """Let hidden states rest on the `gpu` as they would, or find no room there (`ram`), or no room in memory at all (`disk`).

    On the GPU the teacher is resident, in the other cases it is streamed. Keys and values of a few tokens fit in any case.
    """
    plan_memory = teacher_model.plan_memory
    changes = {"gpu": {}, "ram": STREAMED, "disk": STREAMED | {"ram_bytes": 0}}[where]
    with mock.patch.object(
        teacher_model, "plan_memory", lambda *sizes: dataclasses.replace(plan_memory(*sizes), **changes)
    ):
        yield


def convert(teacher: Path, folder: Path, where: str = "gpu", more: str = "", **options: Any) -> tuple[Result, Counts]:
    """Convert a teacher on a pretended GPU; return the result and what was counted. more: settings as TOML, above SHORT."""
    folder.mkdir(exist_ok=True)
    settings, tables = folder / "settings.toml", tomllib.loads(more)
    merged = {name: SHORT.get(name, {}) | tables.get(name, {}) for name in (*SHORT, *tables)}
    settings.write_text(tomlkit.dumps(merged))
    machine = Machine(
        "a pretended GPU", single=5e13, disk=3e9, half=4e14, tf32=2e14, double=2e13, memory=80e9, host_memory=100e9, bus=5e10, device="cuda"
    )  # fmt: skip
    given = {
        "to": "95%",
        "data": str(TEXT),
        "tokens": "4k",
        "block": 128,
        "memory": "500MB",
        "control": False,
    } | options
    with (
        PretendedCuda() as counts,
        states_rest(where),
        mock.patch.object(planning, "calibrate", lambda *_, **__: machine),
        mock.patch.object(planned_memory, "rehearse", lambda *_: Rehearsal(0, 0)),  # it computes nothing on any device
    ):
        result = m2d.convert(str(teacher), out=folder / "out", config=settings, device="cuda", **given)
    assert isinstance(result, Result)
    return result, counts
