"""Useful FLOPs: the encoder on patches, the projector on visual tokens, the decoder on tokens.

Formula: torchtitan/components/flops.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from experiments.vlm.batch import Batch
from experiments.vlm.model.vlm import VLM
from torchtitan.components.flops import attention_passes, causal_pairs, product_flops, segment_pairs, total_of


@dataclass(frozen=True)
class Work:
    """What a model has to do: rows of its matrices, and pairs that attend to each other."""

    patches: int
    tokens: int
    image_pairs: int  # of patches of one image
    causal_pairs: int  # of tokens of one document


def image_pairs(grid_thw_NL3: Tensor) -> int:
    """Pairs of patches of one image."""
    t, h, w = grid_thw_NL3[grid_thw_NL3[..., 0] >= 0].unbind(-1)
    return segment_pairs((h == 0) & (w == 0))


def flops_of_work(model: VLM) -> Callable[[Work], int]:
    """`model` may be on the meta device, and must be whole. What is frozen is read from its parameters."""
    assert model.encoder is not None and model.projector is not None
    products, passes, decoder = product_flops(model), attention_passes(model), model.config.decoder
    a_patch, a_token = total_of("encoder", products), total_of("decoder", products)
    a_visual_token, merged = total_of("projector", products), model.projector.merged
    an_image_pair = 4 * model.config.encoder.dim * total_of("encoder", passes)
    a_causal_pair = 4 * decoder.heads * decoder.head_dim * total_of("decoder", passes)

    def of_work(work: Work) -> int:
        rows = a_patch * work.patches + a_visual_token * (work.patches // merged) + a_token * work.tokens
        return rows + an_image_pair * work.image_pairs + a_causal_pair * work.causal_pairs

    return of_work


def count_flops(model: VLM) -> Callable[[Batch], int]:
    """The work of a batch, without its padding."""
    flops = flops_of_work(model)

    def of_batch(batch: Batch) -> int:
        tensors, counts = batch.tensors, batch.counts
        causal = causal_pairs(tensors["positions"], tensors["document_ids"])
        return flops(Work(counts["patches"], counts["tokens"], image_pairs(tensors["grid_thw"]), causal))

    return of_batch
