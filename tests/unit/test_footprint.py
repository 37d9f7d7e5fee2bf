"""What is seen of a unit on the meta device is what a run with real tensors keeps,
counted in two other ways.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from experiments.vlm.model.config import EncoderConfig
from experiments.vlm.model.vit import EncoderBlock
from tests.reference.live_memory import LiveMemory
from torchtitan.config.recomputation import Recomputation
from torchtitan.distributed.activation_checkpoint import apply_activation_checkpoint
from torchtitan.distributed.footprint import Footprint, as_one_kernel, footprints, fuse_norms
from torchtitan.layers import rope
from torchtitan.layers.attention import prepare_mask
from torchtitan.layers.masks import Mask
from torchtitan.models.decoder.flavors import DecoderConfig
from torchtitan.models.decoder.model import Block, LMHead

SLOTS, LENGTH, DIM = 2, 128, 64
DECODER = DecoderConfig(DIM, 1, 8, 4, 8, 192, 128, 1e4)
ENCODER = EncoderConfig(DIM, 1, 4, 256, patch_size=4)


def decoder_block(qk_norm: bool = False) -> nn.Module:
    config = DecoderConfig(DIM, 1, 8, 4, 8, 192, 128, 1e4, qk_norm=qk_norm)
    return Block(config, "sdpa")


def encoder_block() -> nn.Module:
    return EncoderBlock(ENCODER, "sdpa")


def other_encoder_block() -> nn.Module:
    """Every switch of a block thrown."""
    other = {"norm": "rms", "attention_biases": "qo", "mlp_bias": False, "layer_scale": True}
    return EncoderBlock(replace(ENCODER, **other, gated_mlp=True, activation="silu"), "sdpa")


ENCODER_BLOCKS = [encoder_block, other_encoder_block]


def blocks_of(
    make: Callable[[], nn.Module], count: int, dtype: torch.dtype, trains: bool, device: str
) -> nn.ModuleDict:
    with torch.device(device):
        blocks = nn.ModuleDict({str(i): make() for i in range(count)})
    return blocks.to(dtype).requires_grad_(trains)


def rest_of_arguments(make: Callable, device: str) -> tuple:
    """Arguments of a block after the residual stream: what a step prepares once for all layers."""
    segments = torch.zeros(SLOTS, LENGTH, dtype=torch.int32, device=device)
    mask = prepare_mask(Mask(segments, causal=make not in ENCODER_BLOCKS), "sdpa")
    if make in ENCODER_BLOCKS:
        return (mask,)
    if make not in BLOCKS:
        return ()
    return *rope.angles(
        torch.arange(LENGTH, device=device).expand(SLOTS, -1), DECODER.head_dim, 1e4, None
    ), mask


def run(blocks: nn.ModuleDict, x: Tensor, rest: tuple) -> Tensor:
    for block in blocks.values():
        x = block(x, *rest)
    return x


def seen(
    make: Callable, dtype: torch.dtype, trains: bool = True, mode: str = "none", on_gpu: bool = False
) -> Footprint:
    """What is seen of the second of three blocks: the first one's input is held by its caller."""
    blocks, rest = blocks_of(make, 3, dtype, trains, "meta"), rest_of_arguments(make, "meta")
    apply_activation_checkpoint(blocks, Recomputation(mode))
    if on_gpu:
        fuse_norms(blocks)
    x = torch.randn(SLOTS, LENGTH, DIM, dtype=dtype, device="meta", requires_grad=True)
    there = [*blocks.parameters(), x, *tensors_of(rest)]
    return footprints(dict(blocks.items()), lambda: run(blocks, x, rest).sum(), there, {})["1"]


def tensors_of(rest: tuple) -> list[Tensor]:
    return [
        leaf
        for part in rest
        for leaf in (part if isinstance(part, tuple) else (part,))
        if torch.is_tensor(leaf)
    ]


