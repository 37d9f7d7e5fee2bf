"""Tiles against transformers: counts, pixels, and which visual tokens, or sums of them, come in turn."""

import dataclasses
import io
import itertools
import re
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.vlm import model_config
from experiments.vlm.batch import OPTIONAL
from experiments.vlm.check import check_model, check_patches
from experiments.vlm.config import VLMJobConfig
from experiments.vlm.data import image_plan as image_plan_module
from experiments.vlm.data.image import decode_views
from experiments.vlm.data.image_layout import BEGIN, END, NEWLINE
from experiments.vlm.data.image_plan import ImagePlan
from experiments.vlm.data.loader import Loader
from experiments.vlm.data.packing import Budget
from experiments.vlm.generate.prompt import Picture, Prompter
from experiments.vlm.model.config import EncoderConfig, ProjectorConfig, TilesConfig, VLMConfig
from experiments.vlm.model.flavors import FLAVORS
from experiments.vlm.model_config import image_plan
from tests.reference.images import patchify
from tests.reference.models import QWEN3
from tests.samples import encoded, mosaic, noise, photographs, psnr
from tests.tiny_data import Characters, make_job, write_captions
from torchtitan.config.errors import ConfigError

ALL = tuple(itertools.product(range(1, 7), repeat=2))
NEXT = ImagePlan(
    14, 1, 4, 1024, "tiles", extra=1, image_size=336, resample="bicubic", marked=False, newline=True
)
ONE = dataclasses.replace(
    NEXT, extra=0, image_size=384, fill=(127, 127, 127), cut=TilesConfig(ALL, most=9, alone=True)
)
SMALL = dict(image_size=30, patch_size=7)  # 30 leaves a rest that no patch of 7 reads


def pinpoints(plan: ImagePlan) -> list[list[int]]:
    return [[rows * plan.image_size, columns * plan.image_size] for rows, columns in plan.cut.grids]


