"""Pack documents into blocks of one length, each document closed by the end-of-text token."""

from collections.abc import Iterable, Iterator

from moe2dense.data.blocks import Blocks
from moe2dense.data.documents import Document
from moe2dense.data.spread import spread_over_passages
from moe2dense.data.token_text import Layout, TokenBuilder

_SPREAD_READ = 16  # times the text that is wanted, which is read at most to spread it over passages


def packed(documents: Iterable[Document], layout: Layout, limit: int | None, eos: int) -> Blocks | int:
    """Return at most `limit` blocks of documents, or the number of tokens where they fill none."""
    if not layout.spread or limit is None:
        return _pack(documents, layout, limit, eos)
    blocks = _pack(_many(documents, limit, layout.block), layout, None, eos)
    return blocks if isinstance(blocks, int) else spread_over_passages(blocks, limit)


def _many(documents: Iterable[Document], limit: int, block: int) -> Iterator[Document]:
    """Yield documents until there is one for each of `limit` blocks and text for all of these, or 16 times that text."""
    tokens = 0
    for count, document in enumerate(documents, 1):
        yield document
        tokens += len(document.tokens) + 1
        if tokens >= limit * block and (count >= limit or tokens >= _SPREAD_READ * limit * block):
            return


def _pack(documents: Iterable[Document], layout: Layout, limit: int | None, eos: int) -> Blocks | int:
    """Cut documents into blocks; return the number of tokens when they fill no block."""
    builder = TokenBuilder(eos, layout)
    for document in documents:
        builder.append(document)
        if limit is not None and builder.numbering.tokens >= limit * layout.block:
            break
    return builder.text().blocks(layout, limit)
