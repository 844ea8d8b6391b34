"""The likeliest tokens at each position of a sequence, as a server gave them, and the checks that such an answer must pass."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from moe2dense.common.http import RequestFailed

# n positions, k tokens of each

Value = TypeVar("Value")
_LOWEST = -6e4  # servers write -inf in several ways; no float16 lies below


@dataclass(frozen=True)
class TopK:
    """The k likeliest tokens after each of n positions, likeliest first: ids [n, k] int64, log_p [n, k] float32."""

    ids: Tensor
    log_p: Tensor


class Ask(Protocol):
    """One request to a server: the path below its address, how its JSON is read, what is posted (None: a GET), and how many
    log-probabilities come back.

    Returns what `read` makes of the answer. An answer that `read` refuses is asked for again. Raises RequestFailed.
    """

    def __call__(
        self, path: str, read: Callable[[Any], Value], body: dict[str, Any] | None = None, numbers: int = 0
    ) -> Value: ...


def rows(answer: object, what: str, length: int) -> list[Any]:
    """Return an answer that is a list of `length` entries. Raises RequestFailed for anything else."""
    if not isinstance(answer, list) or len(answer) != length:
        found = f"{len(answer)} entries" if isinstance(answer, list) else f"{str(answer)[:60]!r}"
        raise RequestFailed(f"{what}: {found} where {length} were asked for")
    return answer


def likeliest(entries: Iterable[tuple[int, float]], k: int) -> list[tuple[int, float]]:
    """Return the k likeliest of some (id, log-probability), likeliest first. Servers add the token that was given or drawn.

    Raises RequestFailed for fewer than k, which no other try changes, and for what is no log-probability.
    """
    finite = []
    for token, log_p in entries:
        value = float(log_p)
        if math.isnan(value) or value > 1e-3 or token < 0:
            raise RequestFailed(f"token {token} has log-probability {value}")
        finite.append((int(token), max(value, _LOWEST)))
    if len(finite) < k:
        raise RequestFailed(
            f"it gives {len(finite)} log-probabilities of a position where {k} were asked for", final=True
        )
    finite.sort(key=lambda entry: -entry[1])
    return finite[:k]


def stacked(positions: list[list[tuple[int, float]]]) -> TopK:
    """Return the positions of one sequence as tensors."""
    ids = torch.tensor([[token for token, _ in row] for row in positions], dtype=torch.int64)
    log_p = torch.tensor([[value for _, value in row] for row in positions], dtype=torch.float32)
    return TopK(ids, log_p)
