"""What a feature loss reads of a model, taken through hooks on the layers asked for.

A feature is named by what it is and its layer: `hidden-3` is the residual stream after layer 3 (counted from 0), [n, H];
`maps-3` its attention probabilities, a row [h, S] for each token, [n, h, S]; `query-3`, `key-3` and `value-3` the projections
of its attention before rotary positions, [n, D].
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from moe2dense.errors import UserError

# N blocks, S block length, n = N S tokens, h heads

KINDS = ("hidden", "maps", "query", "key", "value")
_ATTENTION = ("self_attn", "attention", "self_attention", "attn")
_PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}


def feature_name(name: str | int) -> str:
    """`hidden-3` for 3; a whole name as it is. Raises UserError for anything else."""
    kind, _, layer = (f"hidden-{name}" if isinstance(name, int) else name).partition("-")
    if kind not in KINDS or not layer.isdigit():
        raise UserError(f"feature {name!r} must be KIND-LAYER with a kind of {', '.join(KINDS)}, such as hidden-3")
    return f"{kind}-{int(layer)}"


def split_name(name: str) -> tuple[str, int]:
    """`hidden-3` -> ("hidden", 3)."""
    kind, _, layer = name.partition("-")
    return kind, int(layer)


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of a causal language model, in order."""
    whole = model.get_base_model() if hasattr(model, "peft_config") else model
    count = whole.config.get_text_config().num_hidden_layers
    return next(m for m in whole.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)


def attention_of(layer: nn.Module, index: int) -> Any:
    """The attention of a decoder layer. Raises UserError where it has none."""
    found = next((m for n in _ATTENTION if (m := getattr(layer, n, None)) is not None), None)
    if found is None:
        raise UserError(f"features: layer {index} ({type(layer).__name__}) has no attention to learn from")
    return found


def first(output: Any) -> Tensor:
    """The tensor of a module's output."""
    return output[0] if isinstance(output, tuple) else output


def hook_attention(layer: nn.Module, name: str, keep: Callable[[str, Tensor], None]) -> Any:
    """Calls keep(name, value [n, ...]) whenever this layer's attention makes the feature; returns the hook's handle.

    Raises UserError where the attention has no such projection (fused or compressed ones).
    """
    kind, index = split_name(name)
    attention = attention_of(layer, index)
    if kind == "maps":

        def rows(_module: Any, _inputs: Any, output: Any) -> None:
            if isinstance(output, tuple) and len(output) > 1 and output[1] is not None:
                keep(name, output[1].transpose(1, 2).flatten(0, 1))

        return attention.register_forward_hook(rows)
    projection = getattr(attention, _PROJECTIONS[kind], None)
    if projection is None:
        raise UserError(
            f"features: layer {index} has no {_PROJECTIONS[kind]} ({type(attention).__name__}), so its {kind} cannot be "
            "had; use hidden states or attention instead"
        )
    return projection.register_forward_hook(lambda _m, _i, output: keep(name, output.flatten(2).flatten(0, 1)))


@contextlib.contextmanager
def eager_attention(config: Any, names: Iterable[str]) -> Iterator[None]:
    """Where attention maps are asked for: attention that returns them, which other implementations do not."""
    config = config.get_text_config()
    before = config._attn_implementation
    if any(n.startswith("maps-") for n in names):
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


@contextlib.contextmanager
def captured(model: Any, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Fills a dict with the features asked for while the model runs; other layers are left alone.

    Raises UserError for a feature that the model does not give.
    """
    found: dict[str, Tensor] = {}
    if not names:
        yield found
        return
    whole = model.get_base_model() if hasattr(model, "peft_config") else model
    layers = decoder_layers(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(eager_attention(whole.config, names))
        for name in names:
            kind, index = split_name(name)
            if kind == "hidden":

                def hidden(_module: Any, _inputs: Any, output: Any, name: str = name) -> None:
                    found[name] = first(output).flatten(0, 1)

                handle = layers[index].register_forward_hook(hidden)
            else:
                handle = hook_attention(layers[index], name, found.__setitem__)
            stack.callback(handle.remove)
        yield found
    if missing := [n for n in names if n not in found]:
        raise UserError(f"features: {type(whole).__name__} gives no {missing[0]}")
