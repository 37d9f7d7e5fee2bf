"""Experiments stand on the trainer `torchtitan` of this repository."""

import importlib.util
from importlib import metadata
from pathlib import Path

OTHER = "torchtitan"  # a different distribution, with the import name of our trainer


def _refuse_other_torchtitan() -> None:
    """Ends the process with one line. Finds `torchtitan` without importing it: that may fail in many ways."""
    found = importlib.util.find_spec("torchtitan")
    folder = Path(found.origin).parent if found and found.origin else None
    if folder is None or not (folder / "config" / "table.py").is_file():
        raise SystemExit(
            f"error: the torchtitan that Python finds ({folder or 'none'}) is not the one of torchtitan-vlm: "
            f"pip uninstall {OTHER}, then install torchtitan-vlm again"
        )
    if _installed_into(folder.parent):
        raise SystemExit(
            f"error: the distribution {OTHER} is installed over the files of torchtitan-vlm in {folder}: "
            f"pip uninstall {OTHER} torchtitan-vlm, then install torchtitan-vlm again"
        )


def _installed_into(folder: Path) -> bool:
    """Whether the other distribution put its files there: then some are its own, whichever came last."""
    return any(
        Path(str(found.locate_file(""))).resolve() == folder.resolve()
        for found in metadata.distributions(name=OTHER)
        if any(file.parts[0] == "torchtitan" for file in found.files or ())
    )


_refuse_other_torchtitan()
