"""What is computed again in backward, and that gradients do not notice."""

import copy
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.reference.batches import Sizes, build_batch, example_slots
from tests.reference.models import small_vlm
from torchtitan.config.recomputation import Recomputation
from torchtitan.distributed.activation_checkpoint import apply_activation_checkpoint

BATCH = build_batch(example_slots(2), Sizes(seq_len=64, patches_per_row=96))
MODEL = small_vlm()
LAYERS = 2


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count[str(operator)] += 1
        return operator(*args, **(kwargs or {}))


def run(decoder: tuple, encoder: tuple) -> tuple[Counter[str], dict[str, torch.Tensor]]:
    """Operator calls of a forward and backward, and the gradients by the plain model's names."""
    model = copy.deepcopy(MODEL)
    apply_activation_checkpoint(model.decoder.layers, Recomputation(*decoder))
    apply_activation_checkpoint(model.encoder.layers, Recomputation(*encoder))
    with Calls() as calls:
        model(**BATCH).sum().backward()
    names = (
        (name.replace("_checkpoint_wrapped_module.", ""), p.grad) for name, p in model.named_parameters()
    )
    return calls.count, {name: gradient for name, gradient in names if gradient is not None}


NONE = ("none", "op")


@pytest.mark.parametrize(
    ("decoder", "encoder", "attentions"),
    [
        (NONE, NONE, 2 * LAYERS),
        (("full", "op"), NONE, 3 * LAYERS),
        (("full", "op"), ("full", "op"), 4 * LAYERS),
        (("selective", "op"), ("selective", "op"), 2 * LAYERS),
        (("selective", "2"), NONE, 2 * LAYERS + 1),
        (("none", "op", 1), ("none", "op", 0, 1), 2 * LAYERS + 1),
        (("none", "op", 1, 1), ("none", "op", 2), 2 * LAYERS + 3),
    ],
)
def test_recomputed_work_and_equal_gradients(decoder, encoder, attentions):
    plain_calls, plain = run(NONE, NONE)
    calls, gradients = run(decoder, encoder)
    assert calls["torchtitan.segment_attention.default"] == attentions
    if attentions == 2 * LAYERS:
        assert calls["aten.mm.default"] == plain_calls["aten.mm.default"], "matrix products are kept"
    assert gradients.keys() == plain.keys()
    # The same operations on the same numbers: not a digit may differ.
    assert all(torch.equal(gradients[name], gradient) for name, gradient in plain.items())
