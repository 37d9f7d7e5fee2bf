"""Adapters of frozen maps: they change nothing at first, and can become part of the weights."""

import copy

import pytest
import torch
from torch import nn

from tests.reference.batches import Sizes, build_batch, example_slots
from tests.reference.models import QWEN2, QWEN3, randomise, small_vlm
from tests.reference.small_run import weights_of
from torchtitan.components.freezing import freeze
from torchtitan.components.lora import adapt
from torchtitan.config.errors import ConfigError
from torchtitan.config.job import LoRA
from torchtitan.config.recomputation import Recomputation
from torchtitan.distributed.activation_checkpoint import apply_activation_checkpoint
from torchtitan.layers.lora import is_adapters, merge, names_of

BATCH = build_batch(example_slots(2), Sizes(seq_len=64, patches_per_row=96))
UNLABELLED = {name: tensor for name, tensor in BATCH.items() if name != "labels"}
BOTH = LoRA(rank=4, alpha=8.0, patterns=["encoder", r"layers.*\.(w[qv2]|linear_1)$"])


def adapted(options: LoRA = BOTH, decoder=QWEN2, seed: int = 0):
    model = small_vlm(decoder)
    adapt(model, options)
    model.init_weights(seed)
    randomise(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("lora.B.weight"):
                weight.zero_()
    return model


def base_of(model):
    plain = small_vlm(model.config.decoder)
    plain.load_state_dict({n: w for n, w in model.state_dict().items() if not is_adapters(n)})
    return plain


@pytest.mark.parametrize("decoder", [QWEN2, QWEN3], ids=["biases, tied", "qk norm"])
def test_with_b_zero_outputs_are_the_bases_bit_for_bit(decoder):
    model = adapted(decoder=decoder)
    assert torch.equal(model(**UNLABELLED), base_of(model)(**UNLABELLED))


def test_init_weights_makes_b_zero_and_a_not():
    model = small_vlm()
    adapt(model, BOTH)
    model.init_weights(3)
    for name, weight in model.named_parameters():
        if is_adapters(name):
            assert bool(weight.any()) == name.endswith("A.weight"), name


def trained(steps: int = 3, **options):
    model = adapted(LoRA(**{"rank": 4, "patterns": BOTH.patterns, **options}))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        (model(**BATCH).sum() / 50).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def merged(state, scale: float) -> dict:
    """A state dict without adapters that computes the same."""
    bare = {name: weight for name, weight in state.items() if not is_adapters(name)}
    factors = {name: names_of(name) for name in bare if names_of(name)[0] in state}
    return bare | {name: merge(bare[name], state[a], state[b], scale) for name, (a, b) in factors.items()}


@pytest.mark.parametrize("alpha", [4.0, 16.0])
def test_merged_equals_unmerged(alpha):
    model = trained(alpha=alpha)
    plain = small_vlm(QWEN2)
    plain.load_state_dict(merged(model.state_dict(), alpha / 4))
    difference = (model(**UNLABELLED) - plain(**UNLABELLED)).abs().max()
    assert difference < 1e-5 * model(**UNLABELLED).abs().max()
    assert (plain(**UNLABELLED) - base_of(model)(**UNLABELLED)).abs().max() > 1e-2, "something was learnt"


def test_only_adapters_of_a_tower_train_and_its_base_stays():
    model = trained()
    of_towers = {n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("projector")}
    assert of_towers and all(map(is_adapters, of_towers))
    before = adapted(LoRA(rank=4, patterns=BOTH.patterns)).state_dict()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) != weight.requires_grad, name


def test_freezing_leaves_adapters_alone():
    model = adapted()
    freeze(model, ["decoder", "encoder", "projector"])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if is_adapters(n)
    }


def test_dropout_is_drawn_in_training_alone_and_the_same_again_in_recomputation():
    model = adapted(LoRA(rank=4, dropout=0.5, patterns=["decoder"]))
    randomise(model)
    recomputing = copy.deepcopy(model)
    apply_activation_checkpoint(recomputing.decoder.layers, Recomputation("full"))
    found = []
    for each in (model, recomputing):
        torch.manual_seed(0)
        loss = each(**BATCH).sum()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in each.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(model(**BATCH), model(**BATCH))
    assert torch.equal(model.eval()(**BATCH), model(**BATCH))


def test_the_output_layer_and_tables_are_no_maps_to_adapt():
    model = adapted(LoRA(rank=2, patterns=["decoder"]))
    names = {n.partition(".lora.")[0] for n, _ in model.named_parameters() if is_adapters(n)}
    assert names == {
        n for n, m in base_of(model).decoder.named_modules(prefix="decoder") if type(m) is nn.Linear
    }


@pytest.mark.parametrize("pattern", ["decodr", "tok_embeddings", "decoder.output"])
def test_a_pattern_without_a_map_is_an_error(pattern):
    with pytest.raises(ConfigError, match=f"lora.patterns = {pattern}: no linear map is called so"):
        adapt(small_vlm(), LoRA(rank=2, patterns=["encoder", pattern]))


def test_adapters_start_beside_a_checkpoint_of_the_base_go_on_and_are_not_dropped(tmp_path):
    lora = {"lora.rank": 4, "training.freeze": ["encoder", "projector"]}
    before = weights_of(tmp_path / "base", 1)
    start = {"checkpoint.initial_load_path": str(tmp_path / "base" / "checkpoint" / "step-1")}
    first = weights_of(tmp_path / "lora", 2, **start, **lora)
    assert {name: w for name, w in first.items() if not is_adapters(name)}.keys() == before.keys()
    assert all(torch.equal(first[name], weight) for name, weight in before.items())
    assert all(first[name].any() for name in first if is_adapters(name))
    resumed = weights_of(tmp_path / "lora", 3, **start, **lora)
    straight = weights_of(tmp_path / "straight", 3, **start, **lora)
    assert all(torch.equal(resumed[name], weight) for name, weight in straight.items())
    start = {"checkpoint.initial_load_path": str(tmp_path / "lora" / "checkpoint" / "step-2")}
    second_stage = weights_of(tmp_path / "second", 0, **start, **lora)
    assert all(torch.equal(second_stage[name], weight) for name, weight in first.items())
    with pytest.raises(ConfigError, match="has an adapter model.decoder.*give the .lora. "):
        weights_of(tmp_path / "other", 0, **start)
    with pytest.raises(ConfigError, match="alpha is 2 times lora.rank, but 4 times in checkpoint .*step-2"):
        weights_of(tmp_path / "scaled", 0, **start, **lora, **{"lora.alpha": 8.0})
