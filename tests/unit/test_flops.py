"""FLOPs against PyTorch's counter, on rows without padding."""

from itertools import combinations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments.vlm.batch import Batch
from experiments.vlm.config import PARTS
from experiments.vlm.costs.flops import Work, count_flops, flops_of_work, image_pairs
from experiments.vlm.model.config import EncoderConfig, ProjectorConfig, VLMConfig
from experiments.vlm.model.towers import dinov3
from experiments.vlm.model.vlm import VLM
from experiments.vlm.parallelism.stages import stage_costs
from tests.reference.batches import Sizes, build_batch, draw_picture, words
from tests.reference.models import ENCODER, LLAMA, QWEN2, small_vlm
from tests.reference.small_run import PATCHES, SEQ_LEN, job_of
from torchtitan.components import freezing
from torchtitan.components.flops import causal_pairs, product_flops, segment_pairs, total_of
from torchtitan.components.lora import adapt
from torchtitan.config.job import LoRA
from torchtitan.config.layout import Degrees
from torchtitan.models.decoder.flavors import DecoderConfig

SIZES = Sizes(seq_len=32, patches_per_row=48)
FREEZES = [frozen for count in range(len(PARTS)) for frozen in combinations(PARTS, count)]
BY_TENSOR = [
    (r"encoder\.layers\.0", r"decoder\.layers\.0\.attention\.wq"),
    ("encoder", "projector", "tok_embeddings", r"decoder\.layers\.0"),
    ("encoder", "projector", "tok_embeddings", r"layers\.\d\.(?!attention\.wk)", "output"),
    ("encoder", "projector", "decoder.(?!layers.0.feed_forward.w3)"),
    ("encoder.(?!layers.1.attention.wo)", "projector", "decoder"),
    ("weight",),  # biases alone train, where there are any
    ("encoder.(?!embedding.positions)", "projector.linear_1", "norm"),
    ("encoder", "projector", "lora", r"decoder\.layers\.1.*(wk|wv|w3)$"),
    ("projector.linear_1", "lora", "layers.0.attention.w[qo]", "fc2"),
]


def full_batch() -> Batch:
    """Both rows filled to the last token and patch."""
    pictures = [draw_picture(4, 8, 4, 0), draw_picture(4, 4, 4, 1)]
    slots = [
        [[words(4, 0), pictures[0], words(4, 1)], [words(8, 2), pictures[1], words(4, 3)]] for _ in range(2)
    ]
    tensors = build_batch(slots, SIZES)
    assert (tensors["document_ids"] >= 0).all() and (tensors["grid_thw"][..., 0] >= 0).all()
    return Batch(tensors, {"tokens": 64, "patches": 96}, [])


def frozen_model(freeze: tuple[str, ...], norm: bool = True, decoder: DecoderConfig = LLAMA) -> VLM:
    """`norm`: of the projector, before its matrices. What is frozen after "lora" has adapters."""
    model = VLM(VLMConfig(ENCODER, ProjectorConfig(56, norm), decoder), decoder.vocab_size, "sdpa", 16)
    if "lora" in freeze:
        adapt(model, LoRA(rank=3, patterns=list(freeze[freeze.index("lora") + 1 :])))
        freeze = freeze[: freeze.index("lora")]
    freezing.freeze(model, freeze)
    return model


