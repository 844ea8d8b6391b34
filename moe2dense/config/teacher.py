"""The options of [teacher]: how it is run, where, and within what memory. No torch, so that `--help` is quick."""

from dataclasses import dataclass

from moe2dense.config.options import option


@dataclass(frozen=True)
class TeacherConfig:
    """How the teacher is run."""

    memory: str = option(
        "auto",
        help="This machine's memory for the teacher's weights and hidden states while it is streamed. Training the student takes what it takes.",
        unit="bytes",
        example="2GB",
        shown="auto: half of the free memory",
    )
    gpu_memory: str = option(
        "auto",
        help="The GPU's memory for the teacher and the building of the student, where there is a GPU. What finds no room there rests in --memory.",
        unit="bytes",
        example="20GB",
        shown="auto: the GPU's free memory but a tenth",
    )
    experts: str = option(
        "auto",
        help="How the experts are computed: one by one from disk (streamed), or together in memory (grouped_mm, megablocks).",
        choices=("auto", "streamed", "grouped_mm", "megablocks"),
        example="streamed",
        shown="auto: grouped_mm where the teacher fits on a GPU, else streamed",
    )
    device: str = option(
        "auto", help="Where to compute: cpu or cuda.", example="cpu", shown="auto: a GPU where there is one"
    )
    card: str = option(
        "",
        help="TOML card of a teacher family that is not shipped.",
        example="my-family.toml",
        shown="the shipped card",
        flag="--teacher-card",
    )
    quantize: str = option(
        "",
        help="Round every expert as it is read, to learn from a quantised teacher. The full teacher still judges the student.",
        choices=("", "int8", "int4", "nf4"),
        example="int4",
        shown="none",
    )
    top_k: int = option(
        0,
        help="Experts a token passes in the teacher that gives the targets.",
        unit="experts",
        example="4",
        shown="the checkpoint's own number",
    )
    draws: int = option(
        0,
        help="Draw the experts from the router's distribution so many times and average the answers.",
        unit="drawings",
        example="4",
        shown="0: the likeliest experts, once",
    )
