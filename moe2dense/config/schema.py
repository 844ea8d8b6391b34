"""Every option of a run, described once: one frozen dataclass a stage, nested in RunConfig.

Order of precedence: these defaults < the teacher's card < the checkpoint folder's moe2dense.toml < --config < flags.
Help pages, flags and docs/options.md are made from what stands here. No torch, so that `--help` is quick.
"""

from dataclasses import dataclass, field

from moe2dense.common.units import parse_count
from moe2dense.config.options import option, parse_names
from moe2dense.config.serving import EndpointConfig, ExportConfig
from moe2dense.config.teacher import TeacherConfig
from moe2dense.config.training import RegimeConfig, TrainConfig

DEFAULT_CORPUS = "HuggingFaceFW/fineweb-edu"
ATTENTION = ("auto", "sdpa", "flex")


@dataclass(frozen=True)
class DataConfig:
    """What text is used."""

    path: str = option(
        "",
        help="Text to learn from: a folder with train/valid/test files, one .jsonl, .txt or .parquet file, or a hub id. "
        "Of one file, 90% trains and 5% is held out.",
        example="my-text.jsonl",
        shown=f"what the teacher's folder names, else {DEFAULT_CORPUS}, mixed with chats, code or mathematics by the teacher's name",
        group="Essentials",
        flag="--data",
    )
    valid: str = option(
        "",
        help="Held-out text to choose and judge by. A small file needs one of its own.",
        example="valid.jsonl",
        shown="the valid split of --data",
    )
    ood: str = option(
        "",
        help="Text of another kind, scored apart in the report (out of distribution).",
        example="other.jsonl",
        shown="none, or what the teacher's folder names",
    )
    block: int = option(
        0,
        help="Length of the pieces that text is cut into; no token sees beyond its piece.",
        unit="tokens",
        example="1024",
        shown="min(2048, the teacher's longest)",
    )
    document_masks: str = option(
        "auto",
        help="Whether a token is kept from seeing the document before its own in the same block.",
        choices=("auto", "on", "off"),
        example="on",
        shown="auto: on for chat, off for plain text",
    )
    bos: str = option(
        "auto",
        help="Whether documents begin with the tokenizer's BOS token. Chats are as their template renders them.",
        choices=("auto", "on", "off"),
        example="off",
        shown="auto: on where the tokenizer puts one before every prompt",
    )
    learn: str = option(
        "all",
        help="Which of the assistant's turns in a chat are learnt: all, the last one, or all without their reasoning.",
        choices=("all", "last", "no-reasoning"),
        example="last",
    )
    fit: str = option(
        "cut", help="A chat at a block's end: cut, or whole in the next.", choices=("cut", "whole"), example="whole"
    )
    chat_template: str = option(
        "",
        help="File with a chat template (Jinja) to read conversations with.",
        example="chat.jinja",
        shown="the tokenizer's own",
        flag="--chat-template",
    )
    date: str = option(
        "",
        help="The day that chat templates with a date are told.",
        example="2026-11-28",
        shown="the day the run began",
    )
    eval_blocks: int = option(
        0,
        help="How much held-out text is scored.",
        shown="96, or a quarter of the training text if that is less, but 24 blocks and 24,576 tokens",
        unit="blocks",
        example="32",
    )


@dataclass(frozen=True)
class WriteConfig:
    """Text that the teacher writes for its student."""

    share: float = option(
        0.0,
        help="Share of the training text that the teacher writes, continuing passages of the data.",
        example="0.5",
        shown="0: none",
    )
    extra: float = option(
        -1.0,
        help="What the teacher writes on top of the training text, as a share of it, continuing that text.",
        example="1.5",
        shown="up to 4 where training would pass at most 1M tokens several times and the teacher stays in memory, else none",
    )
    prompt_tokens: int = option(32, help="How much of a passage is given.", unit="tokens", example="64")
    new_tokens: int = option(
        0, help="The most that is written after it.", unit="tokens", example="128", shown="what is left of a block"
    )
    temperature: float = option(1.0, help="How freely words are drawn; 0 takes the likeliest each time.", example="0.8")
    top_p: float = option(
        1.0, help="Draw only among the likeliest tokens that hold this much probability together.", example="0.9"
    )
    beams: int = option(1, help="Beam search with so many beams; needs temperature 0.", unit="beams", example="4")
    learn_prompt: bool = option(False, help="Learn the given beginning too, not only what the teacher wrote.")
    min_tokens: int = option(8, help="Drop texts of fewer written tokens.", unit="tokens", example="16")
    nll: str = option(
        "",
        help="Keep texts whose mean surprise to the teacher lies in this band, LOW:HIGH.",
        unit="nats per token",
        example="2.5:4",
        shown="every text",
    )
    duplicates: float = option(
        0.0,
        help="Drop a text at least this similar to one kept before (Jaccard similarity of five-word sequences).",
        example="0.8",
        shown="0: none is dropped",
    )
    same_script: bool = option(False, help="Drop texts in another alphabet than their prompt's.")
    shard: int = option(1024, help="How many texts are written at once.", unit="texts", example="256")


