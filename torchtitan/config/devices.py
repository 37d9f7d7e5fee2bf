"""How many GPUs and cores a run may use, found without importing torch.

The launcher asks too: python torchtitan/config/devices.py.
"""

import os
import shutil
import subprocess
from pathlib import Path

DEVICE_FILES = Path("/dev")


def visible_gpus() -> int:
    """NVIDIA GPUs of this machine, less those that CUDA_VISIBLE_DEVICES hides."""
    present = _present_gpus()
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is None or not present:
        return present
    chosen = [device.strip() for device in allowed.split(",")]
    # CUDA reads no further
    read = next((i for i, device in enumerate(chosen) if device in ("", "-1")), len(chosen))
    return min(read, present)


def available_cores() -> int:
    """Cores of this machine that the process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _present_gpus() -> int:
    # a container may have GPUs and no tools: each GPU is a device file
    if shutil.which("nvidia-smi") is None:
        return len(list(DEVICE_FILES.glob("nvidia[0-9]*")))
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return (
        sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed.returncode == 0 else 0
    )


if __name__ == "__main__":
    print(visible_gpus())
