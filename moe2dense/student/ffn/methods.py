"""List the ways to make a layer's dense FFN from its experts, by the name that `--init` gives them.

A new method is a function in a file of this package, (FFNTask, width) -> SourcedFFN, and one row here. No torch is loaded by
reading the rows.
"""

from dataclasses import dataclass

from moe2dense.errors import UserError, nearest
from moe2dense.student.init_spec import LAYERWISE, STEPS, base_and_steps, steps_of


@dataclass(frozen=True)
class Method:
    """A way to make an FFN of a given width from a layer's routed experts; what `--init` may begin with."""

    name: str
    title: str
    paper: str
    help: str
    # "module:function" of the code; "" for a recipe, which is short for a method and its steps
    implementation: str = ""
    # whether it keeps what the teacher has, such as shared experts
    uses_teacher: bool = True


_CODE = "moe2dense.student.ffn."

METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method(
            name="obs",
            title="optimal brain surgeon",
            paper="Hassibi and Stork, 1993; HEAPr, arXiv 2509.22299",
            help="neurons of all experts, eliminated one after the other where the layer's output is missed least; "
            "they keep their own output weights, which +refit fits",
            implementation=_CODE + "obs:obs_method",
        ),
        Method(
            name="select",
            title="neurons of highest energy",
            paper="CAMERA, arXiv 2508.02322",
            help="the neurons of all experts that write most router-weighted energy to the output, each scored alone",
            implementation=_CODE + "select:select_method",
        ),
        Method(
            name="concat",
            title="whole experts side by side",
            paper="arXiv 2605.28207",
            help="the best experts, ranked by build.score, kept whole and scaled as build.scale says",
            implementation=_CODE + "concat:concat_method",
        ),
        Method(
            name="cluster",
            title="merged groups of experts",
            paper="HC-SMoE, arXiv 2410.08589",
            help="experts that answer alike merged, then the merged ones put side by side",
            implementation=_CODE + "cluster:cluster_method",
        ),
        Method(
            name="average",
            title="mean of the experts",
            paper="OneS, arXiv 2201.10890",
            help="the plain mean of the experts' weights; one expert wide, the rest of the width learns from zero",
            implementation=_CODE + "average:average_method",
        ),
        Method(
            name="weighted-average",
            title="mean of the experts by use",
            paper="OneS, arXiv 2201.10890",
            help="the mean of the experts' weights in proportion to their mean routing weights",
            implementation=_CODE + "average:weighted_average_method",
        ),
        Method(
            name="aligned-average",
            title="mean of aligned experts",
            paper="MC-SMoE, arXiv 2310.01334; Git Re-Basin, arXiv 2209.04836",
            help="each expert's neurons matched to those of the most used expert, then the mean by routing weight",
            implementation=_CODE + "align:aligned_average_method",
        ),
        Method(
            name="svd",
            title="sum of low-rank experts",
            paper="OneS, arXiv 2201.10890",
            help="the sum of the experts' matrices, each cut to its leading singular directions",
            implementation=_CODE + "svd:svd_method",
        ),
        Method(
            name="random",
            title="random weights",
            paper="",
            help="normal weights in every FFN, nothing of the experts: the control",
            implementation=_CODE + "randomized:random_method",
            uses_teacher=False,
        ),
    )
}

RECIPES: dict[str, Method] = {
    "layerwise": Method(
        name="layerwise",
        title="the default recipe",
        paper="",
        help=f"{LAYERWISE}: neurons chosen by elimination, then fitted layer by layer to the teacher's layers given the "
        "student's own hidden states, and healed end to end where memory allows",
    )
}


def parse_method(init: str) -> tuple[str, list[str]]:
    """Return the base method and the steps of `--init`, such as ("obs", ["refit"]) of `obs+refit`.

    Raises UserError on an unknown part.
    """
    base, *steps = base_and_steps(init)
    if base not in METHODS:
        known = [*RECIPES, *METHODS]
        raise UserError(f"init {init!r} starts with no known method{nearest(base, known)}; known: {', '.join(known)}")
    for step in steps:
        if step not in STEPS:
            raise UserError(
                f"init {init!r}: {step!r} is no step that can follow a method{nearest(step, list(STEPS))}; "
                f"known: {', '.join(STEPS)}"
            )
    return base, steps_of(init, healed=False)


def built_from_teacher(method: str) -> bool:
    """Return whether a student of this method reads and writes the teacher's residual stream: built, not loaded."""
    return method.split("+")[0] in (*RECIPES, *METHODS)
