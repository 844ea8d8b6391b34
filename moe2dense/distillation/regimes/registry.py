"""The training regimes, one row each. Reading them loads no torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RegimeRow:
    """What is known of a regime without loading it.

    implementation: `module:Class`, a subclass of `Regime` of the same name; targets: whose answers the student learns from.
    "teacher": the given teacher's on the given text; "mixed": that with regime.share of a second model's; "own": the regime
    computes them itself. writes_text: the student writes what it learns from. needs_peer: a second student trains along.
    """

    name: str
    title: str
    paper: str
    help: str
    implementation: str
    targets: Literal["teacher", "mixed", "own"] = "teacher"
    writes_text: bool = False
    needs_peer: bool = False


_HERE = "moe2dense.distillation.regimes"

REGIMES: dict[str, RegimeRow] = {
    row.name: row
    for row in (
        RegimeRow(
            name="on-policy",
            title="On-policy distillation (GKD)",
            paper="arXiv 2306.13649",
            help="the student continues the text itself and the teacher answers at each of its words, for regime.share of the steps",
            implementation=f"{_HERE}.on_policy:OnPolicy",
            targets="own",
            writes_text=True,
        ),
        RegimeRow(
            name="policy-gradient",
            title="Reverse KL of whole texts by policy gradient (MiniLLM)",
            paper="arXiv 2306.08543",
            help="as on-policy, and each word also earns what the words after it are worth; needs train.loss reverse_kl",
            implementation=f"{_HERE}.policy_gradient:PolicyGradient",
            targets="own",
            writes_text=True,
        ),
        RegimeRow(
            name="online",
            title="Teacher and student train together (rocket launching)",
            paper="arXiv 1708.04106",
            help="the teacher, whole in memory, learns the text while the student follows it",
            implementation=f"{_HERE}.online:Online",
            targets="own",
        ),
        RegimeRow(
            name="mutual",
            title="Deep mutual learning (DML)",
            paper="arXiv 1706.00384",
            help="two students learn from each other, with regime.share of the target; regime.peer is the second one",
            implementation=f"{_HERE}.peers:Mutual",
            targets="mixed",
            needs_peer=True,
        ),
        RegimeRow(
            name="ema",
            title="Mean teacher: the average of the student's own weights",
            paper="arXiv 1703.01780",
            help="regime.share of the target comes from a moving average of the student's weights",
            implementation=f"{_HERE}.peers:Ema",
            targets="mixed",
        ),
        RegimeRow(
            name="multiview",
            title="Multi-view self-distillation (temporal ensembling, R-Drop)",
            paper="arXiv 1610.02242, 2106.14448",
            help="regime.share of the target is the student's mean prediction over regime.views noisy views of the text",
            implementation=f"{_HERE}.multiview:MultiView",
            targets="mixed",
        ),
        RegimeRow(
            name="mtp",
            title="Multi-token prediction heads (Medusa)",
            paper="arXiv 2401.10774",
            help="regime.heads small heads beside the student learn the teacher's predictions of the tokens after the next one",
            implementation=f"{_HERE}.mtp:MultiToken",
        ),
    )
}


def writes_text(name: str) -> bool:
    """Return whether the regime called `name` trains on text that the student writes; False for ""."""
    return name in REGIMES and REGIMES[name].writes_text
