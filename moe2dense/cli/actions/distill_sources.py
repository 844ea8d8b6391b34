"""What a student is distilled on: a teacher, its stored targets, or only what it wrote, here or on a server."""

from dataclasses import dataclass, replace

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from moe2dense.cli.actions.common import open_teacher, print_skipped
from moe2dense.cli.actions.distill_request import DistillRequest
from moe2dense.common.progress import Report
from moe2dense.config.training import TrainConfig
from moe2dense.conversion.text_options import text_options_for
from moe2dense.data.blocks import Blocks
from moe2dense.data.counts import TextCounts
from moe2dense.data.load import load_blocks
from moe2dense.data.options import TextOptions
from moe2dense.data.vocabulary import compare_vocabularies
from moe2dense.distillation.targets.cross_tokenizer import cross_targets
from moe2dense.distillation.targets.protocols import Targets
from moe2dense.distillation.targets.store import open_targets
from moe2dense.evaluation.reference import Reference, reference
from moe2dense.exporting.tokenizer import load_tokenizer
from moe2dense.generation.completions import answer_blocks, ask_endpoint, read_completions
from moe2dense.generation.dataset import write_text
from moe2dense.generation.endpoint import Endpoint
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
    if request.endpoint is not None:
        return _from_endpoint(setting)
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
    if request.targets is not None:
        return _from_store(setting, train)
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
    endpoint = Endpoint(request.endpoint, request.endpoint_model, longest, write.temperature, write.top_p)
    records = ask_endpoint(
        endpoint, settings.data.path, folder, write, tokenizer, request.tokens, settings.seed, setting.progress, options
    )
    setting.console.print(
        f"{len(records)} answers of {request.endpoint_model!r}, learnt as hard labels (alpha 1); they are kept in {folder}"
    )
    data, answers = answer_blocks(records, tokenizer, setting.block, request.tokens, settings.seed, options)
    return Material(data, _hard_labels(settings.train), answers=answers)


def _from_store(setting: Setting, train: Blocks) -> Material:
    """Blocks with the teacher's stored targets; a part of them is held out."""
    folder, config = setting.request.targets, setting.request.settings.train
    assert folder is not None
    count = len(train) - min(_HELD_OUT, len(train) // 20)
    targets = open_targets(folder, train[:count])
    if count == len(train):
        return Material(train, config, targets=targets)
    valid = train[count:]
    valid_targets = open_targets(folder, valid, verify=False)
    return Material(train[:count], config, targets=targets, valid=valid, valid_targets=valid_targets)


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
    return Material(train, settings.train, teacher=teacher, valid=valid, valid_targets=reference(teacher, valid))


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
