"""Read cards: TOML files that hold what is known of a family of teachers or a dense host. Nothing here imports torch.

A card is looked up in the wheel (moe2dense/teachers, moe2dense/students) and, in a checkout, in the root folders.
"""

import dataclasses
import tomllib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

from moe2dense.errors import UserError, nearest

_PACKAGE = Path(__file__).parents[1]
HEADS = {
    "self_attn.q_proj": "query rows",
    "self_attn.k_proj": "group rows",
    "self_attn.v_proj": "group rows",
    "self_attn.o_proj": "query columns",
}
_UNSUPPORTED = "unsupported.toml"  # beside the teachers' cards
T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """A public checkpoint of a family. `config` holds the config.json fields that fix its shape, so plans work offline."""

    id: str
    aliases: tuple[str, ...] = ()
    license: str = ""
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Unsupported:
    """A row of unsupported.toml."""

    reason: str


@dataclass(frozen=True)
class TeacherCard:
    """One MoE family, named after its Hugging Face `model_type`."""

    model_type: str
    title: str
    host: str  # the student card that reproduces this family densely
    num_experts: str = "num_experts"  # names of the config fields
    top_k: str = "num_experts_per_tok"
    expert_width: str = "moe_intermediate_size"
    moe_block: str = "mlp"  # path of the MoE block in a decoder layer
    router: str = "gate"  # path in the block, else in the layer
    experts: str = "experts"  # path in the block; "" where the experts themselves are the block
    shared: str = ""  # dense FFN that every token passes: path in the block, else in the layer; "" where there is none
    shared_gate: str = ""  # sigmoid gate on the shared FFN's output
    mixers: tuple[str, ...] = ("self_attn",)  # children of a decoder layer that mix tokens
    # text towers of multimodal models that compute the same of text alone and have no causal language model of their own, by
    # model_type, with the settings of this family that they imply
    text_towers: dict[str, dict[str, Any]] = field(default_factory=dict)
    # how many values a decoder layer returns, its hidden states first; read of the shipped cards alone
    returns: int = 1
    # config field = the one value (of every layer, where it lists some) with which layers need nothing else of those before them
    requires: dict[str, Any] = field(default_factory=dict)
    dispatch: str = "routed"  # routed: experts(x, index, weights); stacked: experts(every expert's scaled input)
    weights_sum: str = "one"  # one | constant | varies: what a token's routing weights add up to
    input_scaled: bool = False  # the routing weight multiplies the expert's input, so it does not fold into down_proj
    packing: bool = True  # False: convolution or recurrent state crosses document borders
    notes: str = ""
    defaults: dict[str, Any] = field(default_factory=dict)  # settings this family needs, as in a --config file
    checkpoints: tuple[Checkpoint, ...] = ()

    @property
    def experts_path(self) -> str:
        """The path of the routed experts in a decoder layer."""
        return f"{self.moe_block}.{self.experts}" if self.experts else self.moe_block


@dataclass(frozen=True)
class StudentCard:
    """One dense host architecture, or a named target (then `host` names the architecture and `geometry` its sizes)."""

    name: str
    title: str
    model_type: str = ""
    host: str = ""
    geometry: dict[str, Any] = field(default_factory=dict)
    join: str = "additive"  # additive | scaled | post_norm | parallel: how the FFN's output joins the residual
    join_multiplier: str = ""  # config field of the factor, where join = "scaled"
    moe_shaped: bool = False  # the exported checkpoint keeps an MoE wrapper (one expert)
    ffn: str = "mlp"  # path of the dense FFN in a decoder layer
    # child of a decoder layer that norms the residual stream for the FFN; "" where the FFN reads the stream itself, or its output
    # is normed before it joins, so that the stream cannot be told from it
    norm: str = "post_attention_layernorm"
    gate: str = "gate_proj"  # paths within the FFN
    up: str = "up_proj"  # "" where gate and up are one linear layer, gate first
    down: str = "down_proj"
    width: str = "intermediate_size"  # config field of the FFN width
    # moe_shaped: path within the FFN block of its stacked experts ("": the block itself); the block's other tensors are set to zero
    experts: str = ""
    # moe_shaped: tensor of a layer outside that block = the number that fills it, such as a router of one expert
    constants: dict[str, float] = field(default_factory=dict)
    # moe_shaped: what a router of zeros multiplies the sum of the (identical) experts with
    output_scale: float = 1.0
    copy: tuple[str, ...] = ()  # config fields taken over from the teacher; ["*"] = all that both configs have
    rename: dict[str, str] = field(default_factory=dict)  # student config field = teacher config field
    # student config field = value; "=field" reads the teacher's, "=range(field)" counts to it, "=repeat(word, field)" lists the
    # word so many times
    set: dict[str, Any] = field(default_factory=dict)
    # field of the exported config.json = value; "=field" reads another of its fields. For programs that read the public
    # checkpoints' fields which transformers does not write
    other_fields: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)  # student parameter pattern = teacher parameter pattern
    # module or tensor of a layer = how it is laid out in attention heads; {} where heads cannot be cut
    heads: dict[str, str] = field(default_factory=lambda: dict(HEADS))
    # of channels and layers, what a student cannot have fewer of than its teacher: other sizes of the host follow from them
    uncut: tuple[str, ...] = ()
    loads: dict[str, str] = field(default_factory=dict)  # serving stack = "seen" | "documented" | "no: reason"
    serve_flags: dict[str, list[str]] = field(default_factory=dict)  # serving stack = flags that it needs for this host
    notes: str = ""


