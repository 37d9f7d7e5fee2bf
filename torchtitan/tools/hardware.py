"""What this rank runs on: peak FLOPS for mfu, and memory in use."""

import resource
import sys

import torch

# Dense bfloat16 FLOPS, from the makers' data sheets. The first name that the device's own name contains counts.
PEAK_FLOPS = {
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "B300": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "MI300X": 1307e12,
    "MI325X": 1307e12,
    "MI250X": 191.5e12,  # one of its two dies is one device
}
GIB = 1024**3


def peak_flops(device: torch.device) -> float | None:
    """None where it is not known (a CPU, a GPU that is not in the table)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """On GPU the most that was reserved since the last call, on CPU the most that the process ever held."""
    if device.type == "cuda":
        reserved = torch.cuda.max_memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
        return reserved / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
