"""Turn text into blocks of tokens: records of files or data sets, chat templates, packing, labels by domain.

A path or hub id and a tokenizer come in; blocks of one length with their masks go out.
"""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from moe2dense.data.blocks import Blocks, join_blocks
    from moe2dense.data.counts import TextCounts
    from moe2dense.data.load import load_blocks
    from moe2dense.data.options import TextOptions

__all__ = ["Blocks", "TextCounts", "TextOptions", "join_blocks", "load_blocks"]

__getattr__, __dir__, _ = lazy.attach(
    __name__,
    submod_attrs={
        "blocks": ["Blocks", "join_blocks"],
        "counts": ["TextCounts"],
        "load": ["load_blocks"],
        "options": ["TextOptions"],
    },
)
