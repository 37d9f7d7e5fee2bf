"""The hardware of this rank: peak FLOPS for mfu, how much memory it has, and memory in use."""

import os
import re
import resource
import sys
from pathlib import Path

import torch

# Dense bfloat16 FLOPS, from the makers' data sheets, by a device's name without the words of NOT_FLOPS.
# What is not here is not known: another card of a similar name may be half as fast.
PEAK_FLOPS = {
    "A10": 125e12,
    "A10G": 70e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "A100": 312e12,
    "A100 PCIE": 312e12,
    "A800": 312e12,
    "A800 PCIE": 312e12,
    "H20": 148e12,
    "H100": 989e12,
    "H100 PCIE": 756e12,
    "H100 NVL": 835e12,
    "H800": 989e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "B300": 2250e12,
    "GB200": 2500e12,
    "GB300": 2500e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
    "RTX 5090": 209.5e12,
    "RTX A6000": 154.8e12,
    "RTX 6000 ADA GENERATION": 364e12,
    "MI210": 181e12,
    "MI250": 181e12,  # one of its two dies is one device; the same for MI250X
    "MI250X": 191.5e12,
    "MI300A": 980.6e12,
    "MI300X": 1307e12,
    "MI325X": 1307e12,
}
# The maker, the series, the socket and the memory: they change no FLOPS.
NOT_FLOPS = re.compile(r"NVIDIA|AMD|INSTINCT|GEFORCE|OAM|SXM\d?|HBM\d?E?|\d+GB?")
GIB = 1024**3
# cgroups 2 and 1
CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def peak_flops(device: torch.device) -> float | None:
    """Peak FLOPS of a device; None where it is not known (a CPU, a GPU that is not in the table)."""
    return peak_flops_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_flops_of(name: str) -> float | None:
    """Peak FLOPS of a device by its name, as the driver gives it.

    None for one that is not in the table, and for a slice of a GPU (MIG).
    """
    words = [word for word in re.split(r"[\s-]+", name.upper()) if not NOT_FLOPS.fullmatch(word)]
    return PEAK_FLOPS.get(" ".join(words))


def memory_gib(device: torch.device) -> float:
    """What this rank can use: its GPU's memory, or on CPU its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIB
    return host_memory_gib() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def host_memory_gib() -> float:
    """GiB of this machine, or less where a container may not use all of it."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [path.read_text().strip() for path in CONTAINER_LIMITS if path.is_file()]
    return min([physical, *(int(limit) for limit in limits if limit.isdecimal())]) / GIB  # "max": no limit


def peak_memory_gib(device: torch.device) -> float:
    """GiB: on GPU the most reserved since the last call, on CPU the most that the process ever held."""
    if device.type == "cuda":
        reserved = torch.cuda.max_memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
        return reserved / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
