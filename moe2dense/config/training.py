"""The options of distillation, [train] and [regime], described once."""

from dataclasses import dataclass

from moe2dense.common.units import parse_count
from moe2dense.config.options import option

# what features by rule are where they fit: four hidden states of the teacher, see distillation/auto_features.py
AUTO_FEATURES = {"auto": "mse:even:4@10", "auto-falling": "mse:even:4@linear:10:0"}
OPTIMIZERS = ("auto", "adamw", "muon", "adamw-8bit", "adafactor")
WEIGHTS = ("float32", "bfloat16")


@dataclass(frozen=True)
class TrainConfig:
    """How the student is distilled."""

    tokens: int = option(
        500_000,
        help="How much text the teacher reads, each token once; the build reads the first part of it. 0 stops after the build. "
        "More is better: the default is for a first look, 1b for quality.",
        unit="tokens",
        example="20m",
        group="Essentials",
        parse=parse_count,
    )
    epochs: float = option(
        0.0,
        help="Passes over the training text. Repeats read no teacher.",
        unit="passes",
        example="3",
        shown="1 to 5, by the tokens for each of the student's parameters",
    )
    batch: int = option(2048, help="Batch of one optimiser step.", unit="tokens", example="8192")
    micro_batch: int = option(8, help="How much of a batch passes the student at once.", unit="blocks", example="2")
    lr: float = option(
        0.0,
        help="Peak learning rate.",
        example="2e-4",
        shown="1e-3 up to hidden size 192 and 4 layers, 1e-4 at 4096 and 32; three times that for --lora",
    )
    optimizer: str = option(
        "auto",
        help="What makes the steps: adamw, muon for the matrices inside the layers and AdamW for the rest, AdamW with moments in eight bits, or "
        "Adafactor, whose moments take almost nothing. Adapters and sharded students take AdamW.",
        choices=OPTIMIZERS,
        example="adamw",
        shown="auto: muon where the batch is at least three times the hidden size",
    )
    warmup: float = option(0.03, help="Share of the steps in which the learning rate rises.", example="0.1")
    cooldown: float = option(
        0.0,
        help="Keep the learning rate at its peak and let it fall over this last share of the steps (warmup, stable, decay), so that a run can "
        "be made longer from before its fall.",
        example="0.2",
        shown="0: a cosine from the warmup to the end",
    )
    weight_decay: float = option(0.0, help="Decoupled weight decay of AdamW.", example="0.1")
    clip: float = option(1.0, help="Largest norm of the gradient; longer ones are scaled down.", example="0.5")
    loss: str = option(
        "forward_kl", help="Distillation loss; `moe2dense list losses` explains each.", example="jsd:0.3"
    )
    temperature: float = option(
        1.0,
        help="Softens both distributions; the loss is multiplied by its square. `auto` chooses it by short trainings.",
        example="2",
    )
    alpha: float = option(
        0.0,
        help="Weight of the text's own next token (hard labels); 1 - alpha weighs the teacher. Some papers mean the opposite.",
        example="0.1",
    )
    targets: str = option(
        "",
        help="Folder or URL of targets stored by `moe2dense targets`, or folder of log-probabilities that DistillKit captured, which are "
        "their own text.",
        example="targets/",
        shown="computed by the run",
    )
    targets_disk: str = option(
        "",
        help="The most disk that the teacher's targets take. Where the text's take more, the teacher answers a part of it, the "
        "student trains on that, and it is dropped. 0 stores none: a teacher in memory answers while the student trains. Of targets at a "
        "URL: the most that is copied here, the others are read there each time.",
        unit="bytes",
        example="200GB",
        shown="as much as the text takes",
    )
    select: str = option(
        "",
        help="Train on the most useful blocks only: divergence:SHARE or coreset:SHARE; as many steps as on all.",
        example="divergence:0.5",
        shown="all of the text",
    )
    target_format: str = option(
        "hidden",
        help="What is stored of the teacher: its hidden states, or a sampled, top-k or full distribution.",
        choices=("hidden", "sampled", "topk", "full"),
        example="sampled",
    )
    save_every: int = option(50, help="How often a checkpoint is written.", unit="steps", example="200")
    eval_every: int = option(50, help="How often held-out text is scored.", unit="steps", example="200")
    weights: str = option(
        "float32",
        help="Precision in which the weights rest while they train; steps on bfloat16 are rounded at random, so that small ones add up.",
        choices=WEIGHTS,
        example="bfloat16",
    )
    step_in_backward: bool = option(
        False,
        help="Step each tensor as soon as its gradient is there, and free that; clipping then goes by the norm of the step before.",
    )
    offload: bool = option(
        False,
        help="Keep the optimiser's states and a float32 copy of the weights in main memory, and step there: slower.",
    )
    fit_memory: bool = option(
        True,
        help="Where training does not fit the device, change the settings of its memory, the least harmful first, until it does. "
        "`moe2dense plan` says what.",
    )
    compile: bool = option(
        False,
        help="Compile the decoder layers (torch.compile): a minute at the start, then faster steps on a GPU. Numbers differ in the last digits.",
    )
    gradient_checkpointing: bool = option(
        False, help="Compute activations again in the backward pass: less memory, a third more time."
    )
    shard: bool = option(
        False,
        help="On several processes, spread weights and optimiser over them (FSDP2) instead of keeping copies (DDP).",
    )
    alpha_schedule: str = option(
        "",
        help="Let alpha change over the run: SHAPE:FROM:TO with constant, linear, cosine or step.",
        example="linear:0.5:0",
        shown="constant alpha",
    )
    temperature_schedule: str = option(
        "",
        help="Let the temperature change over the run, or `auto` to choose one by short trainings.",
        example="linear:4:1",
        shown="constant temperature",
    )
    features: str = option(
        "auto",
        help="What of the teacher's layers is matched too: KIND:LAYERS@WEIGHT joined with +; KIND is mse, cosine, attention, "
        "relation or rkd, LAYERS uniform, even:K, last:K or 0=1,3=7. Empty for none. auto-falling is auto with a weight that falls to 0.",
        example="mse:uniform@0.1",
        shown="auto: hidden states where student and teacher share a residual stream; auto-falling where the teacher writes text on top",
    )
    feature_weight: str = option(
        "0.1", help="Weight of features without one of their own: a number or SHAPE:FROM:TO.", example="linear:1:0"
    )
    token_weights: str = option(
        "",
        help="Weigh each token by how the teacher routed it: router-entropy or expert-saliency.",
        example="router-entropy",
        shown="all tokens alike",
    )
    call_weight: float = option(
        1.0,
        help="Weight of the tokens of tool calls in the loss against the teacher, where others weigh 1.",
        example="3",
    )
    lora: int = option(
        0,
        help="Train low-rank adapters of this rank instead of all weights.",
        unit="rank",
        example="64",
        shown="0: all weights",
    )
    dora: bool = option(False, help="Adapters of direction and magnitude (DoRA); needs --lora.")
    report_to: str = option(
        "none",
        help="Where progress is logged beside metrics.jsonl: none, tensorboard, trackio or wandb.",
        example="tensorboard",
    )
    regime: str = option(
        "",
        help="Who learns what from whom: on-policy, policy-gradient, online, mutual, ema, multiview or mtp; "
        "options in [regime].",
        example="on-policy",
        shown="the teacher's distributions on fixed text",
    )

    @property
    def wanted_features(self) -> str:
        """The features that were asked for; "" where they are left to the run."""
        return "" if self.features in AUTO_FEATURES else self.features


