"""An exported folder answers in stock transformers as the model that was trained answers here."""

import dataclasses
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.commands import main
from experiments.vlm.data.chat_template import ends_of, load_chat_template
from experiments.vlm.data.document import Picture
from experiments.vlm.data.image import ImagePlan
from experiments.vlm.data.packing import Budget
from experiments.vlm.generate.prompt import Prompt, Prompter
from experiments.vlm.model.vlm import VLM
from tests.reference import hf_processor
from tests.reference.hf_folders import save, whole_model
from tests.reference.models import LLAMA, QWEN2, QWEN3
from tests.samples import noise, photographs, psnr
from tests.unit.test_hf_import import job_of, load
from tests.unit.test_processor import write_tokenizer_json
from torchtitan.components.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow
TOKENS = 20
PLAN = ImagePlan(patch_size=4, merge_size=2, min_patches=4, max_patches=64)
SHIPPED = str(Path(__file__).parents[2] / "assets/tokenizer")
JOB = """[model]
tokenizer_path = "{tokenizer}"
[data]
max_patches_per_image = 64
patches_per_row = 512
[[data.sources]]
format = "messages"
path = "nowhere"
chat_template = "{template}"
"""


def pictures(folder: Path) -> dict[str, Path]:
    """`exact`: PNGs of sizes that are kept."""
    sizes = {"exact": (16, 24), "exact wide": (8, 64), "odd": (13, 31), "large": (150, 99)}
    images = {name: Image.fromarray(noise(*size, seed=len(name))) for name, size in sizes.items()}
    images["photograph"] = photographs()["rocket"]
    for name, image in images.items():
        image.save(folder / f"{name}.png")
    return {name: folder / f"{name}.png" for name in images}


def prompts(images: dict[str, Path]) -> list[list[str | Path]]:
    """What a user asks: with no image, one, and several."""
    several = [images["exact wide"], " and ", images["odd"], images["large"], images["photograph"], "?"]
    return [["What is 2 + 2?"], [images["exact"], "What is it?"], ["Between ", *several]]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Decoder -> (our model, our prompts, what transformers made of the exported folder)."""
    at = tmp_path_factory.mktemp("models")
    images, requests, ours = pictures(at), [], {}
    qwen = str(write_tokenizer_json(at / "qwen tokenizer"))
    for name, config, tokenizer, template in (
        ("llama", LLAMA, SHIPPED, "llama3"),
        ("qwen2", QWEN2, qwen, "chatml"),
        ("qwen3", QWEN3, qwen, "chatml"),
    ):
        rows = dataclasses.replace(config, vocab_size=1024)
        folder, checkpoint, exported = at / name, at / f"{name} checkpoint", at / f"{name} exported"
        save(whole_model(rows), folder)
        (at / f"{name}.toml").write_text(JOB.format(tokenizer=tokenizer, template=template))
        assert main(["from_hf", "--hf", str(folder), "--out", str(checkpoint)]) == 0
        job = ["--job.config_file", str(at / f"{name}.toml"), "--checkpoint", str(checkpoint)]
        assert main(["to_hf", *job, "--out", str(exported)]) == 0
        ours[name] = load(job_of(path=folder)), prompter(tokenizer, template)
        options = {"add_generation_prompt": True, "answer": TOKENS}
        requests += [
            (str(exported), {"messages": hf_processor.asked(content), **options})
            for content in prompts(images)
        ]
    answers = iter(hf_processor.processed(requests, at))
    return {
        name: (model, make, [(ask(make, content), next(answers)) for content in prompts(images)])
        for name, (model, make) in ours.items()
    }


def prompter(tokenizer: str, template: str) -> Prompter:
    return Prompter(load_tokenizer(tokenizer), PLAN, Budget(1000, 1, 512), 1000, load_chat_template(template))


def ask(make: Prompter, content: list[str | Path]) -> Prompt:
    parts = [part if isinstance(part, str) else Picture(part.read_bytes(), part.name) for part in content]
    return make.prompt([("user", parts)])


def images_of(prompt: Prompt) -> list[np.ndarray]:
    """Places of the patches of each image, in raster order."""
    grid = prompt.grid_thw.reshape(-1, 3)
    starts = np.flatnonzero((grid[:, 1:] == 0).all(1) & (grid[:, 0] == 0))
    bounds = [*starts, int((grid[:, 0] >= 0).sum())]
    return [start + np.lexsort((grid[start:end, 2], grid[start:end, 1])) for start, end in pairwise(bounds)]


def levels(answer: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The patches of each image in raster order, uint8 [n, D]."""
    whole = zip(answer.get("pixels", ()), answer.get("sizes", ()), strict=True)
    return [np.rint((pixels[: h * w] + 1) * 127.5).astype(np.uint8) for pixels, (h, w) in whole]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_ids_grids_and_pixels_are_ours(opened, name):
    for prompt, answer in opened[name][2]:
        assert prompt.ids == answer["ids"].tolist()
        places = images_of(prompt) if prompt.rich else []
        assert [len(place) for place in places] == [h * w for h, w in answer.get("sizes", ())]
        for number, (place, theirs) in enumerate(zip(places, levels(answer), strict=True)):
            grid, patches = prompt.grid_thw.reshape(-1, 3)[place], prompt.pixel_values.reshape(-1, 48)[place]
            assert (grid[-1, 1:] + 1 == answer["sizes"][number]).all()
            assert psnr(patches, theirs) > 50
            if len(places) == 1 or number == 0:
                np.testing.assert_array_equal(patches, theirs)


@torch.no_grad()
def logits(model: VLM, prompt: Prompt, ids: list[int]) -> torch.Tensor:
    """[tokens, V] of the prompt and what follows it, read anew."""
    tokens = torch.tensor([[*prompt.ids, *ids]])
    width = tokens.shape[1]
    positions = torch.arange(width, dtype=torch.int32)[None]
    documents = torch.zeros(1, width, dtype=torch.int32)
    return model(tokens=tokens, positions=positions, document_ids=documents, **prompt.tensors(width))[0]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_logits_and_greedy_answers_are_ours_on_the_same_pixels(opened, name):
    model, make, pairs = opened[name]
    ends, lengths = ends_of(make.tokenizer, make.template), []
    for prompt, answer in pairs:
        if prompt.rich:
            pixels = prompt.pixel_values.reshape(-1, 48)
            for place, theirs in zip(images_of(prompt), levels(answer), strict=True):
                pixels[place] = theirs
        theirs = torch.from_numpy(answer["logits"])
        assert (logits(model, prompt, []) - theirs).abs().max() < 1e-3
        ids: list[int] = []
        while len(ids) < TOKENS and not (ids and ids[-1] in ends):
            ids.append(int(logits(model, prompt, ids)[-1].argmax()))
        assert answer["answer"].tolist() == ids
        lengths.append(len(ids))
    assert max(lengths) == TOKENS
