"""What a student is distilled on: a teacher, its stored targets, or only what it wrote, here or on a server."""

from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from moe2dense.cli.actions.common import open_teacher, print_skipped
from moe2dense.cli.actions.distill_request import DistillRequest
from moe2dense.cli.actions.served_targets import server_of
from moe2dense.common.progress import Report
from moe2dense.common.units import parse_bytes
from moe2dense.config.training import TrainConfig
from moe2dense.conversion.text_options import text_options_for
from moe2dense.data.blocks import Blocks
from moe2dense.data.counts import TextCounts
from moe2dense.data.load import load_blocks
from moe2dense.data.options import TextOptions
from moe2dense.data.vocabulary import compare_vocabularies
from moe2dense.distillation.auto_features import settle_features
from moe2dense.distillation.regimes.checks import brings_targets
from moe2dense.distillation.regimes.registry import writes_text
from moe2dense.distillation.targets.captured.rows import is_captured
from moe2dense.distillation.targets.captured.targets import captured_text, open_captured
from moe2dense.distillation.targets.cross_tokenizer import cross_targets
from moe2dense.distillation.targets.formats import StoreOptions
from moe2dense.distillation.targets.protocols import Targets
from moe2dense.distillation.targets.rolling import Order, RollingTargets, rolling_targets
from moe2dense.distillation.targets.served.server import TeacherServer
from moe2dense.distillation.targets.served.write import write_served_targets
from moe2dense.distillation.targets.store import open_targets, targets_room
from moe2dense.errors import UserError
from moe2dense.evaluation.reference import Reference, reference
from moe2dense.exporting.tokenizer import load_tokenizer
from moe2dense.generation.completions import answer_blocks, ask_endpoint, read_completions
from moe2dense.generation.dataset import write_text
from moe2dense.generation.endpoint import Endpoint
from moe2dense.losses.feature_spec import teacher_features
from moe2dense.modeling.hooks import feature_name
from moe2dense.student.types import Student
from moe2dense.teacher.model import Teacher

_HELD_OUT = 96  # blocks, at most
_LONGEST_BLOCK = 2048


@dataclass(frozen=True)
class Material:
    """What `distill` reads, and its settings."""

    data: Blocks
    train: TrainConfig
    teacher: Teacher | None = None
    targets: Targets | None = None
    valid: Blocks | None = None
    valid_targets: Targets | Reference | None = None
    answers: Blocks | None = None  # held-out answers, where only answers are known
    server: TeacherServer | None = None  # that runs the teacher and gives log-probabilities


@dataclass(frozen=True)
class Setting:
    """The request, the opened student and whom to tell about it."""

    request: DistillRequest
    student: Student
    tokenizer_source: str
    console: Console
    progress: Report

    @property
    def block(self) -> int:
        """Tokens per block: --block, else min(2048, the student's max positions)."""
        longest = min(_LONGEST_BLOCK, self.student.model.config.max_position_embeddings)
        return self.request.settings.data.block or longest

    @property
    def text_options(self) -> TextOptions:
        """How text is read: as the settings say, and the folder of the tokenizer."""
        return text_options_for(self.tokenizer_source, self.request.settings.data)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the student's tokenizer."""
        return load_tokenizer(self.tokenizer_source, remedy="save a tokenizer into the student's folder")


def gather(setting: Setting) -> Material:
    """Gather what the request names. Raises UserError for what is missing or does not fit the student."""
    request = setting.request
    if request.completions is not None:
        return _from_completions(setting)
    if request.endpoint is not None and not request.settings.endpoint.k:
        return _from_endpoint(setting)
    if request.targets is not None and is_captured(request.targets):
        return _from_captured(setting, Path(request.targets))
    if not request.settings.data.path:
        raise UserError("--data is missing: the text that the targets were stored for")
    counts = TextCounts()
    train = load_blocks(
        request.settings.data.path,
        setting.tokenizer(),
        setting.block,
        "train",
        tokens=request.tokens,
        seed=request.settings.seed,
        options=setting.text_options,
        counts=counts,
    )
    print_skipped(counts, request.settings.data.path)
    if request.endpoint is not None:
        return _from_served(setting, train)
    if request.targets is not None:
        return _from_store(setting, train, request.targets)
    return _from_teacher(setting, train)


