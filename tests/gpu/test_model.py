"""What only a GPU can show: FlexAttention's backward and compiled kernels, bfloat16, and a step that never
waits for the device.

pytest tests/gpu
"""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from experiments.vlm.model.vlm import VLM
from tests.reference.attention import allowed_pairs, dense_attention, packed
from tests.reference.batches import Document, Sizes, build_batch, draw_picture, words
from tests.reference.models import LLAMA, QWEN3, loss_and_gradients, small_vlm
from torchtitan.layers.attention import InnerAttention, prepare_mask
from torchtitan.layers.masks import Mask

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# FlexAttention's kernels want heads of at least 16 values, hence a wider encoder than the other tests have.
WIDTH = 64
SIZES = Sizes(seq_len=200, patches_per_row=300)


@pytest.fixture(autouse=True)
def _exact_float32():
    """TensorFloat-32 keeps 10 bits: the comparisons below want float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch._dynamo.reset()
    yield
    torch.set_float32_matmul_precision(before)


def masks() -> dict[str, Mask]:
    segments = packed([[130, 1, 160, 99], [300]], 420).cuda()
    order = torch.randperm(420, generator=torch.Generator().manual_seed(0)).cuda()
    rows = torch.arange(420, dtype=torch.int32, device="cuda").expand(2, -1)
    return {
        "images": Mask(segments, causal=False),
        "documents": Mask(segments, causal=True),
        "a multiple of the block": Mask(packed([[200, 312], [512]], 512).cuda(), causal=True),
        "nothing but padding": Mask(torch.full_like(segments, -1), causal=True),
        "some of the queries": Mask(segments[:, order[:200]], True, segments, rows[:, order[:200]], rows),
    }


def inputs(mask: Mask, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = mask.segments.shape[1], mask.keys().shape[1], mask.keys().shape[1]
    return [
        torch.randn(2, n, h, width, generator=generator).to("cuda", dtype).requires_grad_()
        for n, h in zip(lengths, (4, 2, 2), strict=True)
    ]


def result_and_gradients(attend, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    out = attend(*tensors)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad((out * weights).sum(), tensors)]


# Heads of 64 and 128 are the decoders', 72 the so400m encoder's, which is no power of two.
@pytest.mark.parametrize("width", [64, 72, 128])
@pytest.mark.parametrize("backend", ["flex", "sdpa"])
@pytest.mark.parametrize(
    "name", ["images", "documents", "a multiple of the block", "nothing but padding", "some of the queries"]
)
def test_result_and_gradients_equal_dense_attention(name, backend, width):
    mask = masks()[name]
    tensors, prepared = inputs(mask, width, torch.float32), prepare_mask(mask, backend)
    allowed = allowed_pairs(mask)
    ours = result_and_gradients(lambda *x: InnerAttention(backend)(*x, prepared), tensors)
    expected = result_and_gradients(lambda *x: dense_attention(*x, allowed), tensors)
    for a, b in zip(ours, expected, strict=True):
        # Triton's dot products of float32 are not summed as cuBLAS sums them
        assert (a - b).abs().max() < 1e-4
    assert not ours[0][~torch.as_tensor(allowed, device="cuda").any(-1)].any()


@pytest.mark.parametrize("backend", ["flex", "sdpa"])
@pytest.mark.parametrize("name", ["images", "documents"])
def test_bfloat16_stays_within_its_rounding(name, backend):
    mask = masks()[name]
    tensors, prepared = inputs(mask, 64, torch.bfloat16), prepare_mask(mask, backend)
    ours = result_and_gradients(lambda *x: InnerAttention(backend)(*x, prepared), tensors)
    expected = result_and_gradients(lambda *x: dense_attention(*x, allowed_pairs(mask)), tensors)
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).abs().max() < 0.03 * b.abs().max()


def slots(kind: int) -> list[list[Document]]:
    """Batches of one shape with images of other sizes and numbers; the last has none."""
    images = [[(4, 6), (2, 12)], [(10, 2), (8, 8), (2, 2)], [(16, 16)], []][kind]
    documents = [
        [words(7 + i, i), draw_picture(h, w, 4, i), words(5, i + 50)] for i, (h, w) in enumerate(images)
    ]
    return [[*documents, [words(40 - 5 * kind, 99)]], [[words(60 + kind, 7)], *documents[:1]]]


def batch_on_gpu(kind: int) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in build_batch(slots(kind), SIZES).items()}


def assert_close(ours: tuple, expected: tuple, tolerance: float) -> None:
    """Relative to the loss, and to the largest gradient of the model."""
    assert abs(ours[0].item() / expected[0].item() - 1) < tolerance
    largest = max(gradient.abs().max() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        assert (ours[1][name] - gradient).abs().max() < tolerance * largest, name


def compile_blocks(model: VLM, backend="inductor") -> VLM:
    for layer in (*model.encoder.layers.values(), *model.decoder.layers.values()):
        layer.compile(fullgraph=True, dynamic=False, backend=backend)
    return model


@pytest.mark.parametrize("config", [LLAMA, QWEN3], ids=["llama", "qwen3"])
@pytest.mark.parametrize("kind", range(4))
def test_flex_on_gpu_equals_segments_on_cpu(kind, config):
    model = small_vlm(config, backend="flex", dim=WIDTH)
    expected = loss_and_gradients(small_vlm(config, dim=WIDTH), build_batch(slots(kind), SIZES))
    loss, gradients = loss_and_gradients(model.cuda(), batch_on_gpu(kind))
    assert_close((loss.cpu(), {name: gradient.cpu() for name, gradient in gradients.items()}), expected, 1e-4)


def test_compiled_blocks_equal_eager_ones():
    model = small_vlm(backend="flex", dim=WIDTH).cuda()
    compiled = compile_blocks(copy.deepcopy(model))
    for kind in range(4):
        assert_close(
            loss_and_gradients(compiled, batch_on_gpu(kind)),
            loss_and_gradients(model, batch_on_gpu(kind)),
            1e-4,
        )


def test_images_of_other_sizes_compile_nothing_anew():
    counter = CompileCounterWithBackend("inductor")
    model = compile_blocks(small_vlm(backend="flex", dim=WIDTH).cuda(), counter)
    loss_and_gradients(model, batch_on_gpu(0))
    first = counter.frame_count
    assert first > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        for kind in range(1, 4):
            loss_and_gradients(model, batch_on_gpu(kind))
    assert counter.frame_count == first


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("backend", ["flex", "sdpa"])
def test_forward_and_backward_never_wait_for_the_device(backend, compiled):
    model = small_vlm(backend=backend, dim=WIDTH).cuda()
    if compiled:
        compile_blocks(model)
    loss_and_gradients(model, batch_on_gpu(0))  # compiling and tuning may wait
    batch = batch_on_gpu(1)
    model.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**batch).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["flex", "sdpa"])
def test_bfloat16_model_is_near_the_float32_one(backend):
    model = small_vlm(backend=backend, dim=WIDTH).cuda()
    loss, gradients = loss_and_gradients(copy.deepcopy(model).bfloat16(), batch_on_gpu(0))
    expected_loss, expected = loss_and_gradients(model, batch_on_gpu(0))
    assert abs(loss.item() / expected_loss.item() - 1) < 0.01
    # Direction, not size: each weight is rounded to 8 bits.
    flat = [torch.cat([g[name].float().flatten() for name in expected]) for g in (gradients, expected)]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.99


def test_garbage_in_padding_changes_nothing_at_all():
    model, batch = small_vlm(backend="flex", dim=WIDTH).cuda(), batch_on_gpu(1)
    loss, gradients = loss_and_gradients(model, batch)
    batch["pixel_values"][batch["grid_thw"][..., 0] < 0] = 77
    batch["tokens"][batch["document_ids"] < 0] = 77
    garbage_loss, garbage = loss_and_gradients(model, batch)
    assert torch.equal(loss, garbage_loss)
    for name, gradient in gradients.items():
        # Sums by atomic additions (embeddings, gathers) come in another order each time.
        assert torch.allclose(gradient, garbage[name], rtol=1e-4, atol=1e-5), name
