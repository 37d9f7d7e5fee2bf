"""The model with its cache, as an engine runs it (torchtitan/generation/engine.py).

In a layout for answers each rank has all tokens and images of a call. In that of training the ranks of a
group divide them: tokens between blocks (tensor parallel), patch rows inside the encoder.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from experiments.vlm.batch import FIELDS, PLACING, BatchShape
from experiments.vlm.generate.prompt import Prompt
from torchtitan.components.loader import Tensors


class RankSlice(NamedTuple):
    """What this rank has of something that is divided evenly, in order."""

    rank: int
    ranks: int


class Share(NamedTuple):
    """What this rank has of a call."""

    tokens: RankSlice  # of each sequence, between blocks
    rows: RankSlice  # of patches, in the encoder; those of a prompt divide (see Prompter)


WHOLE = Share(RankSlice(0, 1), RankSlice(0, 1))


class CachedVLM:
    """Logits of a VLM whose layers hold a KVCache. `shape`: of a prompt's images, one slot.

    Letters: R sequences, Q tokens of each, K of them wanted, V words.
    """

    def __init__(self, model: nn.Module, shape: BatchShape, share: Share = WHOLE):
        self.model = model
        self.shape = shape
        self.share = share

    def __call__(
        self, tokens: Tensor, where: Tensors, keep: Tensor, prompt: Prompt | None, rich: bool
    ) -> Tensor:
        """See engine.Forward. Where no rank's prompt has images, the encoder does not run."""
        rank, ranks = self.share.tokens
        own = tokens.shape[1] // ranks
        # The output layer gathers one token from each rank; that of the rank which has the wanted one counts.
        near_R1 = (keep[:, None] - rank * own).clamp(0, own - 1)
        logits_RKV = self.model(tokens, **where, **self._images(tokens, prompt, rich), keep=near_R1)
        owner_R11 = (keep // own)[:, None, None]
        return logits_RKV.gather(1, owner_R11.expand(-1, 1, logits_RKV.shape[-1]))[:, 0]

    def of_all(self, tokens: Tensor, where: Tensors, prompt: Prompt | None, rich: bool) -> Tensor:
        """Logits [R, Q, V] of all tokens."""
        return self.model(tokens, **where, **self._images(tokens, prompt, rich))

    def _images(self, tokens: Tensor, prompt: Prompt | None, rich: bool) -> Tensors:
        """What the model reads besides the tokens, on their device."""
        if not rich:
            return {}
        width = tokens.shape[1]
        whole = prompt.tensors(width) if prompt else self._none(width)
        (rank, ranks), (row, rows) = self.share
        own = {name: whole[name].chunk(ranks, 1)[rank].contiguous() for name in PLACING if name in whole}
        own |= {name: whole[name].chunk(rows)[row] for name in ("pixel_values", "grid_thw")}
        return {name: tensor.to(tokens.device) for name, tensor in own.items()}

    def _none(self, width: int) -> Tensors:
        """The tensors of a prompt without images: the encoder sees one row of padding on each rank."""
        shape = replace(self.shape, seq_len=width, patch_rows=self.share.rows.ranks)
        return {
            name: torch.full(shape.of(name), FIELDS[name].padding, dtype=getattr(torch, FIELDS[name].dtype))
            for name in ("pixel_values", "grid_thw", *PLACING)
            if name in shape.fields
        }
