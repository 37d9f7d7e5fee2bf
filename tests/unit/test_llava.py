"""LLaVA-1.5: the logits of transformers on packed documents, its folders in and out, its processor."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from einops import rearrange

from experiments.vlm.config import PARTS
from experiments.vlm.model import hf_config
from experiments.vlm.model.families import FAMILIES
from experiments.vlm.model.flavors import FLAVORS
from experiments.vlm.model.hf import part_rows
from experiments.vlm.model.vlm import VLM
from experiments.vlm.model_config import image_plan, model_config
from experiments.vlm.processor import processor_config
from tests.reference.batches import IMAGE_ID, Picture, Sizes, build_batch, draw_picture, words
from tests.reference.hf_folders import WIDTHS, save, state_of
from tests.unit.test_hf_export import assert_same, command
from tests.unit.test_hf_import import job_of, load
from torchtitan.components.train_state import as_record
from torchtitan.config.errors import ConfigError
from torchtitan.models.hf.config_file import ConfigFile
from torchtitan.models.weight_names import read, to_ours

SIDE = 16  # pixels: 4 x 4 patches of 4
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
DEVIATION = torch.tensor([0.26862954, 0.26130258, 0.27577711])


def llava(rows: int = 128, **options):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**WIDTHS, image_size=SIDE),
            text_config=LlamaConfig(**text, vocab_size=rows, rms_norm_eps=1e-5),
            image_token_index=IMAGE_ID,
            **options,
        )
    )


def documents() -> list:
    """With several images, none, and one."""
    pictures = [draw_picture(4, 4, 4, seed) for seed in range(4)]
    return [
        [words(5, 0), pictures[0], words(4, 1), pictures[1], pictures[2], words(3, 2)],
        [words(9, 3)],
        [pictures[3], words(6, 4)],
    ]


def as_transformers(document) -> dict:
    images, ids = [], []
    for part in document:
        if isinstance(part, Picture):
            pixels = rearrange(part.patches, "h w (p q c) -> (h p) (w q) c", p=4, c=3) / 255
            images.append(((pixels - MEAN) / DEVIATION).permute(2, 0, 1))
            ids += [IMAGE_ID] * 16
        else:
            ids += part
    return {"input_ids": torch.tensor([ids])} | ({"pixel_values": torch.stack(images)} if images else {})


@pytest.mark.parametrize(
    "options",
    [{}, {"vision_feature_layer": [1, -1]}, {"multimodal_projector_bias": False}],
    ids=["published", "two layers", "no biases"],
)
@torch.no_grad()
def test_documents_beside_each_other_have_the_logits_that_transformers_gives_each_alone(tmp_path, options):
    theirs = llava(**options)
    save(theirs, tmp_path)
    ours = load(job_of(path=tmp_path))
    sizes = Sizes(seq_len=110, patches_per_row=70, merge=1, extra=1)
    batch, start = build_batch([documents()], sizes), 0
    logits = ours(**{name: value for name, value in batch.items() if name != "labels"})[0]
    for document in documents():
        expected = theirs.eval()(**as_transformers(document)).logits[0]
        assert (logits[start : start + len(expected)] - expected).abs().max() < 1e-3
        start += len(expected)


def loss_of(theirs) -> torch.Tensor:
    """Summed over the documents, each alone, and over what our batches have as targets."""
    total = torch.zeros(())
    for document in documents():
        inputs = as_transformers(document)
        targets = inputs["input_ids"][0, 1:]
        logits = theirs(**inputs).logits[0, :-1]
        wanted = torch.where(targets == IMAGE_ID, -100, targets)
        total = total + torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
    return total


def assert_alike(found: dict, expected: dict, bound: float) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    for name, tensor in expected.items():
        scale = max(float(tensor.abs().max()), 1e-3 * largest)
        assert (found[name] - tensor).abs().max() < bound * scale, name


def test_three_steps_have_the_gradients_and_weights_of_transformers_which_opens_what_they_made(tmp_path):
    theirs = llava().eval()
    save(theirs, tmp_path / "there")
    ours, rate = load(job_of(path=tmp_path / "there")), 1e-3
    batch = build_batch([documents()], Sizes(seq_len=110, patches_per_row=70, merge=1, extra=1))
    rows = [row for part in PARTS for row in part_rows(part, ours.config.encoder, FAMILIES["llava"])]
    for _ in range(3):
        ours(**batch).sum().backward()
        loss_of(theirs).backward()
        here, there = (
            {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            for model in (ours, theirs)
        )
        assert_alike(here, read(there, rows).named, 1e-3)
        for model in (ours, theirs):
            torch.optim.SGD(model.parameters(), lr=rate).step()
            model.zero_grad()
    step = tmp_path / "step-3"
    weights = dict(ours.named_parameters())
    assert_alike(weights, read(dict(theirs.named_parameters()), rows).named, 1e-4)
    step.mkdir()
    dcp.save({f"model.{n}": p.detach() for n, p in weights.items()}, checkpoint_id=str(step), no_dist=True)
    record = {"step": 3, "model_only": True, "model": as_record(ours.config)}
    (step / "train_state.json").write_text(json.dumps(record))
    command("to_hf", "--checkpoint", step, "--out", tmp_path / "back")
    opened = type(theirs).from_pretrained(tmp_path / "back").eval()
    opened.config.image_token_id = opened.model.config.image_token_id = IMAGE_ID  # the tests' own
    with torch.no_grad():
        assert abs(float(loss_of(opened) - ours(**batch).sum())) < 1e-2


def test_a_folder_goes_in_and_out_bit_for_bit(tmp_path):
    save(llava(), tmp_path / "llava")
    command("from_hf", "--hf", tmp_path / "llava", "--out", tmp_path / "checkpoint")
    command("to_hf", "--checkpoint", tmp_path / "checkpoint", "--out", tmp_path / "back")
    assert_same(tmp_path / "llava", tmp_path / "back")
    written = json.loads((tmp_path / "back" / "processor_config.json").read_text())
    assert written["processor_class"] == "LlavaProcessor" and written["num_additional_image_tokens"] == 1
    made = written["image_processor"]
    assert made["do_pad"] and made["crop_size"] == {"height": SIDE, "width": SIDE}


def test_every_spelling_of_its_names_is_read(tmp_path):
    """In files of transformers 4, as 5 saves them, and in memory."""
    config = hf_config.vlm_config(ConfigFile(llava().config.to_dict(), "config.json"))
    with torch.device("meta"):
        shapes = {name for name, _ in VLM(config, 128, "sdpa", 16).named_parameters()}
    save(llava(), tmp_path)
    saved = list(state_of(tmp_path))
    inner = [name.replace("vision_tower.", "vision_tower.vision_model.") for name in saved]
    memory = [name for name in llava().state_dict() if not name.endswith("position_ids")]
    rows = [row for part in PARTS for row in part_rows(part, config.encoder, FAMILIES["llava"])]
    assert len({*saved, *memory}) == 2 * len(saved)
    for names in (saved, inner, memory):
        pieces = to_ours(dict.fromkeys(names, 20), rows)
        assert pieces.of.keys() == shapes and not pieces.unused


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llava-1.5-7b", 7_063_427_072),
        ("llava-1.5-13b", 13_351_494_656),
        ("megatron-mistral-7b", 303_507_456 + 4096 * 14336 + 14336 * 1024 + 7_241_732_096),
    ],
)
def test_flavors_have_the_published_parameters_and_are_what_a_sparse_file_says(name, count):
    config = FLAVORS[name]
    with torch.device("meta"):
        model = VLM(config, config.decoder.vocab_size, "sdpa", 16)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    if name == "llava-1.5-7b":  # all else is left to the class
        sparse = {"model_type": "llava", "text_config": {"vocab_size": 32064, "rms_norm_eps": 1e-5}}
        read = hf_config.vlm_config(ConfigFile(sparse, "config.json"))
        assert (read.encoder, read.projector) == (config.encoder, config.projector)
        assert read.decoder.dim == 4096 and read.decoder.mlp_dim == 11008 and read.decoder.layers == 32


def test_a_mistral_that_says_it_has_no_window_has_none_inside_either():
    for said, window in (({}, 4096), ({"sliding_window": None}, None)):
        values = {"model_type": "llava", "text_config": {"model_type": "mistral"} | said}
        assert hf_config.decoder_config(ConfigFile(values, "config.json")).window == window


PROCESSORS = [
    (None, "padded"),
    (
        {"do_pad": True, "size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}},
        "padded",
    ),
    ({"size": {"shortest_edge": SIDE}, "crop_size": SIDE}, "cropped"),
    ({"size": {"height": SIDE, "width": SIDE}, "do_center_crop": False}, "square"),
    ({"size": {"height": SIDE, "width": SIDE}, "image_processor_type": "SiglipImageProcessor"}, "square"),
    ({"size": {"shortest_edge": SIDE}, "do_center_crop": False}, None),
    ({}, None),  # 224, where the tower takes 16
    ({"size": {"shortest_edge": 20}, "crop_size": SIDE}, None),  # less than the shorter side is kept
    ({"size": {"height": SIDE, "width": 2 * SIDE}, "crop_size": SIDE}, None),
    ({"size": {"longest_edge": SIDE}, "crop_size": SIDE}, None),
    ({"size": [SIDE, SIDE], "crop_size": SIDE}, None),
    ({"size": SIDE, "crop_size": SIDE, "image_std": [0.5, 0, 0.5]}, None),
    ({"size": {"shortest_edge": SIDE}, "crop_size": SIDE, "rescale_factor": 1 / 127.5}, None),
    ({"size": {"shortest_edge": SIDE}, "crop_size": SIDE, "do_resize": False}, None),
]


@pytest.mark.parametrize(("values", "expected"), PROCESSORS)
def test_a_folder_is_taken_at_its_word_about_images(tmp_path, values, expected):
    (tmp_path / "config.json").write_text(json.dumps(llava().config.to_dict()))
    if values is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    job = job_of(path=tmp_path)
    if expected is None:
        with pytest.raises(ConfigError, match="preprocessor_config.json: "):
            model_config(job)
        return
    plan = image_plan(job)
    assert plan.most_cells == 17 and plan.most_tokens == 16
    assert (plan.resize, plan.side, plan.marked, plan.fill) == (expected, SIDE, False, (122, 116, 104))
    assert plan.layout(30, 400).tokens.tolist() == list(range(16))
    job.data.resize = "square"
    assert processor_config(job)["image_processor"]["size"] == {"height": SIDE, "width": SIDE}
    job.data.resize = "native"
    with pytest.raises(ConfigError, match="data.resize = native"):
        processor_config(job)


def test_images_are_as_their_own_file_says_beside_one_that_counts_tokens(tmp_path):
    """As folders of transformers 4 have it; 5 writes one file, whose section then counts."""
    (tmp_path / "config.json").write_text(json.dumps(llava().config.to_dict()))
    whole, own = tmp_path / "processor_config.json", tmp_path / "preprocessor_config.json"
    whole.write_text(json.dumps({"processor_class": "LlavaProcessor", "patch_size": 4}))
    own.write_text(json.dumps({"size": {"shortest_edge": SIDE}, "crop_size": SIDE, "resample": 2}))
    read = model_config(job_of(path=tmp_path))
    assert (read.resize, read.encoder.resample) == ("cropped", "bilinear")
    whole.write_text(json.dumps({"image_processor": {"size": SIDE, "crop_size": SIDE, "do_pad": True}}))
    read = model_config(job_of(path=tmp_path))
    assert (read.resize, read.encoder.resample) == ("padded", "bicubic")


@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_onevision"])
@pytest.mark.parametrize("top", [True, False])
@pytest.mark.parametrize("section", [True, False])
def test_the_table_is_tied_where_transformers_ties_it(kind, top, section):
    from transformers import AutoConfig

    text = {"model_type": "qwen2", "tie_word_embeddings": section}
    values = {"model_type": kind, "tie_word_embeddings": top, "text_config": text}
    theirs = AutoConfig.for_model(**values).tie_word_embeddings
    assert hf_config.decoder_config(ConfigFile(values, "config.json")).tied_embeddings is theirs


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vision_feature_layer": 9}, "vision_feature_layer"),
        ({"vision_feature_select_strategy": "some"}, "vision_feature_select_strategy"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act"),
        ({"vision_config": {"model_type": "pixtral"}}, "pixtral"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "no class token"),
    ],
)
def test_what_the_model_is_not_is_refused_by_name(values, message):
    file = ConfigFile(llava().config.to_dict() | values, "config.json")
    with pytest.raises(ConfigError, match=message):
        hf_config.vlm_config(file)
