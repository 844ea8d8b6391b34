"""Ways to make one dense FFN from a layer's experts, and to fit it to what the layer does.

In goes an `FFNTask`: experts, routing statistics, inputs and targets of one layer. Out comes an FFN of the wanted width and
where its neurons come from. `methods.py` lists the methods.
"""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from moe2dense.student.ffn.dense import DenseFFN
    from moe2dense.student.ffn.make import make_ffn
    from moe2dense.student.ffn.methods import METHODS
    from moe2dense.student.ffn.task import FFNTask

__all__ = ["METHODS", "DenseFFN", "FFNTask", "make_ffn"]

__getattr__, __dir__, _ = lazy.attach(
    __name__,
    submod_attrs={"dense": ["DenseFFN"], "make": ["make_ffn"], "methods": ["METHODS"], "task": ["FFNTask"]},
)
