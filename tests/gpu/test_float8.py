"""fp8 as a GPU multiplies it: the numbers of the emulation, and a run that loses what bfloat16 loses.

pytest tests/gpu
"""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.gpu.test_losses import AGAIN, COMPILED, losses_of
from torchtitan.components.float8 import CAPABILITY, convert
from torchtitan.config.float8 import Share
from torchtitan.config.job import Float8

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < CAPABILITY,
    reason=f"needs a GPU of compute capability {CAPABILITY}",
)
RECIPES = ("rowwise", "rowwise_with_gw_hp")
FP8: dict[str, Any] = {"float8.enable": True, "float8.patterns": ["encoder", "projector", "decoder"]}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_products_are_those_of_the_emulation(recipe, compiled):
    torch.manual_seed(0)
    torch._dynamo.reset()
    plain = nn.ModuleDict({"decoder": nn.ModuleDict({"map": nn.Linear(512, 256)})}).cuda().bfloat16()
    x, grad = (torch.randn(2, 128, width).cuda().bfloat16() for width in (512, 256))
    found = []
    for emulate in (False, True):
        model = copy.deepcopy(plain)
        options = Float8(enable=True, recipe_name=recipe, filter_fqns=[], emulate=emulate)
        convert(model, options, {"decoder": Share(rows=256)})
        linear, given = model["decoder"]["map"], x.clone().requires_grad_()
        if compiled and not emulate:
            linear.compile(fullgraph=True)
        out = linear(given)
        out.backward(grad)
        found.append((out, given.grad, linear.weight.grad, linear.bias.grad))
    for ours, emulated in zip(*found, strict=True):
        # The products are the same sums; both are rounded to bfloat16, one of them twice.
        assert (ours.float() - emulated.float()).norm() < 1e-2 * emulated.float().norm()


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_hundred_steps_lose_what_bfloat16_loses(recipe, tmp_path):
    reference = losses_of(COMPILED, tmp_path / "bfloat16")
    losses = losses_of(COMPILED | FP8 | {"float8.recipe_name": recipe}, tmp_path / "fp8")
    assert reference[-AGAIN:].mean() < 0.8 * reference[:AGAIN].mean(), "something is learned"
    assert torch.isfinite(losses).all() and not torch.equal(losses, reference)
    ours, theirs = losses.view(-1, AGAIN).mean(1), reference.view(-1, AGAIN).mean(1)
    # Five batches are learned by heart so fast that a delay of a few steps is a large ratio. Emulated: 0.035.
    assert (ours - theirs).abs().max() < 0.1 * theirs[0]
    assert ours[-1] < 0.3 * ours[0]


@pytest.mark.parametrize("rows", [1, 3])
def test_an_answer_of_few_rows_is_computed_too(rows):
    """Tasks that a run answers while it trains take its own model."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"decoder": nn.ModuleDict({"map": nn.Linear(512, 256)})}).cuda().bfloat16()
    exact = copy.deepcopy(model["decoder"]["map"])
    convert(model, Float8(enable=True, filter_fqns=[]), {"decoder": Share(rows=256)})
    x = torch.randn(rows, 1, 512).cuda().bfloat16()
    with torch.no_grad():
        found, expected = model["decoder"]["map"](x), exact(x)
    assert (found - expected).norm() < 0.1 * expected.norm()
