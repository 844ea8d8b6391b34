"""Compare two tokenizers by their contents: equal sizes prove nothing, and padded ones may differ in size."""

from dataclasses import dataclass

import xxhash
from transformers import PreTrainedTokenizerBase

from moe2dense.errors import UserError


@dataclass(frozen=True)
class Comparison:
    """Whether two tokenizers mean the same by an id.

    same: every id that both know is the same token; shared: how many ids that is; difference: one sentence when not the same.
    """

    same: bool
    shared: int
    difference: str = ""


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, what: str) -> None:
    """Refuse a tokenizer with an id that the embedding of `rows` rows has no place for. Raises UserError. what: how the error calls it."""
    token, last = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if last < rows:
        return
    raise UserError(
        f"{what} has {last + 1} tokens, the model's vocabulary {rows}: {token!r} (id {last}) has no row in the embedding; take what was "
        f"added to the tokenizer out again (added_tokens in tokenizer.json), or enlarge the model with "
        f"model.resize_token_embeddings({last + 1}) and save it"
    )


def compare_vocabularies(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> Comparison:
    """Compare two tokenizers token by token.

    A few special tokens at the end of one of them make no difference, nor does the padding of embeddings (Qwen's 151936 and 152064 rows), which no tokenizer has tokens for.
    """
    a, b = ({i: t for t, i in tokenizer.get_vocab().items()} for tokenizer in (teacher, student))
    shared = a.keys() & b.keys()
    clash = min((i for i in shared if a[i] != b[i]), default=None)
    if clash is not None:
        sizes = "as many tokens" if len(a) == len(b) else f"{len(a)} tokens against {len(b)}"
        return Comparison(
            False,
            0,
            f"the vocabularies have {sizes}, but id {clash} is {a[clash]!r} for the teacher and {b[clash]!r} for the student",
        )
    most = max(len(a), len(b))
    if most - len(shared) > max(8, most // 100):
        return Comparison(False, 0, f"the teacher's vocabulary has {len(a)} tokens and the student's {len(b)}")
    return Comparison(True, len(shared))


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of which token each id means."""
    tokens = sorted((i, token) for token, i in tokenizer.get_vocab().items())
    return xxhash.xxh3_128_hexdigest("\0".join(f"{i} {token}" for i, token in tokens).encode(errors="surrogatepass"))
