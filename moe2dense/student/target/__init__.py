"""The student's shape: what `--to` asks for, as a dense architecture with its sizes.

In go a text such as `25%` or `7b` and the teacher's config; out comes a `Target`. No weights are read.
"""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from moe2dense.student.target.resolve import Target, resolve_target

__all__ = ["Target", "resolve_target"]

__getattr__, __dir__, _ = lazy.attach(__name__, submod_attrs={"resolve": ["Target", "resolve_target"]})
