"""What is known of machines by the names that torch gives their GPUs."""

import pytest

from moe2dense.families.machines import described_machine, peak_of


@pytest.mark.parametrize(
    ("name", "machine"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA L40S", "l40s"),
    ],
)
def test_peaks_are_those_of_the_cards(name, machine):
    assert peak_of(name) == described_machine(machine).half > 1e14


@pytest.mark.parametrize("name", ["NVIDIA H100 PCIe", "a pretended GPU", ""])
def test_other_gpus_have_no_known_peak(name):
    assert peak_of(name) == 0.0
