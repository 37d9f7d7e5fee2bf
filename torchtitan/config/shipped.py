"""Files that come with the package, found from every folder: job files and the tokenizer of the debug models.

A relative path that does not exist here is looked for among them: `assets/tokenizer` means one thing
everywhere. A job may be named alone too, `vlm_debug` for train_configs/vlm_debug.toml. What lies in the
current folder comes first. Imports no torch.
"""

from pathlib import Path

# Links in a checkout, files in a wheel: the folders themselves stay at the top, where people look for them.
SHIPPED = Path(__file__).parents[2] / "experiments" / "shipped"
JOBS = SHIPPED / "train_configs"


def shipped(path: str) -> Path:
    """`path` as it is, or that of the package where `path` does not exist."""
    here = Path(path).expanduser()
    ours = SHIPPED / path
    return ours if path and not here.exists() and ours.exists() else here


def shipped_job(path: str) -> Path:
    """As `shipped`, for a TOML file; a name without ending may be one of the package's jobs."""
    ours = JOBS / f"{path}.toml"
    return ours if not Path(path).is_file() and ours.is_file() else shipped(path)


def shipped_jobs() -> list[str]:
    """Names of the package's jobs."""
    return sorted(str(file.relative_to(JOBS).with_suffix("")) for file in JOBS.rglob("*.toml"))
