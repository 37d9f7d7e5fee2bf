"""State dicts in memory under the names of transformers, and back, by the rows that files are read with."""

from collections.abc import Mapping

from torch import Tensor

from experiments.vlm.config import PARTS
from experiments.vlm.model.config import VLMConfig
from experiments.vlm.model.families import FAMILIES
from experiments.vlm.model.hf import ALONE, part_rows
from experiments.vlm.model.towers import tower_of
from tests.reference.models import ENCODER
from torchtitan.models.decoder import hf as decoder
from torchtitan.models.decoder.flavors import DecoderConfig
from torchtitan.models.weight_names import prefixed, write

DECODER_ROWS = prefixed(decoder.BODY, "model.", "") + decoder.HEAD
ENCODER_ROWS = [
    row for place in ALONE["encoder"] for row in prefixed(tower_of(ENCODER).rows(ENCODER), place, "")
]
VLM_ROWS = [row for part in PARTS for row in part_rows(part, ENCODER, FAMILIES["lfm2_vl"])]


def decoder_to_hf(state: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """As transformers saves it: a tied output layer is left out."""
    return _untied(write(state, DECODER_ROWS), config)


def vlm_to_hf(state: Mapping[str, Tensor], config: VLMConfig) -> dict[str, Tensor]:
    """A Lfm2VlForConditionalGeneration; a tied output layer is left out."""
    return _untied(write(state, VLM_ROWS), config.decoder)


def _untied(named: dict[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    return {name: w for name, w in named.items() if name != "lm_head.weight" or not config.tied_embeddings}
