"""What `torchtitan-vlm prepare` calls."""

import dataclasses
from pathlib import Path

from experiments.vlm.prepare.folder import read_json
from experiments.vlm.prepare.job import Job
from experiments.vlm.prepare.local import run_local
from experiments.vlm.prepare.options import Options
from experiments.vlm.prepare.progress import Progress
from torchtitan.config.errors import ConfigError


def prepare(options: Options, progress: Progress) -> dict:
    """Makes the shards, or goes on where an earlier call was stopped. Returns the report. Raises ConfigError."""
    options = dataclasses.replace(options, out=absolute(options.out), image_folder=absolute(options.image_folder))
    job = Job.begin(options)
    if options.ray_address:
        try:
            from experiments.vlm.prepare.cluster import run_on_cluster
        except ModuleNotFoundError as error:
            raise ConfigError(f"--ray_address needs Ray ({error}): pip install 'torchtitan-vlm[ray]'") from error
        run_on_cluster(options, progress)
    else:
        run_local(options, progress)
    return read_json(job.folder.report)


def absolute(path: str) -> str:
    """Other processes may work in other folders."""
    return path and str(Path(path).resolve())
