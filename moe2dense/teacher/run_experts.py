"""Run a layer's experts over a macro-batch one after the other: the next are read and sent while one computes."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from moe2dense.teacher.buffers import Scratch, host_memory
from moe2dense.teacher.experts import ExpertWeights, LayerExperts, Routing

# T tokens, K top_k, H hidden
_MOST_BUFFERS = 4
# (e, rows, weights, hidden, output)
OnExpert = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]


class _Reader:
    """Read experts into a few buffers, in a thread of its own; an expert's matrices are views of its buffer."""

    def __init__(self, experts: LayerExperts, wanted: list[int], budget: int):
        self.experts, self.wanted = experts, wanted
        self.for_gpu = torch.device(experts.device).type == "cuda"
        least = 3 if self.for_gpu else 2  # on a GPU one computes, one is sent and one is read
        self.size = max(experts.nbytes(e) for e in wanted)
        self.buffers: queue.Queue[Tensor] = queue.Queue()
        for _ in range(min(len(wanted), max(least, min(_MOST_BUFFERS, budget // max(self.size, 1))))):
            self.buffers.put(host_memory(self.size, self.for_gpu))
        self.ready: queue.Queue[Any] = queue.Queue()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._work, name="expert-reader", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        try:
            for e in self.wanted:
                buffer = self.buffers.get()
                if self.stopped.is_set():
                    return
                self.ready.put((e, self.experts.read(e, buffer[: self.experts.nbytes(e)]), buffer))
        except BaseException as error:
            self.ready.put(error)

    def next(self) -> tuple[int, ExpertWeights, Tensor]:
        """Return the next (e, expert, its buffer), as soon as it is read. Raises what reading it raised."""
        item = self.ready.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def give_back(self, e: int, expert: ExpertWeights, buffer: Tensor) -> None:
        """Let a buffer be used again, or a new one where the layer keeps its experts as they were read."""
        kept = self.experts.remember(e, expert)
        self.buffers.put(host_memory(self.size, self.for_gpu) if kept else buffer)

    def stop(self) -> None:
        """End the thread."""
        self.stopped.set()
        self.buffers.put(torch.empty(0, dtype=torch.uint8))
        self.thread.join()


def prefetch(experts: LayerExperts, wanted: Iterable[int], budget: int) -> Iterator[tuple[int, ExpertWeights]]:
    """Yield (e, expert) in order, the next ones read while the caller computes; an expert is valid until the next is asked for.

    As many buffers as `budget` bytes allow, at most four, are used again and again. To a GPU the next expert is sent from pinned
    memory, on a stream of its own, while one computes.
    """
    wanted = list(wanted)
    if not wanted:
        return
    reader = _Reader(experts, wanted, budget)
    try:
        yield from _sent(reader) if reader.for_gpu else _in_place(reader)
    finally:
        reader.stop()


def _in_place(reader: _Reader) -> Iterator[tuple[int, ExpertWeights]]:
    """Yield experts as they were read."""
    for _ in reader.wanted:
        e, expert, buffer = reader.next()
        yield e, expert
        reader.give_back(e, expert, buffer)


def _sent(reader: _Reader) -> Iterator[tuple[int, ExpertWeights]]:
    """Yield experts on the GPU, one being sent ahead."""
    stream, ahead = torch.cuda.Stream(reader.experts.device), None
    for number in range(len(reader.wanted) + 1):
        following = None
        if number < len(reader.wanted):
            e, expert, buffer = reader.next()
            with torch.cuda.stream(stream):
                following = (e, expert, buffer, expert.to(reader.experts.device), torch.cuda.Event())
                following[-1].record(stream)
        if ahead is not None:
            e, expert, buffer, sent, arrived = ahead
            current = torch.cuda.current_stream(reader.experts.device)
            current.wait_event(arrived)
            for tensor in sent.tensors():
                # Its memory is of the other stream, and must outlive what is computed with it.
                tensor.record_stream(current)
            yield e, sent
            arrived.synchronize()
            reader.give_back(e, expert, buffer)
        ahead = following


def run_streamed(
    experts: LayerExperts,
    x: Tensor,
    routing: Routing,
    weights: Tensor,
    out: Tensor,
    *,
    input_scaled: bool = False,
    on_expert: OnExpert | None = None,
    budget: int = 0,
) -> None:
    """Add sum_e w_te f_e(x_t) to `out` [T, H], one expert in memory at a time.

    x [T, H], weights [T, K]. With `input_scaled` the weight multiplies the expert's input and its output is added as it is.
    """
    hit = routing.hit()
    if experts.keep is not None or experts.stacked is not None or all(e in experts.cache for e in hit):
        source: Iterable[tuple[int, ExpertWeights]] = ((e, experts[e]) for e in hit)
    else:
        source = prefetch(experts, hit, budget)
    scratch = Scratch()
    for e, expert in source:
        rows, slots = routing.of(e)
        shape, kind = (len(rows), x.shape[1]), (x.dtype, x.device)
        x_n = torch.index_select(x, 0, rows.to(x.device), out=scratch.take("x", shape, *kind))
        x_n, w_n = (t.to(experts.device, experts.dtype) for t in (x_n, weights[rows, slots]))
        if input_scaled:
            x_n, w_n = x_n * w_n[:, None], torch.ones_like(w_n)
        if on_expert is None:
            y_n = expert(x_n, scratch)
        else:
            hidden = expert.hidden(x_n, scratch)
            y_n = expert.output(hidden, scratch)
            on_expert(e, rows, w_n, hidden, y_n)
        out.index_add_(0, rows.to(out.device), y_n.mul_(w_n[:, None]).to(out.device, out.dtype))
