"""What every test on the pretended GPU holds: next to none of the work is the CPU's."""

from collections import Counter
from collections.abc import Callable

import pytest

from tests.device.counts import Counts

MOST_ON_CPU = 0.02  # of all FLOPs


@pytest.fixture
def mostly_there(record_property) -> Callable[..., None]:
    """Return a check of what was counted, but for places that begin with `apart`. The share goes into a results file, from which `benchmarks/device_matrix.py` makes a table."""

    def check(counts: Counts, apart: str = "") -> None:
        if apart:
            counts.flops = Counter({key: n for key, n in counts.flops.items() if not key[1].startswith(apart)})
        record_property("cpu_share", counts.cpu_share)
        assert counts.on("cuda") > 0 and counts.cpu_share < MOST_ON_CPU, counts.largest("cpu")

    return check
