"""Initial weights: the same from a seed whatever the sharding,
and of a scale that training can start from.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from experiments.vlm.model.flavors import FLAVORS
from experiments.vlm.model.towers import clip, dinov3
from experiments.vlm.model.vlm import VLM
from tests.reference.batches import IMAGE_ID, Sizes, build_batch, draw_picture, words
from tests.reference.models import LLAMA, QWEN2, QWEN3, small_vlm
from tests.reference.ranks import on_two_ranks

CONFIGS = {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3}


def initialised(model: VLM, seed: int = 5) -> dict[str, torch.Tensor]:
    model.init_weights(seed)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_one_seed_gives_one_model_and_another_seed_another():
    first, again, other = (initialised(small_vlm(seed=i), seed) for i, seed in enumerate((5, 5, 6)))
    for name, weight in first.items():
        assert torch.equal(weight, again[name]), name
        if weight.ndim == 2 and "positions" not in name:
            assert not torch.equal(weight, other[name]), name


def test_no_two_matrices_start_alike():
    matrices = [weight.flatten()[:8] for weight in initialised(small_vlm()).values() if weight.ndim == 2]
    for i, a in enumerate(matrices):
        assert not any(torch.equal(a, b) for b in matrices[:i])


def _shards(rank: int) -> dict[str, dict[str, torch.Tensor]]:
    """This rank's shares: of each model under FSDP, built on the meta device; of one matrix along its other
    side.
    """
    mesh, shares = init_device_mesh("cpu", (2,)), {}
    for name, config in CONFIGS.items():
        with torch.device("meta"):
            model = VLM(small_vlm(config).config, 96, "sdpa", 16)
        for block in (*model.encoder.layers.values(), *model.decoder.layers.values()):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.to_empty(device="cpu")
        shares[name] = {key: weight.to_local() for key, weight in initialised(model).items()}
    model = small_vlm()
    layer = model.decoder.layers["0"].attention.wq
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(1)]))
    return shares | {
        "columns": {"weight": initialised(model)["decoder.layers.0.attention.wq.weight"].to_local()}
    }


@pytest.mark.slow
def test_two_ranks_start_from_the_weights_of_one_process(tmp_path):
    ranks = on_two_ranks(_shards, tmp_path)
    for name, config in CONFIGS.items():
        whole = initialised(small_vlm(config))
        assert whole.keys() == ranks[0][name].keys()
        for key, weight in whole.items():
            assert torch.equal(torch.cat([shares[name][key] for shares in ranks]), weight), (name, key)
    columns = torch.cat([shares["columns"]["weight"] for shares in ranks], 1)
    assert torch.equal(columns, initialised(small_vlm())["decoder.layers.0.attention.wq.weight"])


def test_wrappers_do_not_change_what_is_drawn():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    plain, model = initialised(small_vlm()), small_vlm()
    for number, layer in model.decoder.layers.items():
        model.decoder.layers[number] = torch.compile(checkpoint_wrapper(layer))
    for (name, weight), (_, wrapped) in zip(plain.items(), initialised(model).items(), strict=True):
        assert torch.equal(weight, wrapped), name


def test_tied_weights_are_one_after_the_meta_device():
    with torch.device("meta"):
        model = VLM(small_vlm(QWEN2).config, 96, "sdpa", 16)
    model.to_empty(device="cpu")
    model.init_weights(0)
    assert model.decoder.output.weight is model.decoder.tok_embeddings.weight


TOWERS = [{}, clip.KIND, dinov3.KIND | dinov3.PLAIN]


@pytest.mark.parametrize("tower", TOWERS, ids=["siglip2", "clip", "dinov3"])
def test_every_parameter_is_set(tower):
    model = small_vlm(**tower)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    for name, weight in initialised(model).items():
        assert weight.isfinite().all(), name


@pytest.mark.parametrize(
    ("tied", "tower"), [(False, {}), (True, {}), *((False, tower) for tower in TOWERS[1:])]
)
def test_the_first_loss_is_that_of_guessing(tied, tower):
    """ln V and about a half, since logits of deviation 1 add half their variance; features and logits are of
    order 1.
    """
    config = FLAVORS["debugmodel"]
    decoder, encoder = QWEN2 if tied else config.decoder, replace(config.encoder, **tower)
    model = VLM(type(config)(encoder, config.projector, decoder), 1024, "sdpa", 64)
    model.init_weights(0)
    picture = draw_picture(8, 8, encoder.patch_size, 0)
    sizes = Sizes(96, patches_per_row=72, patch_size=encoder.patch_size, extra=encoder.extra_cells)
    batch = build_batch([[[words(70, 0), picture, words(5, 1)]]], sizes)
    labels = batch.pop("labels")
    # Words are drawn below 96; the model must be judged on any of its tokens.
    labels = torch.where(
        labels >= 0,
        torch.randint(IMAGE_ID + 1, 1024, labels.shape, generator=torch.Generator().manual_seed(0)),
        labels,
    )
    loss = model(**batch, labels=labels) / (labels >= 0).sum()
    assert abs(loss.item() - math.log(1024) - 0.5) < 0.4
    assert 0.5 < model(**batch)[batch["document_ids"] >= 0].std() < 2
    assert 0.5 < model.encode(batch["pixel_values"], batch["grid_thw"]).std() < 2