@pytest.mark.parametrize(
    ("norm", "decoder"), [(True, LLAMA), (False, QWEN2)], ids=["norm, untied", "no norm, tied"]
)
@pytest.mark.parametrize("freeze", [*FREEZES, *BY_TENSOR], ids=" ".join)
def test_flops_equal_those_that_pytorch_counts(freeze, norm, decoder):
    model, batch = frozen_model(freeze, norm, decoder), full_batch()
    backward = {id(tower): 0 for tower in (model.encoder, model.decoder)}  # layers with one in attention
    for tower in (model.encoder, model.decoder):
        for layer in tower.layers.values():
            layer.attention.inner.register_forward_hook(
                lambda module, qkv, out, tower=tower: backward.update(
                    {id(tower): backward[id(tower)] + out.requires_grad}
                )
            )
    with FlopCounterMode(display=False) as counter:
        model(**batch.tensors).sum().backward()
    config, trained = model.config, model.encoder.embedding.positions.weight.requires_grad
    # The counter also sees what is not useful work. The resized position table is a product, once or twice:
    table = 2 * 96 * config.encoder.position_grid**2 * config.encoder.dim * (2 if trained else 1)
    # a causal call is counted with its upper triangle, and attention's backward computes the scores again (5
    # products for 4):
    allowed = sum(n * (n + 1) // 2 for n in (16, 16)) * 2
    whole = sum(n * n for n in (16, 16)) * 2
    causal, layers = 4 * config.decoder.heads * config.decoder.head_dim, backward[id(model.decoder)]
    images = 4 * config.encoder.dim * backward[id(model.encoder)] * sum(n * n for n in (32, 16)) * 2
    again = layers * causal * whole // 2 + images // 2
    extra = table + causal * (whole - allowed) * (config.decoder.layers + 2 * layers) + again
    assert counter.get_total_flops() - extra == count_flops(model)(batch)


@pytest.mark.parametrize("freeze", [(), ("encoder",), ("projector", "decoder")], ids=" ".join)
def test_flops_of_a_tower_with_registers_and_layers_behind_its_feature_are_those_that_pytorch_counts(freeze):
    """Extra cells pass the layers, but are neither pixels nor visual tokens."""
    tower = EncoderConfig(
        48, 3, 4, 80, 4, **dinov3.KIND, **dinov3.PLAIN, gated_mlp=True, feature_layers=(1, -2)
    )
    model = VLM(VLMConfig(tower, ProjectorConfig(56, merge_size=1), LLAMA), LLAMA.vocab_size, "sdpa", 16)
    freezing.freeze(model, freeze)
    sizes = Sizes(seq_len=32, patches_per_row=22, merge=1, extra=5)
    pictures = [draw_picture(2, 4, 4, 0), draw_picture(2, 2, 4, 1)]
    documents = [[words(4, 0), pictures[0], words(4, 1)], [words(6, 2), pictures[1], words(6, 3)]]
    batch = Batch(build_batch([documents], sizes), {"tokens": 32, "patches": 22}, [])
    assert (batch.tensors["grid_thw"][..., 0] >= 0).all()
    with FlopCounterMode(display=False) as counter:
        model(**batch.tensors).sum().backward()
    trains, products = "encoder" not in freeze, product_flops(model)
    not_useful = 10 * (products["encoder.embedding.projection"] + total_of("projector", products))
    not_useful += 2 * 22 * 5 * 48 * (1 + trains)  # vectors of the extra cells, by a product
    # Scores again in backward, in the two layers of each tower; and the upper triangle of what is causal.
    whole, triangles, images = 2 * 16**2, 2 * 16 * 17 // 2, 13**2 + 9**2
    not_useful += (2 * 2 * 48 * images) * trains + 2 * 2 * 64 * whole
    not_useful += 4 * 64 * (whole - triangles) * 2 * 3
    assert counter.get_total_flops() - not_useful == count_flops(model)(batch)
    job = job_of({"activation_checkpoint.mode": "none", "activation_checkpoint.encoder_mode": "none"}, "")
    layers, first, last = stage_costs(model, job, Degrees(1, 1, 1, 1, 2))
    assert first + sum(layers) + last == flops_of_work(model)(Work(PATCHES, SEQ_LEN, 0, 0))


@pytest.mark.parametrize("freeze", [*FREEZES, *BY_TENSOR], ids=" ".join)
def test_the_split_of_a_pipeline_counts_the_same_products(freeze):
    job, model = job_of({}, "unused"), frozen_model(freeze)
    job.activation_checkpoint.mode = job.activation_checkpoint.encoder_mode = "none"
    layers, first, last = stage_costs(model, job, Degrees(1, 1, 1, 1, 2))
    products = Work(PATCHES, SEQ_LEN, image_pairs=0, causal_pairs=0)
    assert first + sum(layers) + last == flops_of_work(model)(products)


def test_padding_is_no_useful_work():
    model, batch = small_vlm(), full_batch()
    wider = Sizes(seq_len=64, patches_per_row=96)
    pictures = [draw_picture(4, 8, 4, 0), draw_picture(4, 4, 4, 1)]
    slots = [
        [[words(4, 0), pictures[0], words(4, 1)], [words(8, 2), pictures[1], words(4, 3)]] for _ in range(2)
    ]
    padded = Batch(build_batch(slots, wider), batch.counts, [])
    assert count_flops(model)(padded) == count_flops(model)(batch)


def test_pairs_of_segments_and_of_causal_documents():
    documents = torch.tensor([[0, 0, 0, 1, 1, -1]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
    assert causal_pairs(positions, documents) == 3 * 4 // 2 + 2 * 3 // 2
    assert segment_pairs(torch.tensor([True, False, False, True])) == 9 + 1
    assert segment_pairs(torch.zeros(0, dtype=torch.bool)) == 0
    assert image_pairs(full_batch().tensors["grid_thw"]) == 2 * (32**2 + 16**2)
