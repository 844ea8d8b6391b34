"""load_teacher: a checkpoint, larger than memory or not, as something that runs layer by layer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe2dense.cards import TeacherCard, read_teacher_card, teacher_cards
from moe2dense.errors import UserError
from moe2dense.losses.head import logit_rules
from moe2dense.resolve import family_card, fetch, resolve_teacher
from moe2dense.teacher import adapter
from moe2dense.teacher.backends import choose_backend
from moe2dense.teacher.capture import Observer
from moe2dense.teacher.checkpoint import Checkpoint
from moe2dense.teacher.coverage import check_coverage, check_quantization
from moe2dense.teacher.head import LMHead
from moe2dense.teacher.layers import Layer, assign
from moe2dense.teacher.memory import Arena, SpillFolder, memory_budget
from moe2dense.teacher.plan import MemoryPlan, plan_memory
from moe2dense.teacher.quantized_experts import BITS
from moe2dense.teacher.resample import Resample, normalizes
from moe2dense.teacher.stream import Stream
from moe2dense.teacher.weights import Weights

_TABLE_ROWS = 4096  # rows of an embedding table read at once


@dataclass
class TeacherOutput:
    """`logits` [N, S, V] (None when not asked for) and `hidden_states` [N, S, H], the final normed ones."""

    logits: Tensor | None
    hidden_states: Tensor


class Teacher:
    """A causal language model that is run layer by layer from its checkpoint. Made by `load_teacher`.

    `card` is None for a dense model, whose layers stream all the same. `ignored` names checkpoint tensors the model has no place for.
    """

    def __init__(
        self,
        path: Path,
        config: Any,
        card: TeacherCard | None,
        memory: str | int,
        experts: str,
        device: str,
        quantize: str = "",
        resample: Resample | None = None,
    ):
        self.path, self.config, self.card, self.quantize, self.resample = path, config, card, quantize, resample
        self.device = pick_device(device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        text = config.get_text_config()
        self.model = adapter.build_skeleton(text, self.dtype)
        self.checkpoint = Checkpoint(path)
        prefix = "" if text is config else _language_prefix(self.checkpoint)
        key_map = adapter.map_keys(self.model, self.checkpoint.tensors, prefix)
        self.ignored = key_map.ignored
        quantization = getattr(config, "quantization_config", None)
        check_quantization(path, quantization)
        self.weights = Weights(self.checkpoint, key_map, self.model, quantization)
        name, self.body = adapter.decoder(self.model)
        self.layers_prefix = f"{name}.layers." if name else "layers."
        self.embedding_name = f"{name}.embed_tokens.weight" if name else "embed_tokens.weight"
        self.hidden_size = int(text.hidden_size)
        self.resident, self.backend = False, "streamed"
        self._layers: dict[int, Layer] = {}
        check_coverage(self)
        self.budget = memory_budget(memory, self.device)
        self.plan: MemoryPlan = plan_memory(self)
        self.resident = self.plan.resident
        self.checkpoint.drop_pages = self.plan.drop_pages
        self.chunk_tokens = self.plan.chunk_tokens
        self.backend = choose_backend(experts, self)
        self._layers.clear()  # they are made again, now that it is known what stays in memory
        self._load_rest()

    def _load_rest(self) -> None:
        """Norms and whatever else lies outside layers, embedding and head stays in memory."""
        for name, value in adapter.saved_tensors(self.model).items():
            if not name.startswith((self.layers_prefix, "lm_head.")) and name != self.embedding_name and value.is_meta:
                assign(self.model, name, self.converted(name))
        for module in self.model.modules():
            for name in module._non_persistent_buffers_set:
                if (value := module._buffers.get(name)) is not None:
                    module._buffers[name] = value.to(self.device)

    def __repr__(self) -> str:
        kind = self.card.title if self.card else "dense"
        return f"Teacher({str(self.path)!r}, {kind}, experts={self.backend!r}, resident={self.resident})"

    # weights

    @cached_property
    def shapes(self) -> dict[str, Tensor]:
        """Parameters and saved buffers by name, without contents."""
        return adapter.saved_tensors(self.model)

    def tensor(self, name: str) -> Tensor:
        """Any parameter or saved buffer by its transformers name, in the compute dtype, read from disk. Raises UserError."""
        if name not in self.shapes:
            raise UserError(f"teacher {self.path}: the model has no parameter {name!r}")
        return self.converted(name)

    def converted(self, name: str) -> Tensor:
        """As `tensor`, in the dtype and on the device the model keeps it in."""
        value, want = self.weights.parameter(name), self.shapes[name]
        if value.shape != want.shape:
            raise UserError(
                f"checkpoint {self.path}: tensor for parameter {name!r} has shape {list(value.shape)}, "
                f"the config says {list(want.shape)}"
            )
        return value.to(self.device, want.dtype)

    def layer(self, index: int) -> Layer:
        """Decoder layer `index`, its weights in memory only while it runs (or for good when the teacher is resident)."""
        if index not in self._layers:
            self._layers[index] = Layer(self, index)
        return self._layers[index]

    @cached_property
    def head(self) -> LMHead:
        """The language model head, read at first use."""
        return self._read_head()

    def _current_head(self) -> LMHead:
        """The head for one use: kept only when the whole teacher stays in memory."""
        return self.head if self.resident else self._read_head()

    def _read_head(self) -> LMHead:
        module: Any = self.model.get_output_embeddings()
        assert module is not None, "a causal language model has a head"
        bias = self.converted("lm_head.bias") if getattr(module, "bias", None) is not None else None
        scale, softcap = logit_rules(self.model.config.get_text_config())
        stored = self.weights.parameter("lm_head.weight").to(self.device)
        return LMHead(stored, bias, scale, softcap, self.dtype)

    def embeddings(self, ids: Tensor, chunks: Sequence[slice]) -> Iterator[Tensor]:
        """Embedded ids [n, S, H] of each chunk of blocks; of the table only the rows in use are kept."""
        used, index = torch.unique(ids, return_inverse=True)
        vocabulary = self.shapes[self.embedding_name].shape[0]
        if len(used) and (used[0] < 0 or used[-1] >= vocabulary):
            raise UserError(
                f"input_ids must lie in [0, {vocabulary}), the teacher's vocabulary; found {int(used[0])} to {int(used[-1])}"
            )
        table = torch.empty(len(used), self.hidden_size, dtype=self.dtype)
        for a in range(0, vocabulary, _TABLE_ROWS):
            lo, hi = (int(torch.searchsorted(used, v)) for v in (a, a + _TABLE_ROWS))
            if lo < hi:
                first, last = int(used[lo]), int(used[hi - 1])
                part = self.weights.rows(self.embedding_name, first, last + 1)
                table[lo:hi] = part[used[lo:hi] - first].to(self.dtype)
        for rows in chunks:
            yield adapter.embed(self.body, table.to(self.device), index[rows].to(self.device))

    def tokenizer(self) -> Any:
        """The tokenizer in the teacher's folder. Raises UserError when there is none."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(str(self.path))
        except Exception as error:  # tokenizers fail in many ways; all mean that none can be used
            raise UserError(f"teacher {self.path} has no tokenizer that can be loaded: {error}") from error

    # running

    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        observers: Sequence[Observer] = (),
    ) -> Stream:
        """Iterate over the layers of all blocks as one macro-batch; `.hidden_states` afterwards. See `LayerPass`.

        input_ids [N, S]; attention_mask [N, S], 0 = padding; document_ids [N, S]: a token sees only its own document.
        """
        mask, positions = masks(self, input_ids, attention_mask, document_ids)
        arena = Arena(self.plan.hidden_bytes, self.device, SpillFolder())
        stream = Stream(self, input_ids, mask, positions, list(observers), arena)
        if attention_mask is not None:
            stream.token_mask = attention_mask.reshape(-1).bool()
        return stream

    @torch.no_grad()
    def run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        observers: Sequence[Observer] = (),
        logits: bool = True,
    ) -> TeacherOutput:
        """Logits and final hidden states of blocks [N, S], in as few macro-batches as the memory budget allows.

        logits=False leaves the logits [N, S, V] out, which may be far larger than the model; `logits` gives them in parts.
        Raises UserError for ids outside the vocabulary, shapes that differ, or documents in a family that cannot keep them apart.
        """
        observers = list(observers)
        n, s = input_ids.shape
        tokens = int(n * s if attention_mask is None else attention_mask.sum())
        for observer in observers:
            observer.begin(self, tokens)
        step = max(1, self.plan.macro_batch // s)
        hidden, scores = torch.empty(n, s, self.hidden_size, dtype=self.dtype), None
        for a in range(0, n, step):
            rows = slice(a, min(a + step, n))
            part = [None if t is None else t[rows] for t in (attention_mask, document_ids)]
            stream = self.stream(input_ids[rows], *part, observers=observers)
            for _ in stream:
                pass
            assert stream.hidden_states is not None
            hidden[rows] = stream.hidden_states.to(hidden.device)
        for observer in observers:
            observer.end()
        if logits:
            scores = self._current_head().logits(hidden).to(hidden.device)
        return TeacherOutput(scores, hidden)

    def logits(self, hidden_states: Tensor, tokens: int = 1024) -> Iterator[tuple[slice, Tensor]]:
        """(rows, logits [n, V]) of final hidden states [.., H], seen as [T, H]: at most `tokens` rows of T at a time.

        All parts use the same memory, so each lasts until the next one is asked for.
        """
        yield from self._current_head().chunks(hidden_states.reshape(-1, hidden_states.shape[-1]), tokens)


def pick_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises UserError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device must be auto, cpu or cuda; found {device!r}") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch finds no CUDA device; use device='cpu' or a torch built for CUDA")
    return found


