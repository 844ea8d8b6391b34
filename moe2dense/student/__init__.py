"""A dense student: its shape, its weights built from the teacher's experts, and its folder on disk.

In go a teacher, a target such as `25%` and some text; out comes a `Student`, an ordinary transformers model with a record of
how it was built.
"""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from moe2dense.student.build.api import build_student, build_to_folder
    from moe2dense.student.open import open_student
    from moe2dense.student.store import load_student, save_student
    from moe2dense.student.types import LayerProvenance, Student

__all__ = [
    "LayerProvenance",
    "Student",
    "build_student",
    "build_to_folder",
    "load_student",
    "open_student",
    "save_student",
]

__getattr__, __dir__, _ = lazy.attach(
    __name__,
    submod_attrs={
        "build.api": ["build_student", "build_to_folder"],
        "open": ["open_student"],
        "store": ["load_student", "save_student"],
        "types": ["LayerProvenance", "Student"],
    },
)
