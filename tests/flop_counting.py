"""Count FLOPs with torch's own counter, products in place and fused attention on the CPU too, to compare with the project's."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from moe2dense.common.counters import totals

ATEN = torch.ops.aten


def _attention(q, k, v, *args, out_shape=None, **kwargs):
    return sdpa_flop_count(q, k, v)


def _attention_backward(grad, q, k, v, *args, out_shape=None, **kwargs):
    return sdpa_backward_flop_count(grad, q, k, v)


def _in_place(total, left, right, *args, out_shape=None, **kwargs):
    return 2 * left[0] * left[1] * right[1]


ON_CPU = {
    ATEN.addmm_: _in_place,
    ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class Counted:
    """FLOPs of one piece of work: as torch counted its operations, and as the project's counters have them."""

    torch = ours = 0.0


@contextmanager
def counted() -> Iterator[Counted]:
    """Count what happens within the context in both ways."""
    result, before = Counted(), sum(totals().flops.values())
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as mode:
        yield result
    result.torch = mode.get_total_flops()
    result.ours = sum(totals().flops.values()) - before
