"""Turn passages into token ids: plain text with what the tokenizer puts before it, completions and chats with their answers marked."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from moe2dense.data.chat.conversation import conversation_of
from moe2dense.data.chat.samples import ChatSample, chat_samples
from moe2dense.data.chat.template import ChatTemplate
from moe2dense.data.counts import TextCounts, Unusable
from moe2dense.data.options import TextOptions, document_prefix
from moe2dense.errors import UserError

_BATCH = 64  # plain texts that are tokenised at once


@dataclass(frozen=True)
class Document:
    """One document's tokens.

    learnt: which are learnt, None = all of a plain text; calls: which of these belong to tool calls, None = none; prefix: how many stand before the text itself (BOS); work: the record's
    `source`, "" where it names none.
    """

    tokens: Sequence[int]
    learnt: Sequence[bool] | bytes | None
    domain: str = ""
    work: str = ""
    prefix: int = 0
    calls: Sequence[bool] | None = None


class Documents:
    """Makes documents of passages, and counts what becomes of them. block: the length that conversations are cut to."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, block: int | None, options: TextOptions, counts: TextCounts):
        self._tokenizer, self._block, self._options, self._counts = tokenizer, block, options, counts
        self._prefix = document_prefix(tokenizer, options.bos)
        self._template: ChatTemplate | None = None
        self._special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}

    def of(self, passages: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[Document]:
        """Yield the documents of passages, each given with where it stands, in their order."""
        rows = iter(passages)
        while batch := list(islice(rows, _BATCH)):
            plain = [passage["text"] for _, passage in batch if "text" in passage]
            texts = iter(self._plain(plain) if plain else [])
            for where, passage in batch:
                labels = str(passage.get("domain") or ""), str(passage.get("source") or "")
                try:
                    if "text" in passage:
                        ids = [*self._prefix, *next(texts)]
                        documents = [Document(ids, None, *labels, len(self._prefix))]
                    elif "messages" in passage:
                        documents = self._chat(passage, labels)
                    else:
                        documents = [self._completion(passage, labels)]
                except Unusable as reason:
                    self._counts.skip(where, str(reason))
                    continue
                self._counts.used += 1
                yield from documents

    def _plain(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of plain texts, by all of the tokenizer's threads."""
        out = self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
        return out["input_ids"]  # type: ignore[return-value]

    def _chat(self, passage: dict[str, Any], labels: tuple[str, str]) -> list[Document]:
        """Return one document for each sample of a conversation: as its template renders it, BOS included. Raises Unusable."""
        if self._template is None:
            self._template = ChatTemplate(self._tokenizer, self._options)
        chat = conversation_of(passage)
        samples = chat_samples(chat, self._template, self._options.learn, self._block)
        return [
            Document(s.ids, s.learnt, *labels, calls=s.calls if any(s.calls) else None)
            for s in map(self._closed, samples)
            if any(s.learnt)
        ]

    def _closed(self, sample: ChatSample) -> ChatSample:
        """Return a sample; with an end-of-text token that is not learnt, where its last turn has an end of its own.

        Packing closes every document. A model that ends its turn by a token of the template must not learn to write more.
        """
        eos = cast(int, self._tokenizer.eos_token_id)
        if not sample.learnt[-1] or sample.ids[-1] == eos or not self._ends_itself(sample.ids):
            return sample
        return ChatSample([*sample.ids, eos], [*sample.learnt, False], [*sample.calls, False])

    def _ends_itself(self, ids: list[int]) -> bool:
        """Return whether nothing but white space follows the last special token."""
        words = (i for i in reversed(ids) if i in self._special or str(self._tokenizer.decode([i])).strip())
        return next(words, None) in self._special

    def _completion(self, passage: dict[str, Any], labels: tuple[str, str]) -> Document:
        """Return prompt and completion as they follow each other. Raises Unusable where there is no completion."""
        if "completion" not in passage:
            raise Unusable("`prompt` has no `completion`")
        prompt = passage["prompt"]
        try:
            out: Any = self._tokenizer(
                prompt + passage["completion"], add_special_tokens=False, return_offsets_mapping=True
            )
        except NotImplementedError:
            raise UserError(
                "the tokenizer cannot say where its tokens stand in the text, which marks the completion; "
                "give the teacher a tokenizer.json (transformers' fast tokenizer)"
            ) from None
        learnt = [end > len(prompt) for _, end in out["offset_mapping"]]
        size = len(self._prefix)
        return Document([*self._prefix, *out["input_ids"]], [False] * size + learnt, *labels, size)
