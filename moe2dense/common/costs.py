"""What a stage of a run takes: as counted while it ran, or as planned. No torch here, so that plans and reports need none."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from typing import Any


@dataclass
class Cost:
    """What a stage took. Bytes, seconds of wall time.

    memory: the most resident memory of the process, of which `began` was there before; gpu_memory: the most that torch held on
    its GPU. peak: FLOP/s in bfloat16 that the GPU is sold with, 0 where there is none or it is not known.
    Of several processes: FLOPs, bytes and `peak` are those of all; memory and gpu_memory are the most that one of them held, and
    memory_of_each and gpu_memory_of_each, by rank, what each held. The lists are empty where one process did it alone.
    """

    flops: dict[str, float] = field(default_factory=dict)
    disk: int = 0
    bus: int = 0
    memory: int = 0
    began: int = 0
    gpu_memory: int = 0
    seconds: float = 0.0
    peak: float = 0.0
    memory_of_each: list[int] = field(default_factory=list)
    gpu_memory_of_each: list[int] = field(default_factory=list)

    @property
    def utilisation(self) -> float | None:
        """Return the share of the GPU's peak that its FLOPs are of the whole time (MFU); None without a known GPU."""
        return self.flops.get("cuda", 0.0) / (self.seconds * self.peak) if self.peak and self.seconds else None

    def __add__(self, other: "Cost") -> "Cost":
        """Return both: sums, and the higher of the peaks."""
        devices = {**self.flops, **other.flops}
        return Cost(
            {d: self.flops.get(d, 0.0) + other.flops.get(d, 0.0) for d in devices},
            self.disk + other.disk,
            self.bus + other.bus,
            max(self.memory, other.memory),
            max(self.began, other.began),
            max(self.gpu_memory, other.gpu_memory),
            round(self.seconds + other.seconds, 3),
            max(self.peak, other.peak),
            _higher(self.memory_of_each, other.memory_of_each),
            _higher(self.gpu_memory_of_each, other.gpu_memory_of_each),
        )

    def __sub__(self, part: "Cost") -> "Cost":
        """Return what is left without a part of it; the peaks stay."""
        rest = {device: number - part.flops.get(device, 0.0) for device, number in self.flops.items()}
        return replace(
            self,
            flops={device: number for device, number in rest.items() if number},
            disk=self.disk - part.disk,
            bus=self.bus - part.bus,
            seconds=round(self.seconds - part.seconds, 3),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as run.json has them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> "Cost":
        """Return what `to_dict` wrote. Raises TypeError or ValueError for anything else."""
        cost = cls(**entry)
        sizes = (cost.disk, cost.bus, cost.memory, cost.began, cost.gpu_memory)
        lists = (*cost.memory_of_each, *cost.gpu_memory_of_each)
        for number in (*cost.flops.values(), *sizes, cost.seconds, cost.peak, *lists):
            if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
                raise ValueError(f"{number!r} is no number")
        return cost


def cost_of_all(costs: Sequence[Cost]) -> Cost:
    """Return what processes that worked at the same time took together; `costs` are theirs, by rank."""
    if len(costs) == 1:
        return costs[0]
    whole, most = sum(costs, Cost()), max(costs, key=lambda cost: cost.memory)
    gpu_memories = [cost.gpu_memory for cost in costs]
    return replace(
        whole,
        began=most.began,
        seconds=max(cost.seconds for cost in costs),
        peak=sum(cost.peak for cost in costs),
        memory_of_each=[cost.memory for cost in costs],
        gpu_memory_of_each=gpu_memories if any(gpu_memories) else [],
    )


def _higher(ours: Sequence[int], others: Sequence[int]) -> list[int]:
    """Return the higher number of each process; a run may have gone on with more or fewer of them."""
    return [max(pair) for pair in zip_longest(ours, others, fillvalue=0)]