def masks(
    teacher: Teacher, ids: Tensor, attention_mask: Tensor | None, document_ids: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """(attention mask, position ids) that transformers is given. Documents are told by positions that start again at 0."""
    if ids.ndim != 2 or ids.is_floating_point():
        raise UserError(f"input_ids must be integers of shape [blocks, tokens]; found {ids.dtype} {list(ids.shape)}")
    for name, value in (("attention_mask", attention_mask), ("document_ids", document_ids)):
        if value is not None and value.shape != ids.shape:
            raise UserError(f"{name} must have input_ids' shape {list(ids.shape)}; found {list(value.shape)}")
    real = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if document_ids is None or _one_document(document_ids, real):
        return (None if attention_mask is None else attention_mask.long()), None
    documents = document_ids.clone()
    documents[~real] = documents.min() - 1  # padding becomes a document of its own
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    if teacher.card is not None and not teacher.card.packing:
        raise UserError(
            f"document_ids: {teacher.card.title} carries state across document borders; give one document per block"
        )
    at = torch.arange(ids.shape[1]).expand_as(documents)
    return None, at - torch.where(begins, at, 0).cummax(1).values


def _one_document(documents: Tensor, real: Tensor) -> bool:
    """Whether no block [N, S] holds real tokens of two documents."""
    big = documents.max() + 1
    low = torch.where(real, documents, big).amin(1)
    high = torch.where(real, documents, documents.min() - 1).amax(1)
    return bool((low >= high).all())


def _language_prefix(checkpoint: Checkpoint) -> str:
    """What precedes the language model's tensors in a multimodal checkpoint."""
    for prefix in ("language_model.", "model.language_model."):
        if any(name.startswith(prefix) for name in checkpoint.tensors):
            return prefix
    return ""


def find_card(config: Any, card: TeacherCard | str | Path | None) -> TeacherCard | None:
    """The card of a config's family; None for a dense model. Raises UserError for an MoE family without one."""
    if isinstance(card, TeacherCard):
        return card
    if card:
        return read_teacher_card(card)
    text = config.get_text_config()
    if text.model_type in teacher_cards():
        return teacher_cards()[text.model_type]
    fields = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "moe_intermediate_size")
    return family_card(config) if any(getattr(text, f, None) for f in fields) else None


