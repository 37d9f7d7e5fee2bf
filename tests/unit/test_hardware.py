"""Peak FLOPS by the names that drivers give."""

import pytest

from torchtitan.tools.hardware import peak_flops_of

# (device name, TFLOPS of the data sheet: dense, bfloat16)
KNOWN = [
    ("NVIDIA L4", 121),
    ("NVIDIA L40", 181),
    ("NVIDIA L40S", 362),
    ("NVIDIA A10", 125),
    ("NVIDIA A10G", 70),
    ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA A100-PCIE-40GB", 312),
    ("NVIDIA A100 80GB PCIe", 312),
    ("NVIDIA H100 80GB HBM3", 989),
    ("NVIDIA H100 PCIe", 756),
    ("NVIDIA H100 NVL", 835),
    ("NVIDIA H200", 989),
    ("NVIDIA H200 NVL", 835),
    ("NVIDIA GH200 480GB", 989),
    ("NVIDIA GH200 144G HBM3e", 989),
    ("NVIDIA B200", 2250),
    ("NVIDIA GB200", 2500),
    ("NVIDIA GeForce RTX 4090", 165),
    ("AMD Instinct MI300X", 1307),
    ("AMD Instinct MI250X", 191.5),
]
# Slices of a GPU, cards that share a name with a faster one, and what nobody listed.
UNKNOWN = [
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 4090 D",
    "Tesla V100-SXM2-32GB",
    "NVIDIA B2000",
    "",
]


@pytest.mark.parametrize(("name", "tflops"), KNOWN)
def test_a_device_has_the_peak_of_its_own_data_sheet(name, tflops):
    assert peak_flops_of(name) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_device_that_is_not_listed_has_no_known_peak(name):
    assert peak_flops_of(name) is None
