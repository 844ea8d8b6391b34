"""Know what holds for any transformers model: its decoder, head, shape and forward pass.

A model or a config comes in; its parts, sizes and hidden states go out. `internals` is the only file that uses what
transformers does not promise to keep.
"""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from moe2dense.modeling.decoder import decoder_layers, decoder_of
    from moe2dense.modeling.forward import evaluation_mode, final_hidden, model_inputs
    from moe2dense.modeling.head import Head, OutputHead, model_head
    from moe2dense.modeling.kinds import language_model
    from moe2dense.modeling.shape import Geometry, teacher_geometry

__all__ = [
    "Geometry",
    "Head",
    "OutputHead",
    "decoder_layers",
    "decoder_of",
    "evaluation_mode",
    "final_hidden",
    "language_model",
    "model_head",
    "model_inputs",
    "teacher_geometry",
]

__getattr__, __dir__, _ = lazy.attach(
    __name__,
    submod_attrs={
        "decoder": ["decoder_layers", "decoder_of"],
        "forward": ["evaluation_mode", "final_hidden", "model_inputs"],
        "head": ["Head", "OutputHead", "model_head"],
        "kinds": ["language_model"],
        "shape": ["Geometry", "teacher_geometry"],
    },
)
