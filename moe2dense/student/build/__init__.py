"""Build a student layer by layer while its teacher streams, then heal it end to end.

A teacher, a target and some text come in; a dense model goes out, in memory or in a folder, with where each of its neurons
comes from.
"""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from moe2dense.student.build.api import build_student, build_to_folder

__all__ = ["build_student", "build_to_folder"]

__getattr__, __dir__, _ = lazy.attach(__name__, submod_attrs={"api": ["build_student", "build_to_folder"]})
