"""An exported processor gives the ids, grids and pixels that the job trains on."""

import json
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from experiments.vlm import processor
from experiments.vlm.config import Data, Source, VLMJobConfig
from experiments.vlm.data.image import ImagePlan, decode
from experiments.vlm.data.sample import make_sample
from experiments.vlm.data.sources.shards import open_shard
from experiments.vlm.model.families import family_of
from experiments.vlm.model.flavors import FLAVORS
from experiments.vlm.model_config import plan_of
from experiments.vlm.processor import read_image_limits, template_of, write_language, write_processor
from tests.reference import hf_processor
from tests.samples import noise, photographs, psnr
from torchtitan.components.tokenizer import load_tokenizer
from torchtitan.config.errors import ConfigError

KINDS = ["with bos, chatml", "with bos, llama3", "without bos, chatml", "without bos, llama3"]
KINDS += ["with bos, text only", "without bos, text only", "with bos, none written", "without bos, marks"]
PLAN = ImagePlan(16, 2, 10, 64)  # 2.5 visual tokens at least
# A template of text alone, and one of Qwen2-VL's kind, which writes the marks of an image itself.
TEXT_ONLY = """{{ bos_token }}{% for message in messages %}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' }}

{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
MARKS = """{% for message in messages %}<|im_start|>{{ message.role + '\n' }}
{%- if message.content is string %}{{ message.content }}{% else %}{% for item in message.content %}
{% if item.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ item.text }}
{%- endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def write_tokenizer_json(folder: Path) -> Path:
    """As Qwen publishes: no bos, marks of images, an end of turn that is the end of a text too."""
    from tests.unit.test_tokenizer_files import qwen

    folder.mkdir()
    return qwen(folder)


def save_template(folder: Path, source: str, **config: object) -> str:
    folder.mkdir()
    (folder / "chat_template.jinja").write_text(source)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder / "chat_template.jinja")


def job_of(folder: Path, tokenizer: str, template: str) -> VLMJobConfig:
    job = VLMJobConfig()
    job.model.tokenizer_path = tokenizer
    job.data.min_patches_per_image, job.data.max_patches_per_image = PLAN.min_patches, PLAN.max_patches
    job.data.sources = [Source(format="messages", path=str(folder), chat_template=template)]
    return job


def write_images(folder: Path) -> dict[str, str]:
    """Name -> path: PNGs that need no resize, among them one of transparency, and images of other sizes."""
    sizes = {"plain": (64, 96), "wide": (32, 256), "odd": (50, 333), "small": (9, 5), "large": (700, 500)}
    images = {name: PILImage.fromarray(noise(*size, seed=n)) for n, (name, size) in enumerate(sizes.items())}
    images |= {"photograph": photographs()["coffee"]}
    for name, image in images.items():
        image.save(folder / f"{name}.png")
    photographs()["chelsea"].save(folder / "jpeg.jpg", quality=90)
    return {file.stem: str(file) for file in folder.iterdir()}


def user(*content: str) -> dict:
    """Words, and paths of images."""
    items = [
        {"type": "image", "path": part} if part.startswith("/") else {"type": "text", "text": part}
        for part in content
    ]
    return {"role": "user", "content": items}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def conversations(images: dict[str, str]) -> list[list[dict]]:
    """With no image, with one, with several in one turn and in several."""
    return [
        [user("What is 2 + 2?"), assistant("Four.")],
        [user(images["plain"], "What is\nit? "), assistant(" A cat.")],
        [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            user(images["odd"]),
            assistant("é 😀"),
        ],
        [
            user(images["wide"], "and ", images["large"], images["photograph"], "?"),
            assistant("One <b>and</b> two."),
            user("And ", images["small"], images["jpeg"]),
            assistant("Three."),
        ],
    ]


def ours(messages: list[dict], job: VLMJobConfig, folder: Path) -> tuple[list[int], list[np.ndarray]]:
    """By the path that trains: ids, and the pixels uint8 [H, W, 3] of each image."""
    record = folder / f"{uuid.uuid4()}.jsonl"
    record.write_text(json.dumps({"messages": messages}))
    shard = open_shard(str(record), job.data.sources[0], Data(cache_folder=str(folder / "cache")))
    document, lost = shard.read(0)
    assert not lost
    sample = make_sample(document, load_tokenizer(job.model.tokenizer_path), PLAN)
    pixels = [decode(shard.load(image.image), *image.layout.views[0].size) for image in sample.images]
    return sample.tokens.tolist(), pixels


def unpatched(patches: np.ndarray, size: np.ndarray) -> np.ndarray:
    """The pixels [H, W, 3] in levels of 0 to 255 of normalised patches in raster order."""
    h, w = size
    pixels = patches[: h * w].reshape(h, w, 16, 16, 3).transpose(0, 2, 1, 3, 4).reshape(h * 16, w * 16, 3)
    return (pixels + 1) * 127.5


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Name -> (job, folder that its processor was written to); images; a folder for records."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    images, qwen = write_images(folder / "images"), str(write_tokenizer_json(folder / "qwen"))
    bos = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    templates = {
        "with bos, chatml": ("assets/tokenizer", "chatml"),
        "with bos, llama3": ("assets/tokenizer", "llama3"),
        "without bos, chatml": (qwen, "chatml"),
        "without bos, llama3": (qwen, "llama3"),
        "with bos, text only": ("assets/tokenizer", save_template(folder / "a", TEXT_ONLY, **bos)),
        "without bos, text only": (qwen, save_template(folder / "b", TEXT_ONLY, eos_token="<|im_end|>")),
        "with bos, none written": (
            "assets/tokenizer",
            save_template(folder / "c", MARKS, eos_token="<|im_end|>"),
        ),
        "without bos, marks": (qwen, save_template(folder / "d", MARKS, image_token="<|image_pad|>")),
    }
    found = {}
    for number, (name, (tokenizer, template)) in enumerate(templates.items()):
        job, out = job_of(folder, tokenizer, template), folder / f"exported{number}"
        out.mkdir()
        write_processor(job, out)
        found[name] = (job, out)
    return found, images, folder


