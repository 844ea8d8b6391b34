"""Run a checkpoint that need not fit in memory, layer by layer, and watch what its experts do.

A folder or name and a memory budget come in. Logits, hidden states, single experts and routing statistics go out; a whole
text goes through one layer before the next is read.
"""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from moe2dense.teacher.layer_pass import LayerPass
    from moe2dense.teacher.load import load_teacher
    from moe2dense.teacher.model import Teacher, TeacherOutput
    from moe2dense.teacher.observer import Observer
    from moe2dense.teacher.routing import RoutingStats

__all__ = ["LayerPass", "Observer", "RoutingStats", "Teacher", "TeacherOutput", "load_teacher"]

__getattr__, __dir__, _ = lazy.attach(
    __name__,
    submod_attrs={
        "layer_pass": ["LayerPass"],
        "load": ["load_teacher"],
        "model": ["Teacher", "TeacherOutput"],
        "observer": ["Observer"],
        "routing": ["RoutingStats"],
    },
)
