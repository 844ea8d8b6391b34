"""Say which steps `--init METHOD[+refit][+local][+layer][+heal]` takes; `layerwise` stands for the whole recipe."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """A step that can follow the method in `--init`."""

    name: str
    title: str
    paper: str
    help: str


STEPS: dict[str, Step] = {
    row.name: row
    for row in (
        Step(
            "refit",
            "closed-form refit",
            "",
            "the output weights that fit the teacher's layer best, by ridge regression, pulled towards where they were",
        ),
        Step(
            "local",
            "fit of the FFN",
            "",
            "gradient steps on all weights of a layer's FFN towards the teacher's layer, the best step kept",
        ),
        Step(
            "layer",
            "fit of the layer",
            "",
            "gradient steps on a whole decoder layer, attention and norms too, the best step kept",
        ),
        Step(
            "heal",
            "end-to-end fit",
            "hints: FitNets, arXiv 1412.6550",
            "gradient steps on the whole student towards the teacher's distributions and hidden states, where memory allows",
        ),
    )
}
LAYERWISE = "obs+refit+local+layer+heal"


def base_and_steps(init: str) -> list[str]:
    """Return the base method and the steps of `--init` in the order they are written."""
    return (LAYERWISE if init == "layerwise" else init).split("+")


def steps_of(init: str, healed: bool, join: str = "additive") -> list[str]:
    """Return the steps after the base method, in the order they are taken.

    healed: whether the end-to-end fit runs, where it is asked for. `layerwise` then leaves out the fit of whole layers, since
    the heal does more in the same seconds (docs/students.md). It keeps that fit where the host norms the FFN's output
    (`join`): no other step of the build is fitted to what comes behind that norm.
    """
    steps = [step for step in STEPS if step in base_and_steps(init)[1:]]
    if init == "layerwise" and healed and join != "post_norm":
        steps.remove("layer")
    return steps
