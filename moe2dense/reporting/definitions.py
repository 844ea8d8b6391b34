"""The name and the exact meaning of every number in a report. Page, tooltips, terminal and docs/report.md all read these rows.

What the numbers about experts are worth was measured on the example teacher's student before training (benchmarks/ablation.py,
32 experts). The rise of KL when one expert's neurons are silenced has a rank correlation of +0.78 with coverage, +0.75 with the
energy kept and with coverage times energy share, -0.76 with block error, +0.38 with token KL, and about none with load.
"""

from dataclasses import dataclass

# t tokens, w_te routing weight (0 where not routed), f_e expert, y block output


@dataclass(frozen=True)
class Metric:
    """One number: its key in report.json, its name in a narrow column, its title, and what it means.

    good: "high" or "low" where that end is better, "zero" where both signs are bad, "" where the number only describes.
    unit: "%" for a share of 1, "nats", "x" for a factor, "" for a plain number.
    brief: a few words for the line under the terminal's tables.
    """

    key: str
    name: str
    title: str
    good: str
    unit: str
    help: str
    brief: str = ""


MODEL_METRICS: tuple[Metric, ...] = (
    Metric(
        "kl", "KL", "KL to the teacher", "low", "nats",
        "KL(teacher || student) of the next-token distribution, in nats per token. 0 is a perfect copy.",
        "distance to the teacher (0 = a copy)",
    ),
    Metric(
        "rare_kl", "rare KL", "Rare-token KL", "low", "nats",
        "KL on the tenth of the tokens whose ids are rarest in the training text. The same ids are rare in training's validations, in "
        "the report, and in eval of the run.",
        "on the tenth of tokens that is rarest in the training text",
    ),
    Metric(
        "nll", "NLL", "NLL of the text", "low", "nats",
        "Negative log-likelihood of the text, in nats per token.",
        "loss on the text",
    ),
    Metric("perplexity", "ppl", "Perplexity", "low", "", "exp of the negative log-likelihood.", "perplexity"),
    Metric(
        "agreement", "same choice", "Same first choice", "high", "%",
        "Share of tokens where student and teacher have the same first choice.",
        "share of tokens with the teacher's first choice",
    ),
    Metric(
        "top5", "in top 5", "Teacher's choice in top 5", "high", "%",
        "Share of tokens where the teacher's first choice is among the student's five.",
    ),
    Metric(
        "acceptance", "acceptance", "Acceptance as draft", "high", "%",
        "Chance that the teacher accepts a token drawn from the student in speculative decoding at temperature 1: what both "
        "distributions share, 1 - total variation (Leviathan et al., 2211.17192). With four drafts a pass of the teacher then yields "
        "(1 - a^5) / (1 - a) tokens.",
    ),
    Metric(
        "correlation", "correlation", "Correlation", "high", "",
        "Pearson correlation, over tokens, of the probabilities teacher and student give the true next token.",
    ),
    Metric(
        "ece", "ECE", "Calibration error", "low", "",
        "Expected calibration error of the first choice against the text, 15 equal bins.",
        "calibration error",
    ),
    Metric(
        "entropy_gap", "entropy gap", "Entropy gap", "zero", "nats",
        "Entropy of the student's distribution minus the teacher's, in nats.",
    ),
    Metric(
        "retention", "gap closed", "Gap closed", "high", "%",
        "Share of the gap between control and teacher that is closed: 1 - KL(student) / KL(control). The control's FFNs are random; its "
        "attention, norms and embeddings are the teacher's, as the student's are, and it gets the same end-to-end fit, the same "
        "training on the same tokens, and is taken where it is best, as the student is.",
        "1 - KL / KL of the control: random FFNs, trained alike",
    ),
    Metric(
        "reproduced", "reproduced", "Block output reproduced", "high", "%",
        "1 - block error, mean over layers: on the teacher's own inputs, the share of the MoE blocks' squared output that the "
        "student's FFN layers get right. 0% is no output at all.",
    ),
    Metric(
        "transferred", "mean coverage", "Mean coverage of experts", "high", "%",
        "Functional coverage, cut to 0-100%, weighted by each expert's share of its layer's output energy. It says whose neurons the "
        "student has, and does not follow quality: training can raise one and lower the other.",
        "mean of the experts' coverage, by share of output",
    ),
    Metric(
        "written_teacher", "by teacher", "NLL by the teacher", "low", "nats",
        "Mean NLL, in nats per token, that the teacher gives what was written after the prompts: how likely it finds the text.",
    ),
    Metric("written_student", "by student", "NLL by the student", "low", "nats", "The same, by the student."),
    Metric(
        "written_judge", "by judge", "NLL by the judge", "low", "nats",
        "Negative log-likelihood that the judge, a third model that trained nobody here, gives what was written after the "
        "prompts, in nats per UTF-8 byte (its tokens are its own).",
    ),
    Metric(
        "written_distinct", "distinct bigrams", "Distinct bigrams", "high", "%",
        "Share of the bigrams of tokens that are distinct within their text. Text that repeats itself is likely, so a low NLL alone "
        "says little.",
    ),
    Metric(
        "may_be_lost", "may be lost", "May be lost", "", "",
        "Domains named with --allow-loss. They are reported apart, and the numbers are also given without them.",
    ),
)  # fmt: skip

