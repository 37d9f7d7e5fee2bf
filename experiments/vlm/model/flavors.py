"""Sizes of vision-language models: every encoder with every decoder. Imports no torch.

A flavor is named ENCODER-DECODER, for example `so400m-llama3.2-1B`, or as its family calls it (families/);
`debugmodel` trains on two CPU cores.
Sources: config.json of google/siglip2-*-naflex; SigLIP 2 (Tschannen et al., 2025).
"""

from experiments.vlm.model.config import EncoderConfig, ProjectorConfig, VLMConfig
from experiments.vlm.model.families import FAMILIES
from experiments.vlm.model.towers import TOWERS
from torchtitan.models.decoder.flavors import DECODERS


def encoders() -> dict[str, EncoderConfig]:
    """Sizes of the encoders of all families, by name."""
    return {name: sizes for tower in TOWERS.values() for name, sizes in tower.sizes.items()}


ENCODERS = encoders()

FLAVORS = {
    "debugmodel": VLMConfig(EncoderConfig(128, 4, 4, 512), ProjectorConfig(256), DECODERS["debug"])
} | {
    f"{encoder}-{decoder}": VLMConfig(
        ENCODERS[encoder], ProjectorConfig(DECODERS[decoder].dim), DECODERS[decoder]
    )
    for encoder in ENCODERS
    for decoder in DECODERS
    if decoder != "debug"
}
for family in FAMILIES.values():
    FLAVORS |= family.sizes
