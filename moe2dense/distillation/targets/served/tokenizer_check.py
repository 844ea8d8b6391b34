"""Compare a server's tokenizer with ours by content: an id must mean the same token to both, since ids go out and come back."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from moe2dense.common.http import RequestFailed
from moe2dense.distillation.targets.served.server import TeacherServer
from moe2dense.errors import UserError

_PASSAGES = 16  # texts that both cut into tokens
_PASSAGE_TOKENS = 64
_HALF = "\ufffd"  # what a tokenizer writes for bytes that are no whole character
_IDS = 512  # of the vocabulary that go into one request


@dataclass(frozen=True)
class TokenizerComparison:
    """What was compared with the server's tokenizer and was equal: texts that were cut, and ids that were read.

    unanswered: why the server could not be asked; "" where it could.
    """

    texts: int = 0
    ids: int = 0
    unanswered: str = ""

    def sentence(self) -> str:
        """Return the comparison in words."""
        if self.unanswered:
            return f"its tokenizer could not be compared with ours ({self.unanswered})"
        return f"its tokenizer cuts {self.texts} texts as ours does, and reads {self.ids} ids alike"


def compare_tokenizers(
    server: TeacherServer, tokenizer: PreTrainedTokenizerBase, passages: Iterable[Sequence[int]]
) -> TokenizerComparison:
    """Compare how a server and we cut some passages of the text, and what every id means to both.

    passages: token ids of the text. Raises UserError at the first difference. A server without an address for it is no error.
    """
    texts = ids = 0
    try:
        for passage in list(passages)[:_PASSAGES]:
            text = str(tokenizer.decode(list(passage)[:_PASSAGE_TOKENS], skip_special_tokens=True))
            ours = tokenizer(text, add_special_tokens=False)["input_ids"]
            if text and (given := server.protocol.tokenize(server.ask, server.model, text)) != ours:
                raise UserError(_difference(server, f"{text[:40]!r} is {given[:8]} to it and {list(ours)[:8]} to ours"))
            texts += 1
        known = _readable_ids(tokenizer)
        for start in range(0, len(known), _IDS):
            part = known[start : start + _IDS]
            _compare_ids(server, tokenizer, part)
            ids += len(part)
    except RequestFailed as error:
        return TokenizerComparison(texts, ids, str(error))
    return TokenizerComparison(texts, ids)


def _readable_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that stand for whole characters and were not added to the vocabulary: servers show the others in ways of their own."""
    plain = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids) - set(tokenizer.added_tokens_decoder)
    texts = tokenizer.batch_decode([[i] for i in sorted(plain)], clean_up_tokenization_spaces=False)
    return [i for i, text in zip(sorted(plain), texts, strict=True) if _HALF not in text]


def _compare_ids(server: TeacherServer, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> None:
    """Raise UserError naming the first id that means another text to the server."""
    ours = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    given = server.protocol.detokenize(server.ask, server.model, ids)
    if given.strip() == ours.strip():
        return
    for i in ids:
        text = server.protocol.detokenize(server.ask, server.model, [i]).strip()
        if text != (mine := str(tokenizer.decode([i], clean_up_tokenization_spaces=False)).strip()):
            raise UserError(_difference(server, f"id {i} is {text!r} to it and {mine!r} to ours"))


def _difference(server: TeacherServer, what: str) -> str:
    return (
        f"endpoint {server.url} serves {server.model!r} with another tokenizer: {what}; name the folder of the served model's own "
        "tokenizer, or a student that has it"
    )
