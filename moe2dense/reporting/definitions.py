"""The exact meaning of every number about an expert: one table for the page, its tooltips, the terminal and the docs.

What they are worth, measured on the example teacher's build student (benchmarks/ablation.py, 32 experts): the rise of KL when the
neurons of one expert are silenced has rank correlation +0.78 with coverage, +0.75 with the energy kept and with coverage x energy
share, -0.76 with block error, +0.38 with token KL, and about none with load.
"""

from dataclasses import dataclass

# t tokens, w_te routing weight (0 where not routed), f_e expert, y block output


@dataclass(frozen=True)
class Metric:
    """A per-expert number. good: "high" or "low" where one end is better, "" where it only describes."""

    key: str
    label: str
    good: str
    unit: str  # "%" share of 1, "" plain number, "nats"
    text: str


METRICS: tuple[Metric, ...] = (
    Metric(
        "coverage", "Functional coverage", "high", "%",
        "How well a ridge regression predicts the expert's output f_e(x) from the trained student's FFN activations, on held-out "
        "tokens routed to the expert, by relative error per token. 0 % is what a random FFN of the same width reaches, 100 % what "
        "an FFN that holds the whole expert reaches; below 0 % the student's neurons say less than random ones.",
    ),
    Metric(
        "error_after", "Block error, after training", "low", "",
        "On the tokens routed to the expert: squared distance between the student's FFN output and the teacher's block output "
        "for the same input, over the squared size of the latter. 0 is exact; 1 is as wrong as no output at all.",
    ),
    Metric("error_before", "Block error, before training", "low", "", "The same for the student as it was built."),
    Metric(
        "cosine_after", "Block cosine, after training", "high", "",
        "Mean cosine between the student's FFN output and the teacher's block output on the tokens routed to the expert.",
    ),
    Metric("cosine_before", "Block cosine, before training", "high", "", "The same for the student as it was built."),
    Metric(
        "kl_after", "Token KL, after training", "low", "nats",
        "Mean KL(teacher || student) of the next-token prediction at the tokens routed to the expert.",
    ),
    Metric("kl_before", "Token KL, before training", "low", "nats", "The same for the student as it was built."),
    Metric(
        "kept_energy", "Energy kept", "high", "%",
        "Share of the expert's neuron energy, sum over tokens of (w_te h_j)^2 |d_j|^2, whose neurons the student was built from.",
    ),
    Metric("kept_neurons", "Neurons kept", "high", "%", "Share of the expert's neurons the student was built from, whole."),
    Metric("load", "Load", "", "%", "Share of the held-out tokens that are routed to the expert."),
    Metric("mean_weight", "Mean weight", "", "", "Mean routing weight on the tokens routed to the expert."),
    Metric("alpha", "Alpha", "", "", "Mean routing weight over all tokens, 0 where not routed: the expert's magnitude in the block."),
    Metric(
        "energy_share", "Share of output energy", "", "%",
        "Sum over tokens of |w_te f_e(x)|^2, as a share of the same summed over every expert of the layer, shared ones included.",
    ),
    Metric(
        "replaceability", "Replaceability", "", "",
        "Highest mean cosine between this expert's output and another expert's, on tokens routed to this one. 1: a duplicate.",
    ),
    Metric(
        "lift", "Domain lift", "", "x",
        "How many times more often than chance the expert's favourite domain is among its tokens: share among its tokens over "
        "share among all tokens.",
    ),
)  # fmt: skip

BY_KEY = {m.key: m for m in METRICS}

QUALITY: dict[str, str] = {
    "kl": "KL(teacher || student) of the next-token distribution, in nats per token. 0 is a perfect copy.",
    "nll": "Negative log-likelihood of the text, in nats per token.",
    "perplexity": "exp of the negative log-likelihood.",
    "agreement": "Share of tokens where student and teacher have the same first choice.",
    "top5": "Share of tokens where the teacher's first choice is among the student's five.",
    "correlation": "Pearson correlation, over tokens, of the probabilities teacher and student give the true next token.",
    "ece": "Expected calibration error of the first choice against the text, 15 equal bins.",
    "entropy_gap": "Entropy of the student's distribution minus the teacher's, in nats.",
    "rare_kl": "KL on the tenth of the tokens that are rarest in the training text.",
    "retention": "Share of the gap between control and teacher that is closed: 1 - KL(student) / KL(control).",
    "reproduced": "1 - block error, mean over layers: on the teacher's own inputs, the share of the MoE blocks' squared output that "
    "the student's FFN layers get right. 0 % is no output at all.",
    "transferred": "Functional coverage, cut to 0-100 %, weighted by each expert's share of its layer's output energy.",
    "written_teacher": "Mean NLL, in nats per token, that the teacher gives what was written after the prompts: how likely it finds the text.",
    "written_student": "The same, by the student.",
    "written_judge": "Negative log-likelihood that the judge, a third model that trained nobody here, gives what was written after the "
    "prompts, in nats per UTF-8 byte (its tokens are its own).",
    "written_distinct": "Share of the bigrams of tokens that are distinct within their text: text that repeats itself is likely, and says little.",
    "may_be_lost": "Domains named with --allow-loss. They are reported apart, and the numbers are also given without them.",
}

NAMES: dict[str, str] = {
    "kl": "KL to the teacher", "nll": "NLL of the text", "perplexity": "Perplexity", "agreement": "Same first choice",
    "top5": "Teacher's choice in top 5", "correlation": "Correlation", "ece": "Calibration error", "entropy_gap": "Entropy gap",
    "rare_kl": "Rare-token KL", "retention": "Gap closed", "reproduced": "Block output reproduced",
    "transferred": "Single experts' function", "written_teacher": "NLL by the teacher", "written_student": "NLL by the student",
    "written_judge": "NLL by the judge", "written_distinct": "Distinct bigrams", "may_be_lost": "May be lost",
}  # fmt: skip

ROW_TITLES = {
    "teacher": "Teacher",
    "student": "Student",
    "before": "Student before training",
    "control": "Control: random start, equal tokens",
}


def row_title(name: str) -> str:
    """What a row of scores is called on the page; baselines keep their own name."""
    return ROW_TITLES.get(name, name)


def as_markdown() -> str:
    """Every definition as two Markdown tables, as docs/report.md holds them."""
    groups = [
        ("Of a model", [(NAMES[k], text) for k, text in QUALITY.items()]),
        ("Of an expert", [(m.label, m.text) for m in METRICS]),
    ]
    lines = []
    for title, rows in groups:
        lines += [f"### {title}", "", "| number | meaning |", "|---|---|"]
        lines += [f"| {name} | {text.replace('|', chr(92) + '|')} |" for name, text in rows] + [""]
    return "\n".join(lines).rstrip() + "\n"
