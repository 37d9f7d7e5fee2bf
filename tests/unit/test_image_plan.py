"""Image plans: against the image processors of transformers, and an image of several views in a batch."""

import io
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from experiments.vlm.batch import FIELDS, BatchShape
from experiments.vlm.config import VLMJobConfig
from experiments.vlm.data.collate import Collator
from experiments.vlm.data.document import Document, Text
from experiments.vlm.data.document import Image as Reference
from experiments.vlm.data.image import decode_views
from experiments.vlm.data.image_layout import BEGIN, END, Layout, View
from experiments.vlm.data.image_plan import ImagePlan
from experiments.vlm.data.packing import Budget, place
from experiments.vlm.data.sample import make_sample
from experiments.vlm.data.slot import Origin, Packed, SlotPlan
from experiments.vlm.data.sources.reader import Reference as Where
from experiments.vlm.model.config import EncoderConfig, ProjectorConfig, VLMConfig
from experiments.vlm.model_config import plan_of as plan_of_job
from tests.reference.images import patchify
from tests.samples import encoded, noise, photographs, psnr
from tests.tiny_data import Characters
from torchtitan.models.decoder.flavors import DECODERS

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
FILL = (122, 116, 104)
# 30 leaves a rest that no patch of 7 reads
SIZES = [(1, 1), (1, 700), (900, 3), (40, 41), (336, 336), (480, 640), (1000, 90), (300, 301)]


def plan_of(resize: str, image_size: int = 30, **options) -> ImagePlan:
    kind = {"patch_size": 7, "merge_size": 1, "max_patches": 1024, "resample": "bicubic", "fill": FILL}
    return ImagePlan(**kind, resize=resize, image_size=image_size, **options)


