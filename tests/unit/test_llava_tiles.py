"""LLaVA-NeXT and LLaVA-OneVision: the logits and gradients of transformers, its folders in and out."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from experiments.__main__ import main as train
from experiments.notebook import load_job, open_model
from experiments.vlm.batch import BatchShape
from experiments.vlm.check import check_model
from experiments.vlm.config import PARTS, VLMJobConfig
from experiments.vlm.data import document
from experiments.vlm.data.packing import Budget
from experiments.vlm.generate.answering import open_answering, prompter_of
from experiments.vlm.generate.forward import CachedVLM
from experiments.vlm.generate.prompt import Picture, Prompter
from experiments.vlm.model import hf_config
from experiments.vlm.model.families import FAMILIES
from experiments.vlm.model.flavors import FLAVORS
from experiments.vlm.model.hf import part_rows
from experiments.vlm.model.vlm import VLM
from experiments.vlm.model_config import image_plan, model_config
from experiments.vlm.processor import processor_config
from experiments.vlm.saved_model import use_hf_folder
from experiments.vlm.spec import SPEC
from tests.reference import hf_processor
from tests.reference.hf_folders import save, state_of, write_job
from tests.reference.tiled_models import (
    GRIDS,
    PROCESSOR,
    SIDE,
    as_transformers,
    documents,
    samples,
    slot,
    tiled_model,
)
from tests.samples import encoded, noise
from tests.tiny_data import Characters
from tests.unit.test_hf_export import assert_same, command
from tests.unit.test_hf_import import job_of, load
from tests.unit.test_processor import write_tokenizer_json
from torchtitan.components.tokenizer import load_tokenizer
from torchtitan.config.errors import ConfigError
from torchtitan.generation.engine import Engine, Request
from torchtitan.generation.kv_cache import KVCache
from torchtitan.models.hf.config_file import ConfigFile
from torchtitan.models.weight_names import read, to_ours

BUDGET = Budget(700, 5, 110)
KINDS = ["next", "onevision"]
SHIPPED = str(Path(__file__).parents[2] / "assets/tokenizer")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("next", {}),
        ("next", {"decoder": "mistral"}),
        ("next", {"vision_feature_layer": [1, -1], "multimodal_projector_bias": False}),
        ("onevision", {}),
        ("onevision", {"decoder": "qwen3"}),
    ],
)
def test_documents_beside_each_other_have_the_logits_and_gradients_of_each_alone(tmp_path, kind, options):
    theirs = tiled_model(kind, **options).eval()
    save(theirs, tmp_path)
    job = job_of(path=tmp_path)
    ours, plan = load(job), image_plan(job)
    given = samples(plan, documents())
    batch = slot(plan, given, BUDGET)
    assert ("visual_taps" in batch) == (kind == "onevision")
    labels, start, expected_loss = batch.pop("labels"), 0, torch.zeros(())
    logits = ours(**batch)[0]
    for sample in given:
        expected = theirs(**as_transformers(sample, plan, ours.config.encoder)).logits[0]
        span = slice(start, start + sample.length)
        assert (logits[span] - expected).abs().max() < 1e-3
        expected_loss = expected_loss + F.cross_entropy(expected, labels[0, span], reduction="sum")
        start = span.stop
    expected_loss.backward()
    ours(**batch, labels=labels).sum().backward()
    rows = [row for part in PARTS for row in part_rows(part, ours.config.encoder, FAMILIES[f"llava_{kind}"])]
    there = read({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}, rows).named
    grads = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert grads.keys() == there.keys() and "projector.newline" in grads
    largest = max(float(gradient.abs().max()) for gradient in there.values())
    for name, expected in there.items():
        scale = max(float(expected.abs().max()), 1e-3 * largest)
        assert (grads[name] - expected).abs().max() < 1e-3 * scale, name


@pytest.mark.parametrize(("kind", "decoder"), [("next", "mistral"), ("onevision", "qwen2")])
def test_a_folder_goes_in_and_out_bit_for_bit(tmp_path, kind, decoder):
    save(tiled_model(kind, decoder), tmp_path / "there")
    values = {"image_mean": [0.5, 0.25, 0.5], "image_std": [0.5, 0.5, 0.25], "resample": 2}
    (tmp_path / "there" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | GRIDDED | values))
    command("from_hf", "--hf", tmp_path / "there", "--out", tmp_path / "checkpoint")
    command("to_hf", "--checkpoint", tmp_path / "checkpoint", "--out", tmp_path / "back")
    assert_same(tmp_path / "there", tmp_path / "back")
    made = json.loads((tmp_path / "back" / "processor_config.json").read_text())
    assert {key: made["image_processor"][key] for key in values} == values
    images = Image.fromarray(noise(30, 50)), Image.fromarray(noise(20, 9))
    written, expected = (processor_of(values, kind)(images) for values in (made["image_processor"], values))
    assert all((one == two).all() for one, two in zip(written, expected, strict=True))


GRIDDED = {"image_grid_pinpoints": [[SIDE * n for n in grid] for grid in GRIDS]}


def processor_of(values: dict, kind: str):
    """Pixels of images, by the class that the file names, with what the file says."""
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    classes = {"next": LlavaNextImageProcessorPil, "onevision": LlavaOnevisionImageProcessorPil}
    made = classes[kind](**{key: v for key, v in (PROCESSOR | GRIDDED | values).items() if "type" not in key})
    return lambda images: [made(image, return_tensors="np")["pixel_values"] for image in images]


@pytest.mark.parametrize("kind", KINDS)
def test_every_spelling_of_its_names_is_read(tmp_path, kind):
    """In files of transformers 4, as 5 saves them, and in memory."""
    theirs, family = tiled_model(kind), FAMILIES[f"llava_{kind}"]
    config = hf_config.vlm_config(ConfigFile(theirs.config.to_dict(), "config.json"))
    with torch.device("meta"):
        shapes = {name for name, _ in VLM(config, 272, "sdpa", 16).named_parameters()}
    save(theirs, tmp_path)
    saved = list(state_of(tmp_path))
    inner = [name.replace("vision_tower.", "vision_tower.vision_model.") for name in saved]
    memory = [name for name in theirs.state_dict() if not name.endswith("position_ids")]
    rows = [row for part in PARTS for row in part_rows(part, config.encoder, family)]
    assert "image_newline" in saved and "model.image_newline" in memory
    for names in (saved, inner, memory):
        pieces = to_ours(dict.fromkeys(names, 20), rows)
        assert pieces.of.keys() == shapes and not pieces.unused


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llava-next-vicuna-7b", 7_063_431_168),
        ("llava-onevision-0.5b", 893_675_552),
        ("llava-onevision-7b", 8_030_807_584),
    ],
)
def test_flavors_have_the_published_parameters(name, count):
    config = FLAVORS[name]
    with torch.device("meta"):
        model = VLM(config, config.decoder.vocab_size, "sdpa", 16)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_a_sparse_file_says_what_its_class_takes(tmp_path):
    for kind, name in (("next", "llava-next-vicuna-7b"), ("onevision", "llava-onevision-7b")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": f"llava_{kind}"}))
        read, row = model_config(job_of(path=tmp_path)), FLAVORS[name]
        assert (read.encoder, read.tiles, read.resize) == (row.encoder, row.tiles, "tiles")
        assert read.projector.newline and not read.decoder.tied_embeddings
    tied = {
        "model_type": "llava_onevision",
        "text_config": {"model_type": "qwen2", "tie_word_embeddings": True},
    }
    assert hf_config.decoder_config(ConfigFile(tied, "config.json")).tied_embeddings


@pytest.mark.parametrize(
    ("kind", "config", "processor", "message"),
    [
        ("next", {}, {"size": 16}, "squares of .16, 224. pixels, but the tower takes 16"),
        ("next", {}, PROCESSOR | {"image_grid_pinpoints": [[16, 32]]}, "pinpoints are not those of"),
        ("next", {"image_grid_pinpoints": [[16, 40]]}, None, "in multiples of the tower's 16 pixels"),
        ("next", {}, PROCESSOR | GRIDDED | {"do_normalize": False}, "do_normalize = False"),
        ("next", {}, PROCESSOR | GRIDDED | {"resample": 1}, "resample = 1: not supported"),
        ("next", {}, PROCESSOR | GRIDDED | {"image_mean": [0.5]}, "image_mean = .*three numbers"),
        ("onevision", {"vision_aspect_ratio": "anyres"}, None, "only anyres_max_N"),
        ("onevision", {"vision_feature_select_strategy": "default"}, None, "no class token"),
        ("next", {"vision_feature_select_strategy": "full"}, None, "has no place among rows of tiles"),
    ],
)
def test_what_the_model_is_not_is_refused_by_name(tmp_path, kind, config, processor, message):
    (tmp_path / "config.json").write_text(json.dumps(tiled_model(kind).config.to_dict() | config))
    if processor is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(ConfigError, match=message):
        model_config(job_of(path=tmp_path))


def test_a_plan_that_its_processor_does_not_have_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiled_model("next").config.to_dict()))
    job = job_of(path=tmp_path)
    assert processor_config(job)["image_processor"]["image_grid_pinpoints"] == GRIDDED["image_grid_pinpoints"]
    job.data.resize = "padded"
    with pytest.raises(
        ConfigError, match="data.resize = padded: the image processor of llava_next makes tiles"
    ):
        processor_config(job)


@torch.no_grad()
def test_changing_one_tile_changes_no_other_document(tmp_path):
    save(tiled_model("onevision"), tmp_path)
    job = job_of(path=tmp_path)
    ours, plan = load(job), image_plan(job)
    batch = slot(plan, samples(plan, documents()), BUDGET)
    del batch["labels"]
    before, here = ours(**batch), batch["document_ids"] == 0
    (row, cell) = batch["visual_taps"][here][-20, 0] // 110, batch["visual_taps"][here][-20, 0] % 110
    batch["pixel_values"][row, cell] ^= 255
    after = ours(**batch)
    assert not torch.equal(before[here], after[here])
    assert torch.equal(before[~here], after[~here])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_greedy_answers_are_those_of_transformers(tmp_path, kind):
    theirs = tiled_model(kind).eval()
    save(theirs, tmp_path)
    job = job_of(path=tmp_path)
    ours, plan, tokenizer = load(job), image_plan(job), Characters()
    asked = [each.parts for each in documents()]
    shown = [
        [Picture(p.locator) if isinstance(p, document.Image) else p.text for p in parts] for parts in asked
    ]
    make = Prompter(tokenizer, plan, BUDGET, BUDGET.seq_len)
    cache, sizes = KVCache(2, BUDGET.seq_len + 16, torch.device("cpu")), ours.config.decoder
    cache.attach(ours.decoder.layers.values(), sizes.kv_heads, sizes.head_dim, torch.float32)
    shape = BatchShape(1, 0, BUDGET.patch_rows, BUDGET.patches_per_row, plan.patch_size, plan.mixes)
    engine = Engine(CachedVLM(ours, shape), cache, tokenizer, [])
    requests = [Request(i, make.beginning(parts), max_tokens=12) for i, parts in enumerate(shown)]
    ended = {e.answer.request.number: e.answer.ids for e in engine.answer(requests) if e.answer.ended}
    for number, sample in enumerate(samples(plan, documents())):
        inputs = as_transformers(sample.piece(0, sample.length - 1), plan, ours.config.encoder)
        made = theirs.generate(
            **inputs, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert ended[number] == made[0, sample.length - 1 :].tolist()


def test_a_folder_brings_room_for_its_largest_image_where_no_option_says_otherwise(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiled_model("next").config.to_dict()))
    job, asked = VLMJobConfig(), VLMJobConfig()
    use_hf_folder(job, str(tmp_path), [])
    check_model(job)
    assert (job.data.patches_per_row, job.data.patch_rows) == (17, 5)
    use_hf_folder(asked, str(tmp_path), ["--data.patch_rows", "1", "--training.seq_len=64"])
    assert (asked.data.patches_per_row, asked.data.patch_rows, asked.training.seq_len) == (1024, 1, 2048)
    make, shown = prompter_of(job, Characters(), "", 2000), Picture(encoded(noise(30, 40), "PNG"))
    rows = [len(make.beginning(["a", *[shown] * count]).grid_thw) for count in (0, 1, 4)]
    assert rows == [1, 5, 20]


@pytest.mark.slow
def test_a_onevision_folder_of_ours_answers_in_transformers_as_here(tmp_path):
    """With its own processor, which needs torchvision: ids and greedy answers of none, one and many images,
    which are squares of their own size, since else a level of a pixel can change a word.
    """
    tokenizer, images = write_tokenizer_json(tmp_path / "tokenizer"), []
    plain = json.loads((tokenizer / "tokenizer.json").read_text()) | {
        "post_processor": None
    }  # as Qwen2 has it
    (tokenizer / "tokenizer.json").write_text(json.dumps(plain))
    for seed in range(3):
        images.append(tmp_path / f"{seed}.png")
        Image.fromarray(noise(SIDE, SIDE, seed=seed)).save(images[-1])
    save(tiled_model("onevision", rows=1024), tmp_path / "there")
    write_job(tmp_path / "job.toml", tokenizer, "messages", "chatml")
    command("from_hf", "--hf", tmp_path / "there", "--out", tmp_path / "checkpoint")
    job = "--job.config_file", tmp_path / "job.toml", "--checkpoint", tmp_path / "checkpoint"
    command("to_hf", *job, "--out", tmp_path / "exported")
    contents = [["What is 2 + 2?"], [images[0], "What is it?"], ["Between ", *images, "?"]]
    options = {"add_generation_prompt": True, "answer": 12}
    asked = [
        (str(tmp_path / "exported"), {"messages": hf_processor.asked(content), **options})
        for content in contents
    ]
    answers = hf_processor.processed(asked, tmp_path)
    ours = load_job(str(tmp_path / "exported"), "--training.mixed_precision_param", "float32")
    template = str(tmp_path / "exported" / "chat_template.jinja")
    answering = open_answering(ours, SPEC, None, template, 1, 1200)
    for content, answer in zip(contents, answers, strict=True):
        parts = [part if isinstance(part, str) else Picture(part.read_bytes()) for part in content]
        prompt = answering.prompter.prompt([("user", parts)])
        assert prompt.ids == answer["ids"].tolist()
        (ended,) = [e for e in answering.engine.answer([Request(0, prompt, max_tokens=12)]) if e.answer.ended]
        assert ended.answer.ids == answer["answer"].tolist()[: len(ended.answer.ids)] and ended.answer.ids


@pytest.mark.parametrize("kind", KINDS)
def test_three_steps_from_a_folder_make_a_folder_that_transformers_computes_alike(tmp_path, kind):
    from transformers import AutoModelForImageTextToText

    save(tiled_model(kind, rows=1024), tmp_path / "there")
    (tmp_path / "job.toml").write_text(TRAINED.format(tokenizer=SHIPPED, folder=tmp_path))
    assert train(["--job.config_file", str(tmp_path / "job.toml")]) == 0
    (exported,) = (tmp_path / "run" / "hf").iterdir()
    job = load_job(str(tmp_path / "run"))
    ours, plan, tokenizer = open_model(job), image_plan(job), load_tokenizer(SHIPPED)
    newlines = [state_of(folder)["image_newline"] for folder in (tmp_path / "there", exported)]
    assert (newlines[1] - newlines[0]).abs().max() > 1e-3
    theirs = AutoModelForImageTextToText.from_pretrained(exported).eval()
    for sample in samples(plan, documents(), tokenizer):
        batch = slot(plan, [sample], BUDGET)
        del batch["labels"]
        with torch.no_grad():
            found = ours(**batch)[0, : sample.length]
            expected = theirs(**as_transformers(sample, plan, ours.config.encoder)).logits[0]
        assert (found - expected).abs().max() < 1e-3


TRAINED = """[job]
dump_folder = "{folder}/run"
[model]
tokenizer_path = "{tokenizer}"
[optimizer]
lr = 1e-2
[lr_scheduler]
warmup_steps = 0
[training]
steps = 3
seq_len = 256
local_batch_size = 1
mixed_precision_param = "float32"
[data]
patches_per_row = 51
patch_rows = 5
[[data.sources]]
format = "cc12m"
path = "embedded:captions/heldout"
[metrics]
save_plot = false
[checkpoint]
enable = true
initial_load_in_hf = true
initial_load_path = "{folder}/there"
last_save_in_hf = true
"""