def card_folder(kind: str) -> Path:
    """Return the folder of the `teachers` or `students` cards: inside the wheel, else beside the package in a checkout."""
    inside = _PACKAGE / kind
    return inside if inside.is_dir() else _PACKAGE.parent / kind


def _read(path: Path) -> dict[str, Any]:
    """Read a TOML file. Raises UserError naming it."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"card {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"card {path} is not valid TOML: {error}") from error


def _build(cls: type[T], table: dict[str, Any], path: Path) -> T:
    """Build a card from a table. Raises UserError for a key that is unknown, missing or of another type."""
    if not isinstance(table, dict):
        raise UserError(f"card {path}: {cls.__name__.lower()} must be a table; found {table!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in table:
        if key not in fields:
            raise UserError(f"card {path}: unknown key {key!r}{nearest(key, list(fields))}")
    missing = [
        n
        for n, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and n not in table
    ]
    if missing:
        raise UserError(f"card {path}: missing key {missing[0]!r}")
    kinds = get_type_hints(cls)
    for key, value in table.items():
        kind = get_origin(kinds[key]) or kinds[key]
        if kind is tuple and not isinstance(value, (list, tuple)):
            raise UserError(f"card {path}: {key} must be a list; found {value!r}")
        if kind in (str, bool, dict) and not isinstance(value, kind):
            raise UserError(f"card {path}: {key} must be {kind.__name__}; found {value!r}")
    values = {k: tuple(v) if isinstance(v, list) and k != "checkpoints" else v for k, v in table.items()}
    return cls(**values)


def _with_nulls(row: Any) -> Any:
    """Return a checkpoint's row with None for "null" in its config: TOML has no null. What is no such row is left as it is."""
    if not isinstance(row, dict) or not isinstance(row.get("config", {}), dict):
        return row
    return {**row, "config": {k: None if v == "null" else v for k, v in row.get("config", {}).items()}}


def read_teacher_card(path: str | Path) -> TeacherCard:
    """Read a teacher card from a TOML file. Raises UserError naming the file and the key that is wrong."""
    path = Path(path)
    table = _read(path)
    listed = table.pop("checkpoints", [])
    if not isinstance(listed, list):
        raise UserError(f"card {path}: checkpoints must be a list of tables; found {listed!r}")
    rows = [_build(Checkpoint, _with_nulls(row), path) for row in listed]
    return _build(TeacherCard, {**table, "checkpoints": tuple(rows)}, path)


def read_student_card(path: str | Path) -> StudentCard:
    """Read a student card from a TOML file; its name is the file's. Raises UserError naming the file and the key."""
    path = Path(path)
    return _build(StudentCard, {"name": path.stem, **_read(path)}, path)


@cache
def teacher_cards() -> dict[str, TeacherCard]:
    """Return every shipped teacher card by model_type."""
    files = sorted(card_folder("teachers").glob("*.toml"))
    cards = (read_teacher_card(path) for path in files if path.name != _UNSUPPORTED)
    return {card.model_type: card for card in cards}


@cache
def unsupported_teachers() -> dict[str, str]:
    """Return {model_type: reason} of the MoE architectures of transformers that are known not to be possible as teachers."""
    path = card_folder("teachers") / _UNSUPPORTED
    return {model_type: _build(_Unsupported, row, path).reason for model_type, row in _read(path).items()}


def layer_returns(model_type: str) -> int:
    """Return how many values a decoder layer of an architecture returns; 1 where no card says otherwise."""
    card = teacher_cards().get(model_type)
    return card.returns if card else 1


@cache
def student_cards() -> dict[str, StudentCard]:
    """Return every shipped student card (hosts and named targets) by name."""
    return {p.stem: read_student_card(p) for p in sorted(card_folder("students").glob("*.toml"))}


def student_host(name: str) -> StudentCard:
    """Return the host card called `name`. Raises UserError listing the hosts."""
    card = student_cards().get(name)
    if card is None or card.host:
        hosts = [n for n, c in student_cards().items() if not c.host]
        raise UserError(f"no dense host {name!r}{nearest(name, hosts)}; known hosts: {', '.join(hosts)}")
    return card


def find_checkpoint(name: str) -> tuple[TeacherCard, Checkpoint] | None:
    """Return the public checkpoint that a bare name, an alias or a known hub id means, or None."""
    wanted = name.lower()
    for card in teacher_cards().values():
        for row in card.checkpoints:
            if wanted in (row.id.lower(), *(a.lower() for a in row.aliases)):
                return card, row
    card = teacher_cards().get(wanted)
    return (card, card.checkpoints[0]) if card and card.checkpoints else None
