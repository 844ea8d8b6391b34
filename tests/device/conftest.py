"""What every test on the pretended GPU holds: next to none of the work is the CPU's."""

from collections.abc import Callable

import pytest

from tests.device.counts import Counts

MOST_ON_CPU = 0.02  # of all FLOPs


@pytest.fixture
def mostly_there(record_property) -> Callable[[Counts], None]:
    """Return a check of what was counted. The share goes into a results file, from which `benchmarks/device_matrix.py` makes a table."""

    def check(counts: Counts) -> None:
        record_property("cpu_share", counts.cpu_share)
        assert counts.on("cuda") > 0 and counts.cpu_share < MOST_ON_CPU, counts.largest("cpu")

    return check
