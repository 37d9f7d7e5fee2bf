"""Small LLaVAs whose images are cut into tiles, documents for them, and these as transformers takes them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from experiments.vlm.batch import FIELDS, BatchShape
from experiments.vlm.data.collate import Collator
from experiments.vlm.data.document import Document, Image, Text
from experiments.vlm.data.image import decode_views
from experiments.vlm.data.image_plan import ImagePlan
from experiments.vlm.data.packing import Budget, place
from experiments.vlm.data.sample import Sample, make_sample
from experiments.vlm.data.slot import Origin, Packed, SlotPlan
from experiments.vlm.data.sources.reader import Reference
from experiments.vlm.model.config import EncoderConfig
from tests.reference.hf_folders import WIDTHS
from tests.samples import encoded, noise
from tests.tiny_data import Characters

SIDE = 16  # pixels a tile: 4 x 4 patches of 4
IMAGE_ID = Characters().image_id
TEXT = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "head_dim": 12}
GRIDS = [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]
PROCESSOR = {"size": {"height": SIDE, "width": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}


def tiled_model(kind: str, decoder: str = "", rows: int = 272, **options: Any) -> nn.Module:
    """kind: next, onevision; decoder: the model_type of another than its usual one; rows: its words."""
    import transformers as t

    text = t.AutoConfig.for_model(
        decoder or {"next": "llama", "onevision": "qwen2"}[kind],
        **TEXT | {"vocab_size": rows},
        **({"sliding_window": None} if decoder == "mistral" else {}),
    )
    shared = {"text_config": text, "image_token_index": IMAGE_ID}
    shared["image_grid_pinpoints"] = [[SIDE * n for n in grid] for grid in GRIDS]
    if kind == "next":
        vision = t.CLIPVisionConfig(**WIDTHS, image_size=SIDE)
        return t.LlavaNextForConditionalGeneration(
            t.LlavaNextConfig(vision_config=vision, **shared | options)
        )
    vision = t.SiglipVisionConfig(**WIDTHS, image_size=SIDE, vision_use_head=False)
    shared["vision_aspect_ratio"] = "anyres_max_2"
    return t.LlavaOnevisionForConditionalGeneration(
        t.LlavaOnevisionConfig(vision_config=vision, **shared | options)
    )


class Held:
    """Where a collator looks for images: their locators are their bytes."""

    def load(self, image: Image) -> bytes:
        return image.locator

    def use(self, source: int, path: str, work: Any) -> Any:
        return work(self)


def picture(height: int, width: int, seed: int) -> Image:
    """Noise."""
    return Image(encoded(noise(height, width, seed=seed), "PNG"), height, width)


def documents() -> list[Document]:
    """With one image, several, none, and one that is thin."""
    parts: list[list[Any]] = [
        [Text("one "), picture(30, 40, 1), Text("image")],
        [picture(20, 33, 2), Text(" and "), picture(50, 12, 3), picture(9, 9, 4), Text("!")],
        [Text("no image at all")],
        [picture(5, 90, 5), Text("thin")],
    ]
    return [Document(str(number), each) for number, each in enumerate(parts)]


def samples(plan: ImagePlan, given: Sequence[Document], tokenizer: Any = None) -> list[Sample]:
    return [make_sample(document, tokenizer or Characters(), plan) for document in given]


def slot(plan: ImagePlan, given: Sequence[Sample], budget: Budget) -> dict[str, Tensor]:
    """A batch of one slot that holds them all."""
    views = [cells for sample in given for cells in sample.outline.images(0, sample.length)]
    places = place(views, budget)
    assert places is not None, "the test's images do not fit"
    packed, origin = [], Origin("test", "", "", caption=False)
    for sample in given:
        own = len(sample.outline.images(0, sample.length))
        packed.append(Packed(Reference(0, 0, 0), origin, sample, places[:own]))
        places = places[own:]
    shape = BatchShape(
        1, budget.seq_len, budget.patch_rows, budget.patches_per_row, plan.patch_size, plan.mixes
    )
    fields = {name: np.empty(shape.of(name), field.dtype) for name, field in shape.fields.items()}
    views_of = {name: array[0] if FIELDS[name].dims[0] == "B" else array for name, array in fields.items()}
    filled = Collator(Held(), plan, 0).start(SlotPlan(0, packed), views_of)()
    assert not filled.rejects
    return {name: torch.from_numpy(array) for name, array in fields.items() if name != "source_ids"}


def as_transformers(sample: Sample, plan: ImagePlan, encoder: EncoderConfig) -> dict[str, Tensor]:
    """A document alone, with the pixels that we make; transformers is told which image is how large."""
    inputs = {"input_ids": torch.from_numpy(sample.tokens.astype(np.int64))[None]}
    if not sample.images:
        return inputs
    seen = []
    for image in sample.images:
        views = decode_views(image.image.locator, image.layout, plan)
        seen.append(torch.stack([normalised(torch.from_numpy(view.copy()), encoder) for view in views]))
    most = max(map(len, seen))
    padded = [torch.cat([each, torch.zeros(most - len(each), *each.shape[1:])]) for each in seen]
    sizes = torch.tensor([[image.image.height, image.image.width] for image in sample.images])
    inputs |= {"pixel_values": torch.stack(padded), "image_sizes": sizes}
    return inputs | ({"batch_num_images": torch.tensor([len(sizes)])} if plan.cut.alone else {})


def normalised(pixels: Tensor, encoder: EncoderConfig) -> Tensor:
    mean, deviation = torch.tensor(encoder.mean), torch.tensor(encoder.deviation)
    return rearrange((pixels / 255 - mean) / deviation, "h w c -> c h w")