@dataclass(frozen=True)
class BuildConfig:
    """How the student is built from the teacher, before any training."""

    init: str = option(
        "layerwise",
        help="How the student's weights are made from the experts: METHOD[+refit][+local][+layer][+heal]. "
        "`moe2dense list methods` explains each.",
        example="obs+refit",
    )
    fraction: float = option(0.1, help="Share of --tokens that the build reads.", example="0.2")
    max_tokens: int = option(
        200_000, help="The most that the build reads.", unit="tokens", example="400k", parse=parse_count
    )
    min_tokens: int = option(
        49_152,
        help="The least that the build reads, where --tokens allows; twice as much for students of wide layers.",
        unit="tokens",
        example="100k",
        parse=parse_count,
    )
    ridge: float = option(
        0.0,
        help="Ridge of the least-squares fits, relative to the Gram matrix's mean diagonal. 0 chooses it: for the refit of each "
        "layer on held-out blocks, for the elimination by the tokens there are for each neuron.",
        example="1e-2",
        shown="chosen for each layer",
    )
    local_steps: int = option(
        0,
        help="Steps of the fit of one layer's FFN.",
        shown="600 where a heal follows, else 1200; no more than 14 passes",
        unit="steps",
        example="400",
    )
    local_lr: float = option(
        0.0, help="Peak learning rate of that fit.", example="2e-3", shown="4e-3 up to hidden size 192, 4e-4 at 4096"
    )
    local_batch: int = option(512, help="Batch of that fit.", unit="tokens", example="1024")
    layer_steps: int = option(
        200,
        help="Steps of the fit of a whole layer, attention and norms too. Builds that end with a heal leave it out.",
        unit="steps",
        example="100",
    )
    layer_lr: float = option(
        0.0, help="Peak learning rate of it.", example="5e-4", shown="1e-3 up to hidden size 192, 1e-4 at 4096"
    )
    layer_batch: int = option(2048, help="Batch of the whole layer's fit.", unit="tokens", example="4096")
    sweeps: int = option(
        1,
        help="Passes over the layers. Each further one fits them again and reads the teacher once more for the same text.",
        unit="passes",
        example="2",
    )
    heal_epochs: float = option(
        -1.0,
        help="Length of the end-to-end fit that closes the build (healing), in passes over the build's text. 0 leaves it out.",
        unit="passes",
        example="8",
        shown="4 where training follows, else 16",
    )
    heal_lr: float = option(
        0.0,
        help="Peak learning rate of the heal.",
        example="5e-4",
        shown="1e-3 up to hidden size 192 and 4 layers, 3.5e-5 at 4096 and 32",
    )
    heal_batch: int = option(2048, help="Batch of the heal.", unit="tokens", example="4096")
    heal_hints: float = option(
        10.0, help="Weight of the teacher's hidden states in the heal; 0 leaves them out.", example="1"
    )
    hold_out: float = option(
        0.06, help="Share of the build's blocks kept back to choose the best step of every fit.", example="0.1"
    )
    gram_tokens: int = option(
        16_384,
        help="Tokens of the Gram matrix from which neurons are chosen; 0 takes all.",
        unit="tokens",
        example="32k",
        parse=parse_count,
    )
    score: str = option(
        "acp",
        help="By which score whole experts are chosen (methods concat and cluster).",
        choices=("frequency", "cp", "acp", "do-acp", "reap"),
        example="reap",
    )
    scale: str = option("1/K", help="How concatenated experts are scaled.", choices=("1/K", "alpha"), example="alpha")
    prune: str = option(
        "auto",
        help="What goes when a narrower FFN alone is not enough: channels of the hidden state (width), layers (depth) or attention heads.",
        choices=("auto", "width", "depth", "heads"),
        example="depth",
        shown="auto: whatever keeps most of both",
    )
    depth: str = option(
        "influence",
        help="Which layers stay when some go: those that change the hidden state most, or evenly spaced ones.",
        choices=("influence", "alternate"),
        example="alternate",
    )
    host: str = option(
        "",
        help="Student card of the dense architecture, in place of the family's usual one; see `moe2dense list students`.",
        example="llama",
        shown="the family's usual one",
    )
    graft: bool = option(
        False,
        help="Put the build's FFNs into a pretrained dense --to wherever they bring it closer to the teacher.",
    )