@pytest.fixture(scope="module")
def kinds(exported):
    """Name -> (job, what the exported processor makes of the conversations, then of their prompts)."""
    found, images, folder = exported
    asked = [{"messages": messages} for messages in conversations(images)]
    asked += [{"messages": one["messages"][:-1], "add_generation_prompt": True} for one in asked]
    requests = [(str(out), one) for _, out in found.values() for one in asked]
    answers = iter(hf_processor.processed(requests, folder))
    return {name: (job, [next(answers) for _ in asked]) for name, (job, _) in found.items()}, images, folder


@pytest.mark.parametrize("name", KINDS)
def test_an_exported_folder_gives_the_same_ids_where_it_is_read_here(exported, name):
    found, images, folder = exported
    job, out = found[name]
    again = job_of(folder, str(out), str(out / "chat_template.jinja"))
    for messages in conversations(images):
        assert ours(messages, again, folder)[0] == ours(messages, job, folder)[0]
    read_image_limits(out, again)
    assert again.data.min_patches_per_image == PLAN.min_patches
    assert again.data.max_patches_per_image == PLAN.max_patches


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_ids_grids_and_pixels_are_those_of_training(kinds, name):
    found, images, folder = kinds
    job, answers = found[name]
    for messages, answer in zip(conversations(images), answers, strict=False):
        ids, pixels = ours(messages, job, folder)
        assert answer["ids"].tolist() == ids
        shapes = [(h * 16, w * 16) for h, w in answer.get("sizes", np.empty((0, 2), int)).tolist()]
        assert shapes == [image.shape[:2] for image in pixels]
        paths = [item["path"] for one in messages for item in one["content"] if item["type"] == "image"]
        for number, (path, image) in enumerate(zip(paths, pixels, strict=True)):
            theirs = unpatched(answer["pixels"][number], answer["sizes"][number])
            if Path(path).stem in ("plain", "wide"):
                np.testing.assert_allclose(theirs, image, atol=1e-3)
            assert psnr(theirs, image) > 50, path


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_prompt_is_what_the_answer_follows_in_training(kinds, name):
    found, images, folder = kinds
    job, answers = found[name]
    whole = conversations(images)
    for messages, prompt in zip(whole, answers[len(whole) :], strict=True):
        ids, _ = ours(messages, job, folder)
        asked = prompt["ids"].tolist()
        assert len(asked) < len(ids) and ids[: len(asked)] == asked


def test_generation_ends_with_the_text_and_with_the_turn(tmp_path):
    tokenizer = load_tokenizer("assets/tokenizer")
    for template, end in (("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>")):
        write_language(job_of(tmp_path, "assets/tokenizer", template), tmp_path)
        found = json.loads((tmp_path / "generation_config.json").read_text())
        assert found["eos_token_id"] == [tokenizer.eos_id, tokenizer.special_id(end)]
        assert (found["bos_token_id"], found["pad_token_id"]) == (tokenizer.bos_id, tokenizer.pad_id)
    assert not (tmp_path / "processor_config.json").exists()


def test_without_bos_generation_has_none_and_one_end_is_told_once(tmp_path):
    source = str(write_tokenizer_json(tmp_path / "qwen"))
    write_language(job_of(tmp_path, source, "chatml"), tmp_path)
    found = json.loads((tmp_path / "generation_config.json").read_text())
    assert (found.get("bos_token_id"), found["eos_token_id"]) == (None, [962])


def test_squeezed_images_are_refused_before_anything_is_written(tmp_path):
    job = job_of(tmp_path, "assets/tokenizer", "chatml")
    job.data.resize = "square"
    with pytest.raises(ConfigError, match="data.resize = square: no processor of transformers"):
        write_processor(job, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["debugmodel", "llava-debug"])
def test_colours_are_those_that_the_tower_read_in_training(name):
    row, colours = FLAVORS[name], {"mean": (0.1, 0.2, 0.3), "deviation": (0.3, 0.2, 0.1)}
    config = replace(row, encoder=replace(row.encoder, **colours))
    written = family_of(config).processor(config, plan_of(config, VLMJobConfig()))["image_processor"]
    assert written["image_mean"] == [0.1, 0.2, 0.3] and written["image_std"] == [0.3, 0.2, 0.1]


def test_the_template_is_that_of_the_conversations(monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(processor, "warn_once", told.append)
    job = VLMJobConfig()
    assert template_of(job) == "chatml"
    spoken = Source(format="llava", chat_template="llama3")
    job.data.sources = [Source(format="cc12m"), spoken]
    assert template_of(job) == "llama3" and not told
    job.data.sources.append(Source(format="messages"))
    assert template_of(job) == "llama3"
    assert told == ["sources differ in chat_template (llama3, chatml): llama3 is written"]
