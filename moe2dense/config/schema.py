"""Every option of a run: one small frozen dataclass per stage, nested in RunConfig. No torch here, so --help stays quick.

Order of precedence: these defaults < the teacher's card < --config TOML < flags.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class TeacherConfig:
    """How the teacher is run."""

    memory: str = "auto"  # budget for weights and hidden states: "2GB"; auto = half of the free RAM
    experts: str = "auto"  # auto | streamed | grouped_mm | megablocks
    device: str = "auto"
    card: str = ""  # path of a teacher card for a family that is not shipped
    quantize: str = ""  # int8 | int4 | nf4: teach with experts rounded as they are read (simulated); the student is judged by the full teacher
    top_k: int = 0  # experts per token of the teacher that writes the targets; 0 = its own number
    draws: int = 0  # its experts are drawn from the router's distribution; above 1: so many times, the answers averaged; 0 = the likeliest experts


@dataclass(frozen=True)
class DataConfig:
    """What text is used."""

    path: str = ""  # folder with train/valid/test files, one file, or a hub id; "" = the default corpus
    valid: str = ""  # held-out text; "" = the data's own valid split
    ood: str = ""  # out-of-distribution text for the report
    block: int = 0  # tokens per block; 0 = min(2048, the teacher's max positions)
    document_masks: str = "auto"  # auto | on | off: may a token see the document before it in its block
    eval_blocks: int = 96


@dataclass(frozen=True)
class WriteConfig:
    """Text that the teacher writes (moe2dense/generation/)."""

    share: float = 0.0  # of the training text that the teacher writes, continuing passages of the data; 0 = none
    prompt_tokens: int = 32  # of a passage that is given
    new_tokens: int = 0  # that are written after it, at most; 0 = what is left of a block
    temperature: float = 1.0  # 0 = the likeliest token each time
    top_p: float = 1.0
    beams: int = 1  # above 1: beam search, with temperature 0
    learn_prompt: bool = False  # loss on the given beginning too
    min_tokens: int = 8  # fewer written ones are dropped
    nll: str = ""  # LOW:HIGH, the band of the teacher's mean nats per written token that is kept
    duplicates: float = 0.0  # Jaccard similarity of five-word sequences from which a text is dropped; 0 = none is
    same_script: bool = False  # drop texts in another script (alphabet) than their prompt's
    shard: int = 1024  # texts written at once


@dataclass(frozen=True)
class BuildConfig:
    """How the student is built (moe2dense/student/)."""

    init: str = "layerwise"
    fraction: float = 0.1  # share of --tokens used by the build
    max_tokens: int = 200_000
    min_tokens: int = 49_152
    ridge: float = 1e-3  # of the Gram matrix's mean diagonal
    local_steps: int = 0  # of the fit of a layer's FFN; 0 = 600 where a heal follows, 1200 where none does
    local_lr: float = 4e-3
    local_batch: int = 512  # tokens
    layer_steps: int = (
        200  # of the fit of a whole layer, attention and norms too; builds that end with a heal leave it out
    )
    layer_lr: float = 1e-3
    layer_batch: int = 2048  # tokens
    sweeps: int = (
        1  # passes over the layers; each further one fits them again, reading the teacher once more for the same tokens
    )
    heal_epochs: float = 16.0  # passes of the end-to-end fit over the build's own tokens
    heal_lr: float = 1e-3
    heal_batch: int = 2048  # tokens
    heal_hints: float = 10.0  # weight of the teacher's hidden states beside its distributions; 0 = these alone
    hold_out: float = 0.06  # share of the build's blocks kept back to choose the best step of every fit
    gram_tokens: int = 16_384  # tokens of the Gram matrix for choosing neurons; 0 = all
    score: str = "acp"  # of whole experts: frequency | cp | acp | do-acp | reap
    scale: str = "1/K"  # of concatenated experts: 1/K | alpha
    prune: str = "auto"  # what goes when the FFN alone is not enough: auto | width | depth | heads
    depth: str = "influence"  # which layers stay when some go: influence | alternate
    host: str = ""  # student card of another dense host than the family's usual one
    graft: bool = (
        False  # a pretrained dense target gets FFNs of the build where these lower its divergence from the teacher
    )


@dataclass(frozen=True)
class TrainConfig:
    """How the student is distilled (moe2dense/distillation/api.py)."""

    tokens: int = 500_000  # unique teacher positions, the build's included; 0 = build only
    epochs: float = 1.0  # passes over the training positions; replays cost no teacher tokens
    batch: int = 2048  # tokens per optimiser step
    micro_batch: int = 8  # blocks per forward
    lr: float = 0.0  # peak; 0 = by the hidden size: 1e-3 at 192, 1e-4 at 4096, three times that for adapters
    warmup: float = 0.03  # share of the steps
    weight_decay: float = 0.0
    clip: float = 1.0
    loss: str = "forward_kl"
    temperature: float = 1.0
    alpha: float = 0.0  # weight of the hard-label loss; 1 - alpha weighs the distillation loss
    targets: str = ""  # folder of stored targets; "" = computed by the run
    select: str = (
        ""  # divergence:SHARE or coreset:SHARE: train on these blocks of the text only, as many steps as on all
    )
    target_format: str = "hidden"  # hidden | sampled | topk | full
    save_every: int = 50  # steps
    eval_every: int = 50
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    shard: bool = False  # on several processes: spread weights and optimiser over them (FSDP2) instead of copies (DDP)
    alpha_schedule: str = ""  # SHAPE:FROM:TO over the run in alpha's place: constant, linear, cosine or step
    temperature_schedule: str = ""  # a schedule, or auto: chosen by short trainings (needs validation text)
    features: str = "auto"  # KIND:MAP@WEIGHT joined with +: mse, cosine, attention, relation or rkd; uniform, even:K, last:K, 0=1,3=7;
    # auto: hidden states where the student shares the teacher's residual stream; "" = none
    feature_weight: str = "0.1"  # of features without one of their own: a number or a schedule SHAPE:FROM:TO
    token_weights: str = ""  # weigh each token's loss by the teacher's routing: router-entropy | expert-saliency
    lora: int = 0  # rank; 0 = full training
    dora: bool = False  # adapters of direction and magnitude (DoRA)
    report_to: str = "none"
    regime: str = ""  # "" = fixed text; on-policy, policy-gradient, online, mutual, ema, multiview or mtp, whose options are in [regime]

    @property
    def wanted_features(self) -> str:
        """The features that were asked for; "" where they are left to the run."""
        return "" if self.features == "auto" else self.features


@dataclass(frozen=True)
class RegimeConfig:
    """Options of train.regime (moe2dense/regimes/); each regime reads its own."""

    share: str = "0.5"  # on-policy: of the steps on the student's own text; mutual, ema, multiview: of the target that is theirs, the rest is the teacher's. A number or SHAPE:FROM:TO
    rollout_steps: int = 8  # on-policy: steps whose text is written, and scored by the teacher, in one go
    prompt: float = 0.25  # on-policy: share of a block that is given
    sample_temperature: float = 1.0  # on-policy
    top_p: float = 1.0  # on-policy
    generated_only: bool = True  # on-policy: loss on the student's own words alone, not on the prompt
    teacher_mix: float = 0.0  # policy-gradient, which has the options of on-policy too: share of the teacher in what words are drawn from
    ratio_clip: float = 0.2  # policy-gradient: how far a word's probability may move from where it was written; 0 = any
    normalize: bool = True  # policy-gradient: a word earns the mean of the rewards after it, not their sum
    baseline: bool = (
        True  # policy-gradient: ... less what the other texts earn there, which changes nothing in expectation
    )
    peer: str = "obs+refit"  # mutual: how the second student is built, or the folder of a dense checkpoint
    peer_lr: float = 0.0  # online, mutual: peak rate of the model that trains along; 0 = the student's
    decay: float = 0.99  # ema: of the averaged weights, per step
    views: int = 2  # multiview: whose mean prediction is the target
    dropout: float = 0.1  # multiview: of the embeddings, different in every view
    heads: int = 2  # mtp: for the tokens after the next one
    head_weight: str = "0.3"  # mtp: of their loss, a number or SHAPE:FROM:TO
    trunk: str = (
        "0"  # mtp: share of the heads' gradient that reaches the student's own weights, a number or SHAPE:FROM:TO
    )
    keep_heads: bool = False  # mtp: beside the exported model as mtp_heads.safetensors


@dataclass(frozen=True)
class EvaluateConfig:
    """What the report compares with, and what it lets the models write (moe2dense/conversion/report_stage.py)."""

    allow_loss: tuple[str, ...] = ()  # domains the student may lose: reported apart
    baseline: tuple[str, ...] = ()  # dense checkpoints with the teacher's tokenizer, a row each
    judge: str = ""  # a third checkpoint that scores what student and teacher wrote; never the teacher
    samples: int = 4  # held-out prompts that student and teacher continue; 0 = none
    prompt_tokens: int = 32
    sample_tokens: int = 32  # of each continuation
    sample_temperature: float = 0.0  # 0 = the likeliest token each time
    teacher_read: str = "20GB"  # most a teacher that does not fit memory may read from disk to write its continuations


@dataclass(frozen=True)
class ExportConfig:
    """What the deployable checkpoint looks like."""

    dtype: str = "bfloat16"
    format: str = "hf"
    quantize: str = ""
    shard_size: str = "5GB"


@dataclass(frozen=True)
class RunConfig:
    """A whole run: `moe2dense convert TEACHER --to TARGET`, resolved and saved as out/moe2dense.toml."""

    model: str = ""  # the teacher, as given
    to: str = ""
    out: str = ""
    seed: int = 0
    control: bool = False
    stages: str = ""  # sizes on the way, 47%,40%: each stage's student is the next one's teacher; "" = straight to `to`
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    write: WriteConfig = field(default_factory=WriteConfig)
    build: BuildConfig = field(default_factory=BuildConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    regime: RegimeConfig = field(default_factory=RegimeConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)


DEFAULT_CORPUS = "HuggingFaceFW/fineweb-edu"