def processor_of(resize: str, side: int):
    """transformers' own, that says the same of an image."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    plain = {"do_rescale": False, "do_normalize": False}
    square = {"height": side, "width": side}
    if resize == "square":
        return SiglipImageProcessorPil(size=square, **plain)
    if resize == "cropped":
        return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square, **plain)
    return LlavaImageProcessorPil(do_pad=True, size=square, crop_size=square, image_mean=CLIP_MEAN, **plain)


def expected(resize: str, side: int, image: Image.Image) -> np.ndarray:
    made = processor_of(resize, side)(image, return_tensors="np")["pixel_values"][0]
    return np.asarray(made).transpose(1, 2, 0).round().astype(np.uint8)


def ours(plan: ImagePlan, data: bytes, size: tuple[int, int]) -> np.ndarray:
    (pixels,) = decode_views(data, plan.layout(*size), plan)
    return pixels


@pytest.mark.parametrize("resize", ["square", "padded", "cropped"])
@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_the_processors_to_50_decibels(resize, size):
    image, plan = Image.fromarray(noise(*size)), plan_of(resize)
    pixels = ours(plan, encoded(image, "PNG"), size)
    assert pixels.shape == (28, 28, 3)
    # A convolution over 30 x 30 pixels reads the first 28.
    assert psnr(pixels, expected(resize, 30, image)[:28, :28]) > 50


@pytest.mark.parametrize("resize", ["square", "padded", "cropped"])
def test_photographs_are_the_processors_to_50_decibels(resize):
    plan = ImagePlan(14, 1, 4, 1024, resize, image_size=336, resample="bicubic", fill=FILL)
    found = {}
    for name, photo in photographs().items():
        data = encoded(photo, quality=95)
        same = Image.open(io.BytesIO(data)).convert("RGB")
        found[name] = psnr(ours(plan, data, (photo.height, photo.width)), expected(resize, 336, same))
    assert min(found.values()) > 50, found


@pytest.mark.parametrize("resize", ["square", "padded", "cropped"])
def test_random_images_of_every_ratio_are_the_processors_to_50_decibels_and_65_as_a_median(resize):
    plan = ImagePlan(14, 1, 4, 1024, resize, image_size=126, resample="bicubic", fill=FILL)
    random, photos, found = np.random.default_rng(0), list(photographs().values()), {}
    for number in range(40):
        height, width = np.exp(random.uniform(0, np.log(500), 2)).astype(int).tolist()
        image = Image.fromarray(noise(height, width, seed=number))
        if number % 2:
            photo = photos[number % len(photos)]
            image = photo.crop((0, 0, min(width, photo.width), min(height, photo.height)))
        same = image.width, image.height
        found[number, same] = psnr(
            ours(plan, encoded(image, "PNG"), same[::-1]), expected(resize, 126, image)
        )
    assert min(found.values()) > 50, min(found, key=found.__getitem__)
    assert np.median(list(found.values())) > 65


def test_endless_images_take_little_memory_and_keep_their_middle():
    """A processor makes 30 x 600,000 pixels of 2 x 40,000 before it crops."""
    pixels = noise(2, 40_000)
    data = encoded(pixels, "PNG")
    for resize in ("padded", "cropped"):
        (view,) = plan_of(resize).layout(2, 40_000).views
        assert np.prod(view.size) < 1e6 and np.prod(view.canvas[:2] if view.canvas else 1) < 1e6
    middle = np.asarray(Image.fromarray(pixels[:, 19_990:20_010]).resize((300, 30), Image.Resampling.BICUBIC))
    assert psnr(ours(plan_of("cropped"), data, (2, 40_000)), middle[:28, 135:163]) > 50
    rows = ours(plan_of("padded"), data, (2, 40_000))
    assert psnr(rows, np.broadcast_to(np.uint8(FILL), rows.shape)) > 50


@pytest.mark.parametrize("resize", ["square", "padded", "cropped"])
def test_squares_have_as_many_tokens_as_the_encoders_own_whatever_the_image(resize):
    """LlavaProcessor's own count, with the class token and without."""
    from transformers import LlavaProcessor

    random = np.random.default_rng(0)
    shape = {"patch_size": 14, "merge_size": 1, "resize": resize, "image_size": 336, "marked": False}
    plain, kept = ImagePlan(**shape, extra=1), ImagePlan(**shape, extra=1, extra_tokens=True)
    sizes = [[1, 1], *np.exp(random.uniform(0, np.log(20_000), (3000, 2))).astype(int).tolist()]
    theirs = SimpleNamespace(
        image_processor=processor_of("padded", 336),
        patch_size=14,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        _merge_kwargs=lambda **kwargs: {"images_kwargs": {}},
    )
    counts = LlavaProcessor._get_num_multimodal_tokens(theirs, sizes).num_image_tokens
    theirs.vision_feature_select_strategy = "full"
    assert set(LlavaProcessor._get_num_multimodal_tokens(theirs, sizes).num_image_tokens) == {577}
    for size, count in zip(sizes, counts, strict=True):
        assert plain.layout(*size).tokens.tolist() == list(range(count))
        layout = kept.layout(*size)
        assert layout.tokens.tolist() == [576, *range(576)] and layout.cells == 577


@pytest.mark.parametrize(("patch", "merge"), [(14, 2), (16, 2), (16, 1)])
def test_limits_in_pixels_are_those_of_a_processor_that_has_them_and_of_tokens_as_many_patches(patch, merge):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    job, encoder = VLMJobConfig(), EncoderConfig(64, 1, 4, 64, patch)
    config = VLMConfig(encoder, ProjectorConfig(64, merge_size=merge), DECODERS["debug"])
    job.data.min_pixels_per_image, job.data.max_pixels_per_image = 5_000, 300_000
    plan, random = plan_of_job(config, job), np.random.default_rng(0)
    sizes = np.exp(random.uniform(0, np.log(4000), (3000, 2))).astype(int).tolist()
    compared = 0
    for height, width in [(1, 1), *sizes]:
        thin = 2 * min(height, width) <= patch * merge  # theirs rounds such a side to nothing at first
        if thin or max(height, width) > 200 * min(height, width):  # or refuses it
            continue
        expected = smart_resize(height, width, patch * merge, 5_000, 300_000)
        if math.prod(expected) <= 300_000:  # theirs may pass its own maximum
            h, w = plan.grid(height, width)
            assert (h * patch, w * patch) == expected
            compared += 1
    assert compared > 1_000
    job.data.min_pixels_per_image = job.data.max_pixels_per_image = None
    job.data.min_tokens_per_image, job.data.max_tokens_per_image = 4, 256
    tokens = plan_of_job(config, job)
    job.data.min_tokens_per_image = job.data.max_tokens_per_image = None
    job.data.min_patches_per_image, job.data.max_patches_per_image = 4 * merge**2, 256 * merge**2
    assert tokens == plan_of_job(config, job)
    counts = [tokens.layout(*size).visual_tokens for size in sizes]
    assert min(counts) >= 4 and 250 < max(counts) <= 256