EXPERT_METRICS: tuple[Metric, ...] = (
    Metric(
        "coverage", "coverage", "Functional coverage", "high", "%",
        "How well a ridge regression predicts the expert's output f_e(x) from the trained student's FFN activations, on held-out "
        "tokens routed to the expert, by relative error per token, linear beyond 1. 0% is what a random FFN of the same width reaches, 100% what "
        "an FFN that holds the whole expert reaches; below 0% the student's neurons say less than random ones.",
        "how much of an expert's output the student's neurons predict (0% = as random neurons do)",
    ),
    Metric(
        "error_after", "block error", "Block error, after training", "low", "",
        "On the tokens routed to the expert: squared distance between the student's FFN output and the teacher's block output "
        "for the same input, over the squared size of the latter. 0 is exact; 1 is as wrong as no output at all.",
        "of the student's FFN, before → after training (1 = as no output)",
    ),
    Metric(
        "error_before", "block error before", "Block error, before training", "low", "",
        "The same for the student as it was built.",
    ),
    Metric(
        "cosine_after", "cosine", "Block cosine, after training", "high", "",
        "Mean cosine between the student's FFN output and the teacher's block output on the tokens routed to the expert.",
    ),
    Metric(
        "cosine_before", "cosine before", "Block cosine, before training", "high", "",
        "The same for the student as it was built.",
    ),
    Metric(
        "kl_after", "token KL", "Token KL, after training", "low", "nats",
        "Mean KL(teacher || student) of the next-token prediction at the tokens routed to the expert.",
        "at the expert's tokens",
    ),
    Metric(
        "kl_before", "token KL before", "Token KL, before training", "low", "nats",
        "The same for the student as it was built.",
    ),
    Metric(
        "kept_energy", "energy kept", "Energy kept", "high", "%",
        "Share of the expert's neuron energy, sum over tokens of (w_te h_j)^2 |d_j|^2, whose neurons the student was built from.",
    ),
    Metric(
        "kept_neurons", "neurons kept", "Neurons kept", "high", "%",
        "Share of the expert's neurons the student was built from, whole.",
    ),
    Metric(
        "load", "load", "Load", "", "%",
        "Share of the held-out tokens that are routed to the expert.",
        "share of tokens it gets",
    ),
    Metric("mean_weight", "mean weight", "Mean weight", "", "", "Mean routing weight on the tokens routed to the expert."),
    Metric(
        "alpha", "alpha", "Alpha", "", "",
        "Mean routing weight over all tokens, 0 where not routed: the expert's magnitude in the block.",
    ),
    Metric(
        "energy_share", "energy", "Share of output energy", "", "%",
        "Sum over tokens of |w_te f_e(x)|^2, as a share of the same summed over every expert of the layer, shared ones included.",
    ),
    Metric(
        "replaceability", "replaceability", "Replaceability", "", "",
        "Highest mean cosine between this expert's output and another expert's, on tokens routed to this one. 1: a duplicate.",
    ),
    Metric(
        "lift", "domain lift", "Domain lift", "", "x",
        "How many times more often than chance the expert's favourite domain is among its tokens: share among its tokens over "
        "share among all tokens.",
    ),
)  # fmt: skip

MODEL = {metric.key: metric for metric in MODEL_METRICS}
EXPERT = {metric.key: metric for metric in EXPERT_METRICS}

# the numbers of one row of scores, in the order in which tables show them
SCORE_KEYS = (
    "kl",
    "rare_kl",
    "nll",
    "perplexity",
    "agreement",
    "top5",
    "acceptance",
    "correlation",
    "ece",
    "entropy_gap",
)

NEURONS_TITLE = "Neurons"  # heading over an expert's provenance word
NEURONS_HELP = (
    "What the student was built from. kept: at least 90% of the expert's neuron energy, or all its neurons. partly kept: less. "
    "dropped: no neuron, or under 1% of the energy. merged: most neurons of the layer are averages of several."
)
NEURONS_BRIEF = "whether the student was built from those of the expert"

ROW_TITLES = {
    "teacher": "Teacher",
    "student": "Student",
    "before": "Student before training",
    "last": "Student after the last training step",
    "control": "Control: random FFNs, trained alike",
}


def row_title(name: str) -> str:
    """Return what a row of scores is called on the page; baselines keep their own name."""
    return ROW_TITLES.get(name, name)


def definitions_as_markdown() -> str:
    """Return every definition as two Markdown tables, as docs/report.md holds them."""
    groups = [("Of a model", MODEL_METRICS), ("Of an expert", EXPERT_METRICS)]
    lines = []
    for title, metrics in groups:
        lines += [f"### {title}", "", "| number | meaning |", "|---|---|"]
        lines += [f"| {m.title} | {m.help.replace('|', chr(92) + '|')} |" for m in metrics] + [""]
    return "\n".join(lines).rstrip() + "\n"