def bytes_kept(make: Callable, dtype: torch.dtype, trains: bool) -> int:
    """Bytes of all storages that autograd keeps of a real block, without parameters and what a step
    prepares.
    """
    block, rest = blocks_of(make, 1, dtype, trains, "cpu"), rest_of_arguments(make, "cpu")
    x = torch.randn(SLOTS, LENGTH, DIM, dtype=dtype, requires_grad=True)
    known = {tensor.untyped_storage().data_ptr() for tensor in (*block.parameters(), *tensors_of(rest))}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run(block, x, rest)
    assert out.requires_grad
    return sum(kept.values())


def decoder_block_with_norms() -> nn.Module:
    return decoder_block(qk_norm=True)


BLOCKS = [decoder_block, decoder_block_with_norms, *ENCODER_BLOCKS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("make", BLOCKS)
@pytest.mark.parametrize("trains", [True, False], ids=["trains", "frozen"])
def test_a_block_keeps_what_autograd_keeps(make, dtype, trains):
    # Mean and deviation of two LayerNorms are bfloat16 on CPU, and float32 elsewhere.
    rows = 2 * 2 * 2 * SLOTS * LENGTH if make is encoder_block and dtype == torch.bfloat16 else 0
    assert seen(make, dtype, trains).kept == bytes_kept(make, dtype, trains) + rows


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("make", [decoder_block, encoder_block])
def test_a_checkpointed_block_keeps_what_stays_alive(make, mode):
    alive = []
    for count in (2, 3):
        blocks, rest = blocks_of(make, count, torch.float32, True, "cpu"), rest_of_arguments(make, "cpu")
        apply_activation_checkpoint(blocks, Recomputation(mode))
        x = torch.randn(SLOTS, LENGTH, DIM, requires_grad=True)
        with LiveMemory() as memory:
            out = run(blocks, x, rest)
        weights = {parameter.untyped_storage()._cdata for parameter in blocks.parameters()}
        there = {key: reference() for key, reference in memory.storages.items() if key not in weights}
        alive.append(sum(storage.nbytes() for storage in there.values() if storage is not None))
        assert out.requires_grad
    assert seen(make, torch.float32, mode=mode).kept == alive[1] - alive[0]


def test_what_is_dropped_is_needed_again_in_backward():
    kept = {mode: seen(decoder_block, torch.float32, mode=mode) for mode in ("none", "selective", "full")}
    assert kept["full"].kept < kept["selective"].kept < kept["none"].kept
    assert kept["full"].backward - kept["none"].backward == pytest.approx(
        kept["none"].kept - kept["full"].kept, rel=0.1
    )


def test_gradients_of_weights_are_not_counted():
    width = 4 * SLOTS * LENGTH * DIM
    # While the middle one of three matrices works, the gradient of its result has taken the place of its
    # result.
    assert seen(lambda: nn.Linear(DIM, DIM, bias=False), torch.float32).backward == pytest.approx(
        width, abs=16
    )


def test_a_norm_of_one_kernel_keeps_its_input_alone():
    plain, fused = (seen(decoder_block, torch.bfloat16, on_gpu=on_gpu) for on_gpu in (False, True))
    width = SLOTS * LENGTH * DIM
    # Two norms: on CPU copies in float32 before and after the division; else the input, of which one is the
    # block's own.
    assert plain.kept - fused.kept == 2 * 2 * 4 * width - 2 * 2 * width


def test_a_loss_of_fused_passes_holds_the_logits_and_their_gradients_once_each():
    vocabulary, chunk = 4096, 64
    with torch.device("meta"):
        head = LMHead(DIM, vocabulary, chunk).bfloat16()
        x, labels = torch.randn(SLOTS, LENGTH, DIM).bfloat16().requires_grad_(), torch.zeros(SLOTS, LENGTH)
    head.fuse = as_one_kernel
    there = [*head.parameters(), x, labels]
    found = footprints({"output": head}, lambda: head(x, labels.long()), there, {})["output"]
    # Both in bfloat16; numbers a token aside, what stays (gradients: of the weights in float32) is `kept`.
    assert found.forward == pytest.approx(2 * 2 * chunk * vocabulary, rel=0.01)
    assert found.kept == pytest.approx(4 * vocabulary * DIM + x.nbytes, rel=0.01)