def sizes(count: int) -> list[tuple[int, int]]:
    """Sizes of all magnitudes and ratios, as they come and nearly square."""
    random = np.random.default_rng(0)
    any_size = np.exp(random.uniform(0, np.log(20_000), (count // 2, 2)))
    near = np.exp(random.uniform(0, np.log(4_000), (count // 2, 1))) * random.uniform(0.5, 2, (count // 2, 2))
    drawn = [*any_size, *near]
    return [(1, 1), (1, 20_000), (20_000, 1), *(tuple(map(int, np.maximum(size, 1))) for size in drawn)]


def processor_of(plan: ImagePlan, **options):
    """The image processor that makes such tiles."""
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    square = {"height": plan.image_size, "width": plan.image_size}
    kind = LlavaOnevisionImageProcessorPil if plan.cut.alone else LlavaNextImageProcessorPil
    crop = {} if plan.cut.alone else {"crop_size": square}
    mean = {"image_mean": [0.5] * 3} if plan.cut.alone else {}
    return kind(size=square, image_grid_pinpoints=pinpoints(plan), **crop, **mean, **options)


def counting(plan: ImagePlan):
    """The processor's own method, of which the rest cannot be built without a tokenizer or torchvision."""
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
    from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

    kind = LlavaOnevisionProcessor if plan.cut.alone else LlavaNextProcessor
    made = types.SimpleNamespace(
        image_processor=processor_of(plan),
        patch_size=plan.patch_size,
        num_image_tokens=(plan.image_size // plan.patch_size) ** 2,
        num_additional_image_tokens=0,
        vision_aspect_ratio="anyres_max_9",
    )
    made._get_unpadded_features = lambda *sizes: kind._get_unpadded_features(made, *sizes)
    return lambda size: kind._get_number_of_features(made, *size, plan.image_size, plan.image_size)


@pytest.mark.parametrize("plan", [NEXT, ONE], ids=["next", "onevision"])
def test_an_image_has_the_tokens_that_the_processor_counts(plan):
    count = counting(plan)
    most = plan.most_tokens
    for size in sizes(3000):
        layout = plan.layout(*size)
        assert len(layout.tokens) == count(size) <= most, size
        assert len(layout.views) <= len(plan.largest)
        assert layout.tokens.max() < sum(view.cells for view in layout.views)


def test_the_most_tokens_are_nearly_those_of_an_image():
    found = {len(ONE.layout(1152, width).tokens) for width in range(1300, 1500, 2)}
    assert 0.99 * ONE.most_tokens < max(found) <= ONE.most_tokens
    assert NEXT.most_tokens == len(NEXT.layout(1000, 1000).tokens) == 576 + 48 * 49


def pixels_of(plan: ImagePlan, size: tuple[int, int], data: bytes, images: list, **how) -> list[float]:
    """How near each view is to the processor's."""
    made = processor_of(plan, do_rescale=False, do_normalize=False)(images, return_tensors="np")
    theirs = made["pixel_values"][0].transpose(0, 2, 3, 1).round().astype(np.uint8)
    ours = decode_views(data, plan.layout(*size, **how), plan)
    kept = plan.image_size // plan.patch_size * plan.patch_size
    return [psnr(mine, view[:kept, :kept]) for mine, view in zip(ours, theirs, strict=True)]


@pytest.mark.parametrize("kind", [NEXT, ONE], ids=["next", "onevision"])
@pytest.mark.parametrize("size", [(1, 1), (1, 700), (900, 3), (40, 41), (61, 100), (100, 33)])
def test_pixels_are_the_processors_to_50_decibels(kind, size):
    plan, image = dataclasses.replace(kind, **SMALL), Image.fromarray(noise(*size))
    assert min(pixels_of(plan, size, encoded(image, "PNG"), [image])) > 50


@pytest.mark.parametrize("kind", [NEXT, ONE], ids=["next", "onevision"])
def test_photographs_are_the_processors_to_50_decibels_and_mostly_to_65(kind):
    plan, found = dataclasses.replace(kind, image_size=112), []
    for photo in photographs().values():
        found += pixels_of(plan, (photo.height, photo.width), encoded(photo, "PNG"), [photo])
    assert min(found) > 50 and np.median(found) > 65


def test_photographs_of_six_megapixels_are_the_processors_too():
    """Their decoder could shrink them, which costs 20 decibels."""
    data = encoded(mosaic(photographs()["astronaut"], 2000, 3001), quality=90)
    found = pixels_of(NEXT, (2000, 3001), data, [Image.open(io.BytesIO(data)).convert("RGB")])
    assert min(found) > 65


def test_of_several_images_in_a_document_each_is_padded_with_the_mean():
    plan, image = dataclasses.replace(ONE, **SMALL), Image.fromarray(noise(20, 50))
    layout = plan.layout(20, 50, alone=False)
    assert layout.tokens.tolist() == [*range(16), NEWLINE]
    found = pixels_of(plan, (20, 50), encoded(image, "PNG"), [[image, image]], alone=False)
    assert len(found) == 1 and found[0] > 50
    assert len(NEXT.layout(300, 500, alone=False).views) > 1


def packed_by(kind: str, plan: ImagePlan, features: torch.Tensor, size: tuple[int, int], newline):
    """As the model of transformers packs what its projector gave for [views, s * s, D]."""
    from transformers import LlavaNextModel, LlavaOnevisionModel

    vision = types.SimpleNamespace(image_size=plan.image_size, patch_size=plan.patch_size)
    config = types.SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints(plan))
    model, arguments = types.SimpleNamespace(config=config), ([features], [size])
    if kind == "next":
        return LlavaNextModel.pack_image_features(model, *arguments, "default", newline)[0][0]
    return LlavaOnevisionModel.pack_image_features(model, *arguments, newline, "anyres_max_9")[0][0]


@pytest.mark.parametrize("kind", ["next", "onevision"])
def test_visual_tokens_are_those_that_the_model_packs(kind):
    """On sizes of all kinds; the class token's cell of each view lies between, and is never read."""
    plan = dataclasses.replace({"next": NEXT, "onevision": ONE}[kind], image_size=56)
    newline, shrunk = torch.randn(5), 0
    for size in sizes(100):
        layout = plan.layout(*size)
        cells = torch.randn(len(layout.views), 16 + plan.extra, 5)
        expected = packed_by(kind, plan, cells[:, :16], size, newline)
        numbers, weights = map(torch.from_numpy, layout.taps())
        table = torch.cat([cells.flatten(0, 1), newline[None]])
        rows = torch.where(numbers == NEWLINE, len(table) - 1, numbers).long()
        found = (table[rows] * weights[..., None]).sum(1)
        assert found.shape == expected.shape and (found - expected).abs().max() < 1e-4, size
        shrunk += layout.mix is not None
    assert (shrunk > 10) == (kind == "onevision")


def test_tiles_stand_between_marks_where_the_model_has_them_and_need_no_newline():
    plan = ImagePlan(4, 2, 4, 16, "tiles", image_size=8)
    layout = plan.layout(8, 16)
    assert layout.tokens.tolist() == [BEGIN, 0, 1, 2, END]
    mixed = dataclasses.replace(plan, image_size=16, cut=TilesConfig(((2, 2),), most=1), newline=True)
    layout = mixed.layout(32, 32)
    numbers, weights = layout.taps()
    assert layout.tokens.tolist() == [BEGIN, 0, 1, 2, 3, 4, 8, NEWLINE, 12, 16, NEWLINE, END]
    assert numbers[5].tolist() == [4, 5, 6, 7] and weights[5].tolist() == [0.25] * 4
    assert numbers[1].tolist() == [0] * 4 and weights[1].tolist() == [1, 0, 0, 0]


def test_a_slot_that_does_not_hold_the_largest_image_is_refused():
    encoder = EncoderConfig(48, 2, 4, 96, 14, 24, image_size=336)
    config, job = VLMConfig(encoder, ProjectorConfig(64, merge_size=1), QWEN3), VLMJobConfig()
    job.data.resize, job.training.seq_len = "tiles", 8192
    with pytest.raises(ConfigError, match=r"up to 5 views of 576 patches.*patch_rows = 5, or rows of 2880"):
        check_patches(job, config)
    job.data.patches_per_row, job.data.patch_rows = 1152, 3
    check_patches(job, config)
    job.training.seq_len = 2048
    with pytest.raises(ConfigError, match="up to 2882 tokens, more than training.seq_len = 2048"):
        check_patches(job, config)


@pytest.mark.parametrize(("kind", "sharers"), [("next", 1), ("next", 4), ("onevision", 4)])
def test_a_slot_holds_tiles_in_several_rows_and_says_which_of_them_each_token_is_made_of(kind, sharers):
    plan = dataclasses.replace({"next": NEXT, "onevision": ONE}[kind], image_size=42, extra=1)
    images = [noise(90, 200, seed=1), noise(300, 250, seed=2)] if kind == "next" else [noise(300, 250)]
    budget = Budget(2000, 7, 75)
    prompter = Prompter(Characters(), plan, budget, 2000, sharers=sharers)
    prompt = prompter.beginning(["ab", *(Picture(encoded(image, "PNG")) for image in images), "c"])
    placing, shown = prompt.placing, prompt.visual_index >= 0
    table = torch.from_numpy(prompt.pixel_values).flatten(0, 1).double()
    table = torch.cat([table, torch.full((1, table.shape[1]), -7.0)])  # the newline
    if kind == "next":
        assert placing.keys() == {"visual_index"}
        found = table[torch.from_numpy(prompt.visual_index[shown])]
    else:
        taps, weights = (torch.from_numpy(placing[name][shown]) for name in OPTIONAL)
        assert (taps[:, 0].numpy() == prompt.visual_index[shown]).all()
        assert (placing["visual_taps"][~shown] == -1).all() and (placing["tap_weights"][~shown] == 0).all()
        found = (table[taps] * weights[..., None]).sum(1)
    expected = []
    for image in images:
        views = decode_views(encoded(image, "PNG"), plan.layout(*image.shape[:2]), plan)
        features = torch.stack([torch.from_numpy(patchify(view, 14, 1)[0]) for view in views]).double()
        expected.append(packed_by(kind, plan, features, image.shape[:2], torch.full(table.shape[1:], -7.0)))
    assert (found - torch.cat(expected)).abs().max() < 1e-3
    used = len(np.unique(np.nonzero(prompt.grid_thw[..., 0] == 0)[0]))
    assert used > 1 and used % 4 and len(prompt.grid_thw) == used + -used % sharers


def test_fewer_tiles_leave_out_the_larger_grids(tmp_path):
    job = VLMJobConfig()
    job.model.flavor, job.data.max_tiles_per_image, job.training.seq_len = "llava-onevision-0.5b", 2, 4096
    job.data.patches_per_row, job.data.patch_rows = 2187, 1
    assert image_plan(job).cut.grids == ((1, 1), (1, 2), (2, 1))
    check_model(job)
    job.model.flavor, job.data.max_tiles_per_image = "llava-next-vicuna-7b", 1
    with pytest.raises(ConfigError, match="max_tiles_per_image = 1: the smallest grid has 2 tiles"):
        image_plan(job)
    job.data.max_tiles_per_image, job.data.resize = 2, "padded"
    with pytest.raises(ConfigError, match="max_tiles_per_image: data.resize = padded makes none: unset it"):
        check_model(job)


def test_the_plan_of_the_guide_makes_batches_by_a_function_and_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(image_plan_module, "PLANS", plans := dict(image_plan_module.PLANS))
    monkeypatch.setattr(model_config, "PLANS", plans)
    guide = (Path(__file__).parents[2] / "docs/extending.md").read_text().partition("## An image plan")[2]
    exec(re.search(r"```python\n(.*?)```", guide, re.DOTALL)[1], {})
    write_captions(tmp_path / "data" / "captions")
    job = make_job(tmp_path / "data", tmp_path, resize="halves")
    job.data.sources = job.data.sources[:1]
    check_patches(job, FLAVORS["debugmodel"])
    loader = Loader(job, Characters())
    tensors, samples = (batch := next(loader).batches[0]).tensors, batch.samples
    loader.close()
    images = sum(len(sample.image_sizes) for sample in samples)
    assert images > 3 and (tensors["visual_index"] >= 0).sum() == 2 * 16 * images
    assert ((tensors["grid_thw"] == 0).all(-1)).sum() == 2 * images