@pytest.mark.parametrize(
    ("options", "side"),
    [
        ({"image_size": 384}, 384),  # 27 patches of 14, and a rest
        ({"image_size": 384, "merge_size": 2}, 26 * 14),
        ({"image_size": 384, "max_patches": 400}, 20 * 14),
        ({"image_size": None}, 32 * 14),
    ],
)
def test_a_square_is_the_encoders_own_but_where_that_does_not_fit(options, side):
    plan = ImagePlan(**{"patch_size": 14, "merge_size": 1, "resize": "square"} | options)
    (view,) = plan.layout(50, 70).views
    assert view.size == (side, side) and (view.h, view.w) == (side // 14, side // 14)


class Halves(ImagePlan):
    """Each image twice, and one visual token between them a second time: more than any plan has as yet."""

    def layout(self, height: int, width: int, alone: bool = True) -> Layout:
        views = (View(4, 4, 16, (16, 16)), View(2, 4, 8, (8, 16)))
        return Layout(views, np.array([BEGIN, 0, 1, 2, 3, END, 3, BEGIN, 4, 5, END], np.int32))


class Pictures:
    """Where the collator looks for images."""

    def __init__(self, images: Sequence[bytes]):
        self.images = images

    def load(self, image: Reference) -> bytes:
        return self.images[image.locator]

    def use(self, source, path, work):
        return work(self)


@pytest.mark.parametrize("lost", [None, 0, 1])
@pytest.mark.parametrize("threads", [0, 2])
def test_views_of_an_image_lie_in_several_rows_and_are_lost_together(lost, threads):
    plan, tokenizer = Halves(patch_size=4), Characters()
    images = [encoded(noise(20, 30, seed=seed), "PNG") for seed in range(2)]
    if lost is not None:
        images[lost] = images[lost][:200]
    parts = [Text("a"), Reference(0, 20, 30), Text("b"), Reference(1, 20, 30)]
    sample = make_sample(Document("key", parts), tokenizer, plan)
    shape = BatchShape(1, 40, 3, 16, 4)
    places = place(sample.outline.images(0, sample.length), Budget(40, 3, 16))
    assert places == [(0, 0), (2, 0), (1, 0), (2, 8)]
    fields = {name: np.full(shape.of(name), 77, field.dtype) for name, field in shape.fields.items()}
    views = {name: array[0] if FIELDS[name].dims[0] == "B" else array for name, array in fields.items()}
    packed = Packed(Where(0, 0, 0), Origin("s", "", "", caption=False), sample, places)
    with ThreadPoolExecutor(2) as pool:
        collator = Collator(Pictures(images), plan, tokenizer.pad_id, pool if threads else None)
        filled = collator.start(SlotPlan(0, [packed]), views)()
    assert [reject.image for reject in filled.rejects] == ([] if lost is None else [lost])
    left = [number for number in range(2) if number != lost]
    index = views["visual_index"]
    assert (index >= 0).sum() == 7 * len(left)
    own = index[index >= 0].reshape(-1, 7)
    for row, number in zip(own, left, strict=True):
        assert row[4] == row[3]
        placed = [row[[0, 1, 2, 3]], row[[5, 6]]]
        pictures = decode_views(images[number], plan.layout(20, 30), plan)
        for tokens, pixels in zip(placed, pictures, strict=True):
            patches, _ = patchify(pixels, 4, 2)
            cells = np.concatenate([np.arange(4) + 4 * token for token in tokens])
            np.testing.assert_array_equal(views["pixel_values"].reshape(-1, 48)[cells], patches)
    assert (views["grid_thw"][..., 0] == 0).sum() == 24 * len(left)
