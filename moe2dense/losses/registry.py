"""List the losses that training can use: divergences between next-token distributions, and feature losses.

A new loss is a function or a module in a file of this package and one row here. No torch is loaded by reading the rows.
"""

from dataclasses import dataclass

from moe2dense.errors import UserError, nearest


@dataclass(frozen=True)
class Divergence:
    """A divergence between the next-token distributions of teacher and student; zero where they agree."""

    name: str
    title: str
    paper: str
    help: str
    # "module:function" of the code
    implementation: str
    # name of its number, written after a colon (`jsd:0.3`); "" where it has none
    parameter: str = ""
    # formats of stored teacher targets that it can be computed from
    target_formats: tuple[str, ...] = ("hidden", "full")


@dataclass(frozen=True)
class FeatureKind:
    """A loss between what chosen layers of student and teacher compute."""

    name: str
    title: str
    paper: str
    help: str
    # "module:class", built with (layer_map, kind, student, teacher, heads)
    implementation: str
    # what it reads of a layer, as modeling/hooks.py names it
    reads: tuple[str, ...] = ("hidden",)
    # whether its layer map may be `learned`
    mixes_layers: bool = False


@dataclass(frozen=True)
class LayerMap:
    """A way to say which student layer learns from which teacher layer."""

    name: str
    help: str


_CODE = "moe2dense.losses."

DIVERGENCES: dict[str, Divergence] = {
    row.name: row
    for row in (
        Divergence(
            name="forward_kl",
            title="forward KL",
            paper="Hinton et al., arXiv 1503.02531",
            help="KL(teacher || student): the student covers everything the teacher finds likely",
            implementation=_CODE + "divergences:forward_kl",
            target_formats=("hidden", "full", "topk", "sampled"),
        ),
        Divergence(
            name="reverse_kl",
            title="reverse KL",
            paper="MiniLLM, arXiv 2306.08543",
            help="KL(student || teacher): the student keeps to what the teacher finds likely",
            implementation=_CODE + "divergences:reverse_kl",
        ),
        Divergence(
            name="symmetric_kl",
            title="symmetric KL",
            paper="",
            help="the mean of forward and reverse KL",
            implementation=_CODE + "divergences:symmetric_kl",
        ),
        Divergence(
            name="jsd",
            title="generalised Jensen-Shannon divergence",
            paper="GKD, arXiv 2306.13649",
            help="KL of teacher and of student to their mixture; jsd:0.3 sets beta, the teacher's share (default 0.5)",
            implementation=_CODE + "divergences:jsd",
            parameter="beta",
        ),
        Divergence(
            name="skew_forward_kl",
            title="skew forward KL",
            paper="DistiLLM, arXiv 2402.03898",
            help="KL(teacher || mixture); skew_forward_kl:0.2 sets the teacher's share of the mixture (default 0.1)",
            implementation=_CODE + "divergences:skew_forward_kl",
            parameter="skew",
        ),
        Divergence(
            name="skew_reverse_kl",
            title="skew reverse KL",
            paper="DistiLLM, arXiv 2402.03898",
            help="KL(student || mixture); skew_reverse_kl:0.2 sets the student's share of the mixture (default 0.1)",
            implementation=_CODE + "divergences:skew_reverse_kl",
            parameter="skew",
        ),
        Divergence(
            name="tvd",
            title="total variation distance",
            paper="f-DISTILL, arXiv 2307.15190",
            help="half the summed absolute difference of the probabilities",
            implementation=_CODE + "divergences:tvd",
        ),
    )
}

FEATURE_KINDS: dict[str, FeatureKind] = {
    row.name: row
    for row in (
        FeatureKind(
            name="mse",
            title="hidden states, squared error",
            paper="FitNets, arXiv 1412.6550; TinyBERT, arXiv 1909.10351",
            help="squared error relative to the teacher's hidden state, linear beyond its size, through a projector where widths differ",
            implementation=_CODE + "hidden_states:HiddenMatch",
            mixes_layers=True,
        ),
        FeatureKind(
            name="cosine",
            title="hidden states, cosine",
            paper="DistilBERT, arXiv 1910.01108",
            help="1 - cosine between hidden states, through a projector where widths differ",
            implementation=_CODE + "hidden_states:HiddenMatch",
            mixes_layers=True,
        ),
        FeatureKind(
            name="attention",
            title="attention maps",
            paper="TinyBERT, arXiv 1909.10351; as KL, MiniLM, arXiv 2002.10957",
            help="KL between attention maps, heads averaged in groups where their numbers differ",
            implementation=_CODE + "attention:AttentionMatch",
            reads=("maps",),
        ),
        FeatureKind(
            name="relation",
            title="self-attention relations",
            paper="MiniLMv2, arXiv 2012.15828",
            help="KL between scaled products of tokens' queries, of their keys and of their values; any widths",
            implementation=_CODE + "relations:RelationMatch",
            reads=("query", "key", "value"),
        ),
        FeatureKind(
            name="rkd",
            title="relational distillation",
            paper="RKD, arXiv 1904.05068",
            help="distances and angles between hidden states of a block's tokens; any widths",
            implementation=_CODE + "relations:RkdMatch",
        ),
        FeatureKind(
            name="rkd-distance",
            title="relational distillation, distances",
            paper="RKD, arXiv 1904.05068",
            help="distances between hidden states of a block's tokens alone",
            implementation=_CODE + "relations:RkdMatch",
        ),
        FeatureKind(
            name="rkd-angle",
            title="relational distillation, angles",
            paper="RKD, arXiv 1904.05068",
            help="angles between hidden states of a block's tokens alone",
            implementation=_CODE + "relations:RkdMatch",
        ),
    )
}

LAYER_MAPS: dict[str, LayerMap] = {
    row.name: row
    for row in (
        LayerMap("uniform", "every student layer, spread evenly up to the last layer of both (default)"),
        LayerMap("even:K", "K of these pairs, spread evenly up to the last"),
        LayerMap("last:K", "the last K layers of both"),
        LayerMap("learned", "every student layer learns from a trained mixture of all teacher layers (mse, cosine)"),
        LayerMap("0=1,3=7", "student layer 0 from teacher layer 1 and 3 from 7, counted from 0; -1 is the last"),
    )
}


def parse_divergence(name: str) -> tuple[Divergence, float | None]:
    """Return the row of `jsd` or `jsd:0.3`, and the number after the colon or None.

    Raises UserError for an unknown name, a number where the divergence has none, or one outside (0, 1).
    """
    base, _, value = name.partition(":")
    row = DIVERGENCES.get(base)
    if row is None or (value and not row.parameter):
        known = list(DIVERGENCES)
        raise UserError(f"loss {name!r} is unknown{nearest(base, known)}; use one of {', '.join(known)}")
    if not value:
        return row, None
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise UserError(f"loss {name!r}: the number after the colon must lie between 0 and 1; found {value!r}")
    return row, share
