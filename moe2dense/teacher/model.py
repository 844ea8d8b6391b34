"""Run a checkpoint layer by layer, whether or not it fits in memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from moe2dense.common.devices import free_bytes
from moe2dense.data.vocabulary import check_vocabulary
from moe2dense.errors import UserError, first_line
from moe2dense.families.cards import TeacherCard
from moe2dense.modeling.attention import use_attention
from moe2dense.modeling.forward import document_positions, one_document
from moe2dense.modeling.shape import check_config
from moe2dense.teacher.backends import ExpertRuntime, choose_backend
from moe2dense.teacher.buffers import Arena, SpillFolder
from moe2dense.teacher.check import check_coverage, check_quantization
from moe2dense.teacher.cost import EXPERT_CACHE, gpu_budget, memory_budget
from moe2dense.teacher.layers import Layer
from moe2dense.teacher.lm_head import LMHead
from moe2dense.teacher.memory import MemoryPlan, plan_memory
from moe2dense.teacher.observer import Observer
from moe2dense.teacher.sampled_routing import Resample
from moe2dense.teacher.skeleton import Skeleton, quantization_of
from moe2dense.teacher.stream import Stream


@dataclass
class TeacherOutput:
    """`logits` [N, S, V] (None when not asked for) and `hidden_states` [N, S, H], the final normed ones."""

    logits: Tensor | None
    hidden_states: Tensor


class Teacher(Skeleton):
    """A causal language model that is run layer by layer from its checkpoint. `load_teacher` opens one."""

    def __init__(
        self,
        path: Path,
        config: PreTrainedConfig,
        card: TeacherCard | None,
        memory: str | int,
        experts: str,
        device: str,
        quantize: str = "",
        resample: Resample | None = None,
        gpu_memory: str | int = "auto",
    ):
        check_quantization(path, quantization_of(config))
        check_config(config, card)
        super().__init__(path, config, card, device, quantize)
        use_attention(self.model, self.device)
        self.resample = resample
        self.layers = [Layer(self, index) for index in range(len(self.body.layers))]
        check_coverage(self, self.layers)
        # bytes of the machine's memory, and of the memory of the device that computes
        self.ram = memory_budget(memory)
        on_gpu = self.device.type == "cuda"
        self.budget = gpu_budget(gpu_memory, free_bytes(self.device)) if on_gpu else self.ram
        self.plan: MemoryPlan = plan_memory(self, self.layers, self.budget, self.ram if on_gpu else 0)
        self.resident = self.plan.resident
        self.checkpoint.drop_pages = self.plan.drop_pages
        self.chunk_tokens = self.plan.chunk_tokens
        self.backend = choose_backend(experts, self, self.layers, self.plan, self.budget)
        if self.resident:
            for layer in self.layers:
                layer.stay_in_memory(keep_experts=self.backend == "streamed")
        self.load_rest()

    def __repr__(self) -> str:
        kind = self.card.title if self.card else "dense"
        return f"Teacher({str(self.path)!r}, {kind}, experts={self.backend!r}, resident={self.resident})"

    # weights

    @property
    def runtime(self) -> ExpertRuntime:
        """Return how the experts of this teacher are computed."""
        return ExpertRuntime(self.backend, self.plan.prefetch_bytes, self.resample)

    def layer(self, index: int) -> Layer:
        """Return decoder layer `index`; its weights are in memory only while it runs, or for good when the teacher is resident."""
        return self.layers[index]

    @cached_property
    def head(self) -> LMHead:
        """The language-model head, read at first use."""
        return self.read_head()

    def _current_head(self) -> LMHead:
        """Return the head for one use; it is kept only when the whole teacher stays in memory."""
        return self.head if self.resident else self.read_head()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer in the teacher's folder.

        Raises UserError when there is none, or it has more tokens than the embedding has rows.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(self.path), trust_remote_code=False)
        except Exception as error:  # tokenizers fail in many ways; all mean that none can be used
            raise UserError(f"teacher {self.path} has no tokenizer that can be loaded: {first_line(error)}") from error
        check_vocabulary(tokenizer, self.config.get_text_config().vocab_size, f"teacher {self.path}: its tokenizer")
        return tokenizer

    # running

    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        observers: Sequence[Observer] = (),
        keep_experts: bool = False,
    ) -> Stream:
        """Return an iterator over the layers of all blocks as one macro-batch; `.hidden_states` afterwards. See `LayerPass`.

        input_ids [N, S]; attention_mask [N, S], 0 = padding; document_ids [N, S]: a token sees only its own document.
        keep_experts: a layer's experts, once read, stay in memory while the layer does, as far as a quarter of the memory
        takes them, so that whoever looks at the layer does not read them again.
        """
        mask, positions = masks(self, input_ids, attention_mask, document_ids)
        arena = Arena(self.plan.hidden_bytes, self.device, SpillFolder(), self.plan.ram_bytes)
        stream = Stream(
            self, self.layers, self.runtime, self.chunk_tokens, input_ids, mask, positions, list(observers), arena,
            self.ram // EXPERT_CACHE if keep_experts and not self.resident else 0,
        )  # fmt: skip
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
        """Compute logits and final hidden states of blocks [N, S], in as few macro-batches as the memory budget allows.

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
        """Yield (rows, logits [n, V]) of final hidden states [.., H], seen as [T, H]: at most `tokens` rows of T at a time.

        All parts use the same memory, so each lasts until the next one is asked for.
        """
        yield from self._current_head().chunks(hidden_states.reshape(-1, hidden_states.shape[-1]), tokens)


def masks(
    skeleton: Skeleton, ids: Tensor, attention_mask: Tensor | None, document_ids: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return (attention mask, position ids) for transformers. A document begins wherever the position is 0 again.

    Raises UserError for shapes that differ, or documents in a family that cannot keep them apart.
    """
    if ids.ndim != 2 or ids.is_floating_point():
        raise UserError(f"input_ids must be integers of shape [blocks, tokens]; found {ids.dtype} {list(ids.shape)}")
    for name, value in (("attention_mask", attention_mask), ("document_ids", document_ids)):
        if value is not None and value.shape != ids.shape:
            raise UserError(f"{name} must have input_ids' shape {list(ids.shape)}; found {list(value.shape)}")
    real = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if document_ids is None or one_document(document_ids, real):
        return (None if attention_mask is None else attention_mask.long()), None
    documents = document_ids.clone()
    documents[~real] = documents.min() - 1  # padding becomes a document of its own
    if skeleton.card is not None and not skeleton.card.packing:
        raise UserError(
            f"document_ids: {skeleton.card.title} carries state across document borders; give one document per block"
        )
    return None, document_positions(documents)