@dataclass(frozen=True)
class RegimeConfig:
    """Options of train.regime; each regime reads its own."""

    share: str = option(
        "0.5",
        help="on-policy: share of the steps on the student's own text. mutual, ema, multiview: their share of the target, the "
        "rest is the teacher's. A number or SHAPE:FROM:TO.",
        example="linear:0:1",
    )
    rollout_steps: int = option(
        8, help="on-policy: steps whose text is written and scored in one go.", unit="steps", example="4"
    )
    prompt: float = option(0.25, help="on-policy: share of a block that is given.", example="0.5")
    sample_temperature: float = option(1.0, help="on-policy: how freely the student draws.", example="0.8")
    top_p: float = option(
        1.0, help="on-policy: draw among the likeliest tokens that hold this much probability.", example="0.9"
    )
    generated_only: bool = option(
        True, help="on-policy: learn from the student's own words alone, not from the prompt."
    )
    teacher_mix: float = option(
        0.0, help="policy-gradient: share of the teacher in what words are drawn from.", example="0.2"
    )
    ratio_clip: float = option(
        0.2,
        help="policy-gradient: how far a word's probability may move from where it was written; 0 for any.",
        example="0.1",
    )
    normalize: bool = option(
        True, help="policy-gradient: a word earns the mean of the rewards after it, not their sum."
    )
    baseline: bool = option(
        True, help="policy-gradient: less what the other texts earn there, which changes nothing in expectation."
    )
    peer: str = option(
        "obs+refit",
        help="mutual: how the second student is built, or the folder of a dense checkpoint.",
        example="select+refit",
    )
    peer_lr: float = option(
        0.0,
        help="online, mutual: peak learning rate of the model that trains along.",
        example="1e-4",
        shown="the student's",
    )
    decay: float = option(0.99, help="ema: decay of the averaged weights, per step.", example="0.999")
    views: int = option(2, help="multiview: views whose mean prediction is the target.", unit="views", example="4")
    dropout: float = option(0.1, help="multiview: dropout of the embeddings, different in every view.", example="0.2")
    heads: int = option(2, help="mtp: heads for the tokens after the next one.", unit="heads", example="3")
    head_weight: str = option("0.3", help="mtp: weight of their loss, a number or SHAPE:FROM:TO.", example="0.1")
    trunk: str = option(
        "0",
        help="mtp: share of the heads' gradient that reaches the student's own weights, a number or SHAPE:FROM:TO.",
        example="0.5",
    )
    keep_heads: bool = option(False, help="mtp: keep the heads beside the exported model, as mtp_heads.safetensors.")