def _hard_labels(train: TrainConfig) -> TrainConfig:
    """Settings for text alone."""
    return replace(train, alpha=1.0, alpha_schedule="", temperature=1.0, temperature_schedule="", features="")


def _from_completions(setting: Setting) -> Material:
    """Blocks of a .jsonl file of completions, and a held-out part."""
    request, console = setting.request, setting.console
    assert request.completions is not None
    records, warning = read_completions(request.completions)
    if warning:
        console.print(f"[yellow]warning:[/] {warning}", highlight=False)
    console.print(f"{len(records)} completions, learnt as hard labels (alpha 1): no teacher distributions are known")
    seed = request.settings.seed
    data, answers = answer_blocks(
        records, setting.tokenizer(), setting.block, request.tokens, seed, setting.text_options
    )
    return Material(data, _hard_labels(request.settings.train), answers=answers)


def _from_endpoint(setting: Setting) -> Material:
    """Blocks of an OpenAI-compatible server's answers to the prompts in --data, and a held-out part."""
    request, settings = setting.request, setting.request.settings
    assert request.endpoint is not None
    write, folder, tokenizer = settings.write, request.out / "answers", setting.tokenizer()
    options = setting.text_options
    longest = write.new_tokens or max(1, setting.block - write.prompt_tokens)
    endpoint = Endpoint(request.endpoint, request.settings.endpoint.model, longest, write.temperature, write.top_p)
    records = ask_endpoint(
        endpoint, settings.data.path, folder, write, tokenizer, request.tokens, settings.seed, setting.progress, options
    )
    setting.console.print(
        f"{len(records)} answers of {request.settings.endpoint.model!r}, learnt as hard labels (alpha 1); they are kept in {folder}"
    )
    data, answers = answer_blocks(records, tokenizer, setting.block, request.tokens, settings.seed, options)
    return Material(data, _hard_labels(settings.train), answers=answers)


def _from_store(setting: Setting, train: Blocks, folder: str | Path) -> Material:
    """Blocks with the teacher's stored targets; a part of them is held out."""
    config, tokenizer = setting.request.settings.train, setting.tokenizer()
    count, room = _not_held_out(train), targets_room(config)
    targets = open_targets(folder, train[:count], tokenizer=tokenizer, room=room)
    if count == len(train):
        return Material(train, config, targets=targets)
    valid = train[count:]
    valid_targets = open_targets(folder, valid, verify=False, room=room)
    return Material(train[:count], config, targets=targets, valid=valid, valid_targets=valid_targets)


def _from_captured(setting: Setting, folder: Path) -> Material:
    """Rows of a set that others captured, which is its own text; a part of them is held out."""
    request, settings, tokenizer = setting.request, setting.request.settings, setting.tokenizer()
    if settings.data.path and Path(settings.data.path) != folder:
        raise UserError(
            f"--targets {folder} is a captured set, which is its own text; leave out --data {settings.data.path}"
        )
    text = captured_text(folder, setting.block, request.tokens)
    setting.console.print(f"{folder}: captured log-probabilities, {text.sentence()}", highlight=False, markup=False)
    count = _not_held_out(text.blocks)
    targets = open_captured(folder, text.blocks[:count], tokenizer)
    if count == len(text.blocks):
        return Material(text.blocks, settings.train, targets=targets)
    valid = text.blocks[count:]
    return Material(
        text.blocks[:count], settings.train, targets=targets, valid=valid, valid_targets=open_captured(folder, valid)
    )


