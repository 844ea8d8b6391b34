"""What `--init BASE[+refit][+local][+layer][+heal]` asks for; `layerwise` is the whole recipe."""

STEPS = ("refit", "local", "layer", "heal")
LAYERWISE = "obs+refit+local+layer+heal"

# of the local fit: what more of them give, the heal gives sooner
STEPS_BEFORE_POLISH, STEPS_ALONE = 600, 1200


def parts(init: str) -> list[str]:
    """The base method and the steps as they are written."""
    return (LAYERWISE if init == "layerwise" else init).split("+")


def steps_of(init: str, healed: bool, join: str = "additive") -> list[str]:
    """The steps after the base method, in the order they are taken.

    healed: whether the end-to-end fit runs, where it is asked for. Whole layers of a build are then left to it, which does more in the same
    seconds (docs/students.md), except where the host norms the FFN's output (`join`): what comes behind that norm only they are fitted to.
    """
    found = [step for step in STEPS if step in parts(init)[1:]]
    if init == "layerwise" and healed and join != "post_norm":
        found.remove("layer")
    return found


def local_steps(wanted: int, healed: bool) -> int:
    """Steps of the local fit of a layer's FFN: as many as are wanted, by whether a heal follows where that is 0."""
    return wanted or (STEPS_BEFORE_POLISH if healed else STEPS_ALONE)
