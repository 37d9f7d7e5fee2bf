"""Experiments stand on the trainer `torchtitan` of this repository."""

import importlib.util
from pathlib import Path


def _refuse_other_torchtitan() -> None:
    """A different distribution has the same import name. Found without importing it, since that may fail in many ways."""
    found = importlib.util.find_spec("torchtitan")
    folder = Path(found.origin).parent if found and found.origin else None
    if folder is None or not (folder / "config" / "table.py").is_file():
        raise SystemExit(
            f"error: the torchtitan that Python finds ({folder or 'none'}) is not the one of torchtitan-vlm: "
            "pip uninstall torchtitan, then pip install -e . in this repository"
        )


_refuse_other_torchtitan()