def _not_held_out(train: Blocks) -> int:
    """Return how many of the blocks are trained on."""
    return len(train) - min(_HELD_OUT, len(train) // 20)


def _from_served(setting: Setting, train: Blocks) -> Material:
    """Blocks with the log-probabilities that a server gives, which are kept in OUT/targets.

    A regime that asks the teacher anew asks the server, and only the held-out part is stored.
    """
    request, settings = setting.request, setting.request.settings
    server = server_of(settings.endpoint, settings.endpoint.k)
    anew = brings_targets(settings.train.regime, settings.regime) or writes_text(settings.train.regime)
    count = _not_held_out(train)
    stored = train[count:] if anew else train
    if len(stored):
        folder = request.out / "targets"
        compared = write_served_targets(server, stored, setting.tokenizer(), folder, setting.progress)
        setting.console.print(
            f"{server.model!r} gives {server.k} log-probabilities of each token, kept in {folder}; {compared}",
            highlight=False,
            markup=False,
        )
        if not anew:
            return replace(_from_store(setting, train, folder), server=server)
        valid_targets = open_targets(folder, stored, verify=False)
        return Material(train[:count], settings.train, valid=stored, valid_targets=valid_targets, server=server)
    return Material(train, settings.train, server=server)


def _from_teacher(setting: Setting, train: Blocks) -> Material:
    """Blocks and the teacher itself; by another way where its tokenizer is not the student's."""
    request, settings = setting.request, setting.request.settings
    options = settings.teacher
    assert request.teacher is not None
    teacher = open_teacher(request.teacher, options)
    compared = compare_vocabularies(teacher.tokenizer(), setting.tokenizer())
    if not compared.same:
        return _across_tokenizers(setting, teacher, train, compared.difference)
    valid = load_blocks(
        settings.data.valid or settings.data.path,
        teacher.tokenizer(),
        setting.block,
        "valid",
        tokens=_HELD_OUT * train.input_ids.shape[1],
        seed=settings.seed,
        spread=True,
        options=setting.text_options,
    )
    held_out = reference(teacher, valid)
    if settings.train.targets_disk:
        config, targets = _rolling(setting, teacher, train)
        if targets is not None:
            return Material(train, config, targets=targets, valid=valid, valid_targets=held_out)
    return Material(train, settings.train, teacher=teacher, valid=valid, valid_targets=held_out)


def _rolling(setting: Setting, teacher: Teacher, train: Blocks) -> tuple[TrainConfig, RollingTargets | None]:
    """Return settings with their features settled, and targets that take no more than --targets-disk; None where all fit."""
    settings, student = setting.request.settings, setting.student
    config = settle_features(settings.train, student, None, teacher, None)
    layers = (m.get_text_config().num_hidden_layers for m in (student.model.config, teacher.config))
    features = tuple(feature_name(f) for f in teacher_features(config.features, *layers))
    order = Order(len(train), max(1, config.batch // setting.block), config.epochs, settings.seed)
    options = StoreOptions(config.target_format, float(config.temperature), seed=settings.seed, features=features)
    room = parse_bytes(config.targets_disk, "--targets-disk")
    return config, rolling_targets(
        teacher, train, setting.request.out / "targets", room, order, options, setting.progress
    )


def _across_tokenizers(setting: Setting, teacher: Teacher, train: Blocks, difference: str) -> Material:
    """A teacher with another tokenizer, said so: text that it writes, or its distributions matched up.

    train: the blocks of the same data in the student's tokenizer, for their number.
    """
    request, settings, tokenizer = setting.request, setting.request.settings, setting.tokenizer()
    explanation = f"the teacher's tokenizer is not the student's: {difference}"
    block, tokens, seed = train.input_ids.shape[1], train.tokens, settings.seed
    mode = request.cross_tokenizer
    if mode != "text":
        setting.console.print(f"{explanation}; its distributions are matched by {mode}", highlight=False)
        blocks, targets = cross_targets(teacher, tokenizer, settings.data.path, block, tokens, mode, seed)
        return Material(blocks, settings.train, targets=targets)
    setting.console.print(
        f"{explanation}; so it writes text and the student learns that as hard labels (alpha 1). --cross-tokenizer uld or "
        "aligned would use its distributions",
        highlight=False,
    )
    longest = min(block, getattr(teacher.config.get_text_config(), "max_position_embeddings", block))
    folder = request.out / "written"
    write_text(
        teacher, folder, settings.data.path, settings.write, tokens, block=longest, seed=seed, progress=setting.progress,
        options=text_options_for(teacher.path, settings.data),
    )  # fmt: skip
    data = load_blocks(folder, tokenizer, block, "train", tokens, seed, options=setting.text_options)
    return Material(data, _hard_labels(settings.train))
