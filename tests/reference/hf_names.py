"""State dicts in memory under the names of transformers, and back, by the rows that files are read with."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.vlm.model.flavors import VLMConfig
from experiments.vlm.model.hf import ALONE, TOWER, WITHIN, part_rows
from torchtitan.models.decoder import hf as decoder
from torchtitan.models.decoder.flavors import DecoderConfig
from torchtitan.models.weight_names import Pieces, Row, prefixed, to_ours, to_theirs

DECODER_ROWS = prefixed(decoder.BODY, "model.", "") + decoder.HEAD
ENCODER_ROWS = [row for place in ALONE["encoder"] for row in prefixed(TOWER, place, "")]
VLM_ROWS = [row for part in WITHIN for row in part_rows(part, whole=True)]


class Weights(NamedTuple):
    """What `read` found."""

    named: dict[str, Tensor]  # under our names
    # their names that no row knows, for a report: the pooling head of a published encoder, say
    unused: list[str]


def read(state: Mapping[str, Tensor], rows: Iterable[Row]) -> Weights:
    """Their state dict under our names. ValueError: see `to_ours`."""
    pieces = to_ours(_sizes(state), rows)
    return Weights(_made(state, pieces), pieces.unused)


def write(state: Mapping[str, Tensor], rows: Iterable[Row]) -> dict[str, Tensor]:
    """Our state dict under their names. ValueError: see `to_theirs`."""
    return _made(state, to_theirs(_sizes(state), rows))


def _sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: weight.shape[0] if weight.ndim else 1 for name, weight in state.items()}


def _made(state: Mapping[str, Tensor], pieces: Pieces) -> dict[str, Tensor]:
    made = {}
    for name, of in pieces.of.items():
        if len(of) == 1 and len(of[0].rows) == _sizes({"": state[of[0].source]})[""]:
            made[name] = of[0].transform(state[of[0].source])
        else:
            made[name] = torch.cat([p.transform(state[p.source][p.rows.start : p.rows.stop]) for p in of])
    return made


def decoder_to_hf(state: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """As transformers saves it: a tied output layer is left out."""
    return _untied(write(state, DECODER_ROWS), config)


def vlm_to_hf(state: Mapping[str, Tensor], config: VLMConfig) -> dict[str, Tensor]:
    """A Lfm2VlForConditionalGeneration; a tied output layer is left out."""
    return _untied(write(state, VLM_ROWS), config.decoder)


def _untied(named: dict[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    return {name: w for name, w in named.items() if name != "lm_head.weight" or not config.tied_embeddings}
