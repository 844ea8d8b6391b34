"""List the formats in which a teacher's distributions are stored, one row each. Loads no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TargetFormat:
    """What is known of a format without loading it.

    implementation: `module:Class`, a `Format` of the same name. whole: it holds the whole distribution and so serves every
    divergence at any temperature; the others serve forward KL at the temperature they were written at.
    """

    name: str
    title: str
    paper: str
    help: str
    implementation: str
    whole: bool


_CODE = "moe2dense.distillation.targets.formats:"

TARGET_FORMATS: dict[str, TargetFormat] = {
    row.name: row
    for row in (
        TargetFormat(
            name="hidden",
            title="final hidden states",
            paper="",
            help="2 bytes a number, with the teacher's head once; exact up to rounding, and holds features too (default)",
            implementation=_CODE + "HiddenFormat",
            whole=True,
        ),
        TargetFormat(
            name="sampled",
            title="tokens drawn with replacement",
            paper="Sparse Logit Sampling, arXiv 2503.16870",
            help="3 bytes a distinct token of 50 draws; unbiased for forward KL, the smallest",
            implementation=_CODE + "SampledFormat",
            whole=False,
        ),
        TargetFormat(
            name="topk",
            title="the k likeliest tokens",
            paper="",
            help="4 bytes a token, the rest of the mass as one bucket; forward KL",
            implementation=_CODE + "TopKFormat",
            whole=False,
        ),
        TargetFormat(
            name="full",
            title="every log-probability",
            paper="",
            help="2 bytes a token of the vocabulary; the largest",
            implementation=_CODE + "FullFormat",
            whole=True,
        ),
    )
}
