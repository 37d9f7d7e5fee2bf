"""Which model a job trains: one answer for checks, estimates, training and scripts. Imports no torch."""

from dataclasses import replace

from experiments.vlm.config import VLMJobConfig
from experiments.vlm.model.flavors import FLAVORS, VLMConfig
from torchtitan.config.errors import did_you_mean, require


def model_config(job: VLMJobConfig) -> VLMConfig:
    """Sizes of the model, as the job's options leave them.

    Raises ConfigError where there is no such model, or where data.patch_size or data.spatial_merge_size is
    given and is not the model's.
    """
    known = did_you_mean(job.model.flavor, FLAVORS)
    require(job.model.flavor in FLAVORS, f"model.flavor = {job.model.flavor}: no such flavor{known}")
    config, data = FLAVORS[job.model.flavor], job.data
    patch, merge = config.encoder.patch_size, data.spatial_merge_size
    require(
        data.patch_size in (None, patch),
        f"data.patch_size = {data.patch_size}: {job.model.flavor} takes patches of {patch}; leave it unset",
    )
    # The projector of a row is made anew, for as many patches as the job merges.
    return config if merge is None else replace(config, projector=replace(config.projector, merge_size=merge))
