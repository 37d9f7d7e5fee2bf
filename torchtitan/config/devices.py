"""How many GPUs a run may use, told without importing torch. The launcher asks too: python torchtitan/config/devices.py."""

import os
import shutil
import subprocess


def visible_gpus() -> int:
    """NVIDIA GPUs of this machine, less those that CUDA_VISIBLE_DEVICES hides."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    present = sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed.returncode == 0 else 0
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is None or not present:
        return present
    chosen = [device.strip() for device in allowed.split(",")]
    read = next((i for i, device in enumerate(chosen) if device in ("", "-1")), len(chosen))  # CUDA reads no further
    return min(read, present)


if __name__ == "__main__":
    print(visible_gpus())