def number_of_experts(config: Any, card: TeacherCard | None) -> int:
    """How many experts a token uses. Raises UserError where that is not one number."""
    own = getattr(config.get_text_config(), card.top_k, None) if card else None
    if not isinstance(own, int):
        raise UserError(
            "teacher.top_k and teacher.draws need a teacher with one number of experts per token; leave them out"
        )
    return own


def widen_routing(config: Any, card: TeacherCard | None, top_k: int) -> None:
    """Let every token use `top_k` experts. Raises UserError for a number the model cannot do."""
    number_of_experts(config, card)
    text = config.get_text_config()
    assert card is not None
    if not 1 <= top_k <= getattr(text, card.num_experts):
        raise UserError(
            f"teacher.top_k must lie between 1 and the teacher's {getattr(text, card.num_experts)} experts; found {top_k}"
        )
    setattr(text, card.top_k, top_k)


def check_quantize(quantize: str, card: TeacherCard | None, experts: str) -> str:
    """The expert backend of a teacher that is rounded as it is read: only `streamed` reads experts one by one. Raises UserError."""
    if not quantize:
        return experts
    if quantize not in BITS:
        raise UserError(f"teacher.quantize must be one of {', '.join(BITS)}; found {quantize!r}")
    if card is None or experts not in ("auto", "streamed"):
        what = "a model without experts" if card is None else f"experts={experts!r}"
        raise UserError(f"teacher.quantize rounds experts as they are read, which {what} cannot do; leave it out")
    return "streamed"


