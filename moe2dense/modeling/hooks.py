"""What a feature loss reads of a model, taken through hooks on the layers asked for.

A feature is named by its kind and its layer: `hidden-3` is the residual stream after layer 3 (counted from 0), [n, H];
`maps-3` its attention probabilities, a row [h, S] for each token, [n, h, S]; `query-3`, `key-3` and `value-3` the projections
of its attention before rotary positions, [n, D].
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moe2dense.errors import UserError
from moe2dense.modeling.attention import eager_attention
from moe2dense.modeling.decoder import decoder_layers
from moe2dense.modeling.kinds import without_adapters

# N blocks, S block length, n = N S tokens, h heads, H hidden size, D width of a projection

FEATURE_KINDS = ("hidden", "maps", "query", "key", "value")
_ATTENTION_NAMES = ("self_attn", "attention", "self_attention", "attn")
_PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}


def feature_name(name: str | int) -> str:
    """Return `hidden-3` for 3, and a full name as it is. Raises UserError for anything else."""
    kind, _, layer = (f"hidden-{name}" if isinstance(name, int) else name).partition("-")
    if kind not in FEATURE_KINDS or not layer.isdigit():
        raise UserError(
            f"feature {name!r} must be KIND-LAYER with a kind of {', '.join(FEATURE_KINDS)}, such as hidden-3"
        )
    return f"{kind}-{int(layer)}"


def asks_for_maps(names: Iterable[str]) -> bool:
    """Return whether attention maps are among these features."""
    return any(name.startswith("maps-") for name in names)


def split_name(name: str) -> tuple[str, int]:
    """Return ("hidden", 3) for `hidden-3`."""
    kind, _, layer = name.partition("-")
    return kind, int(layer)


def attention_of(layer: nn.Module, index: int) -> nn.Module:
    """Return the attention module of a decoder layer. Raises UserError where it has none."""
    attention = next((m for n in _ATTENTION_NAMES if (m := getattr(layer, n, None)) is not None), None)
    if attention is None:
        raise UserError(f"features: layer {index} ({type(layer).__name__}) has no attention to learn from")
    return attention


def first_tensor(output: Any) -> Tensor:
    """Return the tensor of a module's output, the first where it returns several."""
    return output[0] if isinstance(output, tuple) else output


def hook_attention(layer: nn.Module, name: str, keep: Callable[[str, Tensor], None]) -> RemovableHandle:
    """Call keep(name, value [n, ...]) whenever this layer's attention computes the feature; return the hook's handle.

    Raises UserError where the attention has no such projection (fused or compressed ones).
    """
    kind, index = split_name(name)
    attention = attention_of(layer, index)
    if kind == "maps":

        def keep_rows(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, tuple) and len(output) > 1 and output[1] is not None:
                keep(name, output[1].transpose(1, 2).flatten(0, 1))

        return attention.register_forward_hook(keep_rows)
    projection = getattr(attention, _PROJECTIONS[kind], None)
    if projection is None:
        raise UserError(
            f"features: layer {index} has no {_PROJECTIONS[kind]} ({type(attention).__name__}), so its {kind} cannot be "
            "had; use hidden states or attention instead"
        )
    return projection.register_forward_hook(lambda _m, _i, output: keep(name, output.flatten(2).flatten(0, 1)))


@contextlib.contextmanager
def captured(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Fill a dict with the features asked for while the model runs; other layers are left alone.

    Raises UserError for a feature that the model does not give.
    """
    features: dict[str, Tensor] = {}
    if not names:
        yield features
        return
    causal, layers = without_adapters(model), decoder_layers(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(eager_attention(causal.config, asks_for_maps(names)))
        for name in names:
            kind, index = split_name(name)
            if kind == "hidden":

                def keep_hidden(_module: nn.Module, _inputs: Any, output: Any, name: str = name) -> None:
                    features[name] = first_tensor(output).flatten(0, 1)

                handle = layers[index].register_forward_hook(keep_hidden)
            else:
                handle = hook_attention(layers[index], name, features.__setitem__)
            stack.callback(handle.remove)
        yield features
    if missing := [n for n in names if n not in features]:
        raise UserError(f"features: {type(causal).__name__} gives no {missing[0]}")
