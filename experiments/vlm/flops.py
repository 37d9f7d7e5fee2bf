"""Useful FLOPs of a batch: the encoder on its patches, the projector on visual tokens, the decoder on its tokens (formula:
torchtitan/components/flops.py)."""

from collections.abc import Callable

from torch import Tensor

from experiments.vlm.batch import Batch
from experiments.vlm.config import VLMJobConfig
from experiments.vlm.model.vlm import VLM
from torchtitan.components.flops import Backward, attention_flops, causal_pairs, matrix_parameters, product_flops, segment_pairs


def image_pairs(grid_thw_NL3: Tensor) -> int:
    """Pairs of patches of one image."""
    t, h, w = grid_thw_NL3[grid_thw_NL3[..., 0] >= 0].unbind(-1)
    return segment_pairs((h == 0) & (w == 0))


def count_flops(job: VLMJobConfig, model: VLM) -> Callable[[Batch], int]:
    """`model` may be on the meta device, and must be whole. Frozen parts need no gradients of their weights."""
    assert model.encoder is not None and model.projector is not None
    config, frozen = model.config, set(job.training.freeze)
    trains = {part: part not in frozen for part in ("encoder", "projector", "decoder")}
    encoder = Backward(weights=trains["encoder"], inputs=trains["encoder"])
    embedding = Backward(weights=trains["encoder"], inputs=False)  # nobody asks for the gradient of pixels
    # Its norm trains and lies before both its matrices.
    projector = Backward(trains["projector"], inputs=trains["projector"] or trains["encoder"])
    # The token embeddings train with the decoder, and lie before all its layers.
    decoder = Backward(trains["decoder"], inputs=any(trains.values()))
    embedding_size = matrix_parameters(model.encoder.embedding)
    encoder_size = matrix_parameters(model.encoder) - embedding_size
    projector_size, decoder_size = matrix_parameters(model.projector), matrix_parameters(model.decoder)
    merged = job.data.spatial_merge_size**2

    def of_batch(batch: Batch) -> int:
        tensors, tokens, patches = batch.tensors, batch.counts["tokens"], batch.counts["patches"]
        causal = causal_pairs(tensors["positions"], tensors["document_ids"])
        return (
            product_flops(embedding_size, patches, embedding)
            + product_flops(encoder_size, patches, encoder)
            + attention_flops(config.encoder.dim, config.encoder.layers, image_pairs(tensors["grid_thw"]), encoder)
            + product_flops(projector_size, patches // merged, projector)
            + product_flops(decoder_size, tokens, decoder)
            + attention_flops(config.decoder.heads * config.decoder.head_dim, config.decoder.layers, causal, decoder)
        )

    return of_batch