def load_teacher(
    path: str | Path,
    memory: str | int = "auto",
    experts: str = "auto",
    device: str = "auto",
    card: TeacherCard | str | Path | None = None,
    quantize: str = "",
    top_k: int = 0,
    draw: int | None = None,
    seed: int = 0,
) -> Teacher:
    """A teacher from a folder in hub layout, a hub id, or a known name.

    memory: budget for weights and hidden states, such as "2GB"; auto = half of what is free.
    experts: auto | streamed | grouped_mm | megablocks. device: auto | cpu | cuda.
    card: the family's card, for a family that is not shipped; a model without experts needs none and has `.card` None.
    quantize: int8 | int4 | nf4 rounds every expert as it is read (simulated: nothing gets smaller); top_k: experts per token, in the
    place of the checkpoint's own number; draw: draw that many from the router's distribution, each number another time (`seed`).
    Raises UserError naming file and tensor when the checkpoint is incomplete or damaged.
    """
    folder = Path(path)
    if not folder.exists():
        folder = fetch(resolve_teacher(str(path), str(card) if isinstance(card, (str, Path)) else ""))
    if not (folder / "config.json").is_file():
        raise UserError(
            f"teacher {folder} has no config.json; give the folder of a checkpoint as transformers saves it"
        )
    config = adapter.read_config(str(folder))
    found = find_card(config, card)
    backend, resample = check_quantize(quantize, found, experts), None
    if draw is not None:
        own = number_of_experts(config, found)
        plain = Teacher(folder, adapter.read_config(str(folder)), found, memory, "streamed", device)
        resample = Resample(top_k or own, normalizes(plain), draw, seed)
    if top_k:
        widen_routing(config, found, top_k)
    if resample is not None:
        widen_routing(config, found, getattr(config.get_text_config(), found.num_experts if found else ""))
    return Teacher(folder, config, found, memory, backend, device, quantize, resample)
