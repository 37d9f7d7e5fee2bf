"""Options of some parameters: who belongs to which group, and what a step then does to each."""

import pytest
import torch

from tests.reference.models import QWEN2, small_vlm
from torchtitan.components.freezing import freeze
from torchtitan.components.lr_scheduler import Schedule
from torchtitan.components.muon import orthogonalise
from torchtitan.components.optimizer import Optimizers
from torchtitan.components.parameter_groups import peak_rates, settings
from torchtitan.config.errors import ConfigError
from torchtitan.config.job import LRScheduler, Optimizer, ParameterGroup

LAYERS = 2  # of both towers
ENCODER = ParameterGroup("encoder", lr=1e-2, weight_decay=0.0, muon_lr=3e-2)
FIRST_LAYER = ParameterGroup(r"decoder\.layers\.0\.", name="first", schedule_factor=0.25)
DECODER = ParameterGroup("decoder", lr=4e-3, weight_decay=0.5, schedule_factor=0.5, layer_decay=0.5)


def by_hand(name: str) -> tuple[float, float, float]:
    """Peak of AdamW, peak of Muon, weight decay; [optimizer] has 2e-3, 5e-2 and 0.1."""
    if name.startswith("encoder"):
        return 1e-2, 3e-2, 0.0
    if name.startswith("projector"):
        return 2e-3, 5e-2, 0.1
    if name.startswith("decoder.layers.0."):  # the group before `decoder`
        return 2e-3 / 4, 5e-2 / 4, 0.1
    # Two layers: embedding 0, layers 1 and 2, what comes after 3.
    halves = {"tok_embeddings": 3, "layers": 1, "norm": 0, "output": 0}[name.split(".")[1]]
    return 4e-3 / 2 / 2**halves, 5e-2 / 2 / 2**halves, 0.5


@pytest.mark.parametrize("kind", ["AdamW", "Muon"])
def test_one_step_is_the_step_by_hand_for_each_group(kind):
    options = Optimizer(kind, lr=2e-3, muon_lr=5e-2, muon_momentum=0.0, weight_decay=0.1, eps=1e-6)
    options.groups = [ENCODER, FIRST_LAYER, DECODER]
    model = small_vlm()
    optimizers = Optimizers([model], options, settings(model, options), model.ADAMW_ONLY)
    schedule = Schedule(optimizers, 10, LRScheduler(warmup_steps=4))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    schedule.advance()
    optimizers.step()
    for name, parameter in model.named_parameters():
        lr, muon_lr, decay = (
            value * share for value, share in zip(by_hand(name), (0.25, 0.25, 1), strict=True)
        )
        rows, gradient = parameter.shape[0], parameter.grad
        if kind == "Muon" and parameter.ndim == 2 and not name.startswith(model.ADAMW_ONLY):
            (direction,) = orthogonalise(gradient[None], torch.float32)
            step = muon_lr * max(1, rows / parameter.shape[1]) ** 0.5 * direction
            expected = before[name] * (1 - muon_lr * decay) - step
        else:
            # The first step of AdamW is the sign of the gradient, but for eps.
            kept = before[name] * (1 - lr * decay * (parameter.ndim >= 2))
            expected = kept - lr * gradient / (gradient.abs() + 1e-6)
        assert torch.allclose(parameter, expected, rtol=0, atol=1e-6), name


def test_metrics_name_the_rate_of_every_group():
    options = Optimizer("Muon", lr=2e-3, muon_lr=5e-2, groups=[ENCODER, FIRST_LAYER])
    assert peak_rates(options) == {
        **{"lr": 2e-3, "lr/encoder": 1e-2, "lr/first": 5e-4},
        **{"muon_lr": 5e-2, "muon_lr/encoder": 3e-2, "muon_lr/first": 1.25e-2},
    }
    assert list(peak_rates(Optimizer())) == ["lr"]


def test_a_tied_table_belongs_to_the_first_group_that_either_name_matches():
    groups = [ParameterGroup("output", lr=1.0), ParameterGroup("decoder", lr=2.0)]
    found = settings(small_vlm(QWEN2), Optimizer(groups=groups))
    assert [name for name, setting in found.items() if setting.lr == 1.0] == ["decoder.tok_embeddings.weight"]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([ParameterGroup("encodr")], r"optimizer.groups\[0\].pattern = encodr: matches no parameter"),
        ([DECODER, FIRST_LAYER], r"optimizer.groups\[1\].pattern = .*has a group before this one"),
        ([ParameterGroup("projector.norm")], "all that it matches is frozen"),
        ([ParameterGroup("linear", layer_decay=0.9)], r"groups\[0\].layer_decay = 0.9: linear has no layers"),
    ],
    ids=["unmatched", "shadowed", "frozen", "no layers"],
)
def test_a_group_without_effect_is_an_error(groups, message):
    model = small_vlm()
    freeze(model, ["projector.norm"])
    with pytest.raises(ConfigError, match=message):
        settings(model, Optimizer(groups=groups))
