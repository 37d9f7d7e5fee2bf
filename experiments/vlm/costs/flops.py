"""Useful FLOPs: the encoder on patches, the projector on visual tokens, the decoder on tokens.

Formula: torchtitan/components/flops.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from experiments.vlm.batch import Batch
from experiments.vlm.model.positions import is_extra
from experiments.vlm.model.vlm import VLM
from torchtitan.components.flops import attention_passes, causal_pairs, product_flops, segment_pairs, total_of


@dataclass(frozen=True)
class Work:
    """What a model has to do: rows of its matrices, and pairs that attend to each other."""

    patches: int  # of images; in the encoder each image has its extra cells besides
    tokens: int
    image_pairs: int  # of patches of one image
    causal_pairs: int  # of tokens of one document
    extra: int = 0  # cells of class tokens and registers


def image_pairs(grid_thw_NL3: Tensor) -> int:
    """Pairs of cells of one image."""
    t, h, w = grid_thw_NL3[grid_thw_NL3[..., 0] >= 0].unbind(-1)
    return segment_pairs((h == 0) & (w == 0))


def flops_of_work(model: VLM) -> Callable[[Work], int]:
    """Work -> FLOPs. `model`: whole, on any device; its parameters say what is frozen."""
    assert model.encoder is not None and model.projector is not None
    products, passes, decoder = product_flops(model), attention_passes(model), model.config.decoder
    encoder, running = model.config.encoder, [f"encoder.{name}" for name in model.encoder.running()]
    a_cell = sum(total_of(name, products) for name in running if name != "encoder.embedding")
    a_patch, a_token = a_cell + total_of("encoder.embedding", products), total_of("decoder", products)
    a_visual_token, merged = total_of("projector", products), model.projector.merged
    an_image_pair = 4 * encoder.dim * sum(total_of(name, passes) for name in running)
    a_causal_pair = 4 * decoder.heads * decoder.head_dim * total_of("decoder", passes)

    def of_work(work: Work) -> int:
        visual_tokens = work.patches // merged + work.extra * encoder.feature_extra
        rows = a_patch * work.patches + a_visual_token * visual_tokens + a_token * work.tokens
        rows += a_cell * work.extra
        return rows + an_image_pair * work.image_pairs + a_causal_pair * work.causal_pairs

    return of_work


def count_flops(model: VLM) -> Callable[[Batch], int]:
    """Batch -> its FLOPs, without padding."""
    flops, has_extra = flops_of_work(model), model.config.encoder.extra_cells > 0

    def of_batch(batch: Batch) -> int:
        tensors, counts = batch.tensors, batch.counts
        grid_thw, causal = tensors["grid_thw"], causal_pairs(tensors["positions"], tensors["document_ids"])
        extra = int(is_extra(grid_thw).sum()) if has_extra else 0
        patches = counts["patches"] - extra  # all cells were counted
        return flops(Work(patches, counts["tokens"], image_pairs(grid_thw), causal, extra))

    return of_batch
