"""What a student keeps of the teacher outside its FFNs, where it has fewer channels, layers or attention heads.

In go a target and some text; out comes a `Cut`, which cuts the teacher's tensors and hidden states to what stays.
"""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from moe2dense.student.prune.cut import Cut, cut_for

__all__ = ["Cut", "cut_for"]

__getattr__, __dir__, _ = lazy.attach(__name__, submod_attrs={"cut": ["Cut", "cut_for"]})
