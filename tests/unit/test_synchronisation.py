"""Forward and backward never ask the device for a value: on a GPU the host would wait there, every step."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.vlm.model.towers import aimv2, clip, dinov3
from tests.reference.batches import Sizes, build_batch, example_slots
from tests.reference.models import LLAMA, QWEN2, QWEN3, small_vlm
from torchtitan.layers.attention import BACKENDS
from torchtitan.layers.masks import Mask

aten = torch.ops.aten
# What returns a value to the host, or a tensor whose shape depends on values.
WAITS = {
    aten._local_scalar_dense,
    aten.item,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_consecutive,
    aten.unique_dim,
    aten.is_nonzero,
    aten.equal,
    aten.repeat_interleave.Tensor.overloadpacket,
}


class Trap(TorchDispatchMode):
    """Raises where an operation would wait.

    Operators of our own count as one step: what is inside runs on CPU alone.
    """

    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.seen.add(str(func))
        packet = func.overloadpacket
        by_size = packet is aten.repeat_interleave and not isinstance(args[-1], torch.Tensor)
        if packet in WAITS and not by_size:
            raise AssertionError(f"{func} waits for the device")
        if packet in (aten.index, aten.index_put, aten.index_put_) and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        ):
            raise AssertionError(f"{func} with a mask has a shape that depends on data")
        device = kwargs.get("device")
        if packet is aten._to_copy and device is not None and torch.device(device) != args[0].device:
            raise AssertionError(f"{func} copies to {device}")
        return func(*args, **kwargs)


def batch_on(device: str, extra: int = 0) -> dict[str, torch.Tensor]:
    batch = build_batch(example_slots(2), Sizes(seq_len=56, patches_per_row=120, extra=extra))
    return {name: tensor.to(device) for name, tensor in batch.items()}


KINDS = {
    "llama": (LLAMA, {}),
    "qwen2": (QWEN2, {}),
    "qwen3": (QWEN3, {}),
    "clip": (QWEN3, clip.KIND),
    "aimv2": (QWEN3, aimv2.KIND | aimv2.PLAIN | {"positions": "waves"}),
    "dinov3": (QWEN3, dinov3.KIND | dinov3.PLAIN),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_forward_and_backward_never_wait(device, kind, monkeypatch):
    """On the meta device with dense masks, as a GPU has them; there a value does not even exist."""
    if device == "meta":
        monkeypatch.setitem(BACKENDS, "sdpa", BACKENDS["sdpa"]._replace(prepare=Mask.dense))
    config, tower = KINDS[kind]
    model = small_vlm(config, **tower).to(device)
    batch = batch_on(device, model.config.encoder.extra_cells)
    model.decoder.output.sources, batch["source_ids"] = 2, batch["document_ids"] % 2
    with Trap() as trap:
        losses = model(**batch)
        losses.sum().backward()
    assert losses.shape == (3,)
    assert any("segment_attention" in name for name in trap.seen) == (device == "cpu")
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_scores_and_logits_never_wait():
    model, batch = small_vlm(), batch_on("meta")
    model.to("meta")
    with Trap(), torch.no_grad():
        model(**batch, per_token=True)
        labels = batch.pop("labels")
        assert model(**batch).shape == (*labels.shape, 96)


def test_building_the_block_mask_never_waits():
    from torchtitan.layers.flex import block_mask
    from torchtitan.layers.masks import Mask

    batch = batch_on("cpu")
    with Trap():
        block_mask(Mask(batch["document_ids"], causal=True))


def test_the_trap_works():
    x = torch.arange(4.0)
    for waits in (
        lambda: x.sum().item(),
        lambda: x[x > 1],
        lambda: x.nonzero(),
        lambda: bool(x[0] > 1),
        lambda: x.to("meta"),
    ):
        with pytest.raises(AssertionError), Trap():
            waits()