@dataclass(frozen=True)
class EvaluateConfig:
    """What the report compares with, and what it lets the models write."""

    allow_loss: tuple[str, ...] = option(
        (),
        help="Domains of the held-out text that the student may lose; they are reported apart.",
        example="code,drama",
        shown="none",
        parse=parse_names,
    )
    baseline: tuple[str, ...] = option(
        (),
        help="A dense checkpoint with the teacher's tokenizer to compare with; may be given several times.",
        example="dense-sibling/",
        shown="none",
    )
    judge: str = option(
        "",
        help="Folder of a third language model that scores what student and teacher write; never the teacher.",
        example="other-model/",
        shown="none",
    )
    samples: int = option(
        4,
        help="Held-out beginnings that student and teacher continue, side by side; 0 for none.",
        unit="texts",
        example="8",
    )
    prompt_tokens: int = option(32, help="Length of those beginnings.", unit="tokens", example="64")
    sample_tokens: int = option(32, help="Length of the continuations.", unit="tokens", example="64")
    sample_temperature: float = option(
        0.0, help="How freely the continuations are drawn; 0 takes the likeliest token each time.", example="0.7"
    )
    skills: int = option(
        20,
        help="Small exact tasks of each kind (arithmetic, copying, brackets, code, ...) for teacher and students; 0 for none.",
        unit="tasks",
        example="48",
    )
    teacher_read: str = option(
        "20GB",
        help="The most a teacher larger than memory may read from disk to write its continuations.",
        unit="bytes",
        example="50GB",
    )


@dataclass(frozen=True)
class RunConfig:
    """A whole run: `moe2dense convert TEACHER --to TARGET`, resolved and saved as OUT/moe2dense.toml."""

    model: str = option(
        "",
        help="The teacher: folder of a checkpoint, hub id (owner/name), or a known name from `moe2dense list teachers`.",
        example="mixtral",
        shown="none: needed, unless --config names it",
        flag="TEACHER",
    )
    to: str = option(
        "",
        help="Size of the student: a number of parameters (7b), a share of the teacher (25%), a named target, or a dense "
        "checkpoint to start from.",
        example="7b",
        shown="none: needed, unless --config names it",
    )
    out: str = option("", help="Folder of the run.", example="out/first", shown="./TEACHER-TARGET")
    mirror: str = option(
        "",
        help="Object store where the run folder is copied to after every stage and checkpoint, so that --resume can go on elsewhere: "
        "any URL that fsspec opens.",
        example="s3://bucket/run",
        shown="none",
        group="Output",
    )
    seed: int = option(0, help="Seed of everything random.", example="1", group="Training")
    control: bool = option(
        False,
        help="Train a randomly initialised student of the same shape alike, to see what the build is worth. Doubles the time.",
        group="Comparison",
    )
    stages: str = option(
        "",
        help="Sizes on the way, from large to small: each student is the teacher of the next.",
        example="47%,40%",
        shown="straight to --to",
        group="Build",
    )
    attention: str = option(
        "auto",
        help="How teacher and student attend where tokens must not see all before them (packed documents, padding, sliding windows): through "
        "dense masks, whose memory grows with the square of a block's length (sdpa), or through tiles of 128 by 128 tokens (flex).",
        choices=ATTENTION,
        example="flex",
        shown="auto: flex on a GPU for blocks of 1024 tokens and more, where the model can; else sdpa",
        group="Training",
    )
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    data: DataConfig = field(default_factory=DataConfig)
    write: WriteConfig = field(default_factory=WriteConfig)
    build: BuildConfig = field(default_factory=BuildConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    regime: RegimeConfig = field(default_factory=RegimeConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
