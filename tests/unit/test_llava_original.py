"""LLaVA-1.5 as its authors save it: in and out bit for bit, the tower by its name, every weight's name."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.commands import convert_to_hf, main
from experiments.vlm.config import PARTS
from experiments.vlm.model import hf_config
from experiments.vlm.model.families import FAMILIES, kind_of
from experiments.vlm.model.flavors import FLAVORS
from experiments.vlm.model.hf import part_rows
from experiments.vlm.model.vlm import VLM
from experiments.vlm.model_config import image_plan, model_config
from tests.reference.hf_folders import save, state_of, write_job
from tests.unit.test_hf_import import job_of, load
from tests.unit.test_llava import llava
from torchtitan.components.tokenizer import load_tokenizer
from torchtitan.config.errors import ConfigError
from torchtitan.models.hf.config_file import ConfigFile
from torchtitan.models.weight_names import to_ours

# As published with liuhaotian/llava-v1.5-7b, but for what training alone reads.
PUBLISHED = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "image_aspect_ratio": "pad",
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "model_type": "llava_llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_mm_proj": True,
    "vocab_size": 32000,
}
KINDS = ("weight", "bias")
LAYER = [f"self_attn.{name}_proj" for name in "qkvo"] + [
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
]
LAYER += ["input_layernorm", "post_attention_layernorm"]
DECODER = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
DECODER += [f"model.layers.{number}.{name}.weight" for number in range(32) for name in LAYER]
PROJECTOR = [f"model.mm_projector.{number}.{kind}" for number in (0, 2) for kind in KINDS]
BLOCK = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")]
BLOCK += ["mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2"]
NORMED = [
    "pre_layrnorm",
    "post_layernorm",
    *(f"encoder.layers.{n}.{name}" for n in range(24) for name in BLOCK),
]
TOWER = ["class_embedding", "patch_embedding.weight", "position_embedding.weight"]
TOWER = [f"embeddings.{name}" for name in TOWER] + [f"{name}.{kind}" for name in NORMED for kind in KINDS]


def original_name(name: str) -> str:
    """The authors' name of a weight that LlavaForConditionalGeneration saves."""
    if name.startswith("vision_tower."):
        return name.replace("vision_tower.", "model.vision_tower.vision_tower.vision_model.", 1)
    for number, place in (("1", "0"), ("2", "2")):
        name = name.replace(f"multi_modal_projector.linear_{number}", f"model.mm_projector.{place}")
    return name.removeprefix("language_model.")


@pytest.fixture
def folders(tmp_path) -> dict[str, Path]:
    """A model of transformers, its tower alone, and the model as its authors would save it, with the tower's
    weights and without.
    """
    theirs, at = llava(), {n: tmp_path / n for n in ("hf", "clip", "llava trained", "llava frozen")}
    save(theirs, at["hf"])
    theirs.model.vision_tower.save_pretrained(at["clip"])
    state = {original_name(name): tensor for name, tensor in state_of(at["hf"]).items()}
    config = theirs.config.text_config.to_dict() | {
        "model_type": "llava_llama",
        "mm_vision_tower": "clip",
        "mm_hidden_size": 48,
        "mm_projector_type": "mlp2x_gelu",
        "image_aspect_ratio": "pad",
    }
    for name in ("llava trained", "llava frozen"):
        at[name].mkdir()
        kept = {n: t for n, t in state.items() if name == "llava trained" or "vision_tower" not in n}
        save_file(kept, at[name] / "model.safetensors", {"format": "pt"})
    (at["llava trained"] / "config.json").write_text(
        json.dumps(config | {"mm_vision_tower": str(at["clip"])})
    )
    (at["llava frozen"] / "config.json").write_text(json.dumps(config | {"mm_vision_tower": "../clip"}))
    return at


@pytest.mark.parametrize("name", ["llava trained", "llava frozen"])
def test_it_is_the_model_that_transformers_has(folders, name):
    ours, theirs = load(job_of(path=folders[name])), load(job_of(path=folders["hf"]))
    assert dataclasses.replace(ours.config, tiles=theirs.config.tiles) == theirs.config
    expected = dict(theirs.named_parameters())
    assert expected.keys() == dict(ours.named_parameters()).keys()
    for weight, found in ours.named_parameters():
        assert torch.equal(found, expected[weight]), weight
    assert image_plan(job_of(path=folders[name])).resize == "padded"


def test_it_goes_in_and_out_bit_for_bit(folders, tmp_path):
    write_job(tmp_path / "job.toml", "assets/tokenizer")
    job = ["--job.config_file", str(tmp_path / "job.toml"), "--checkpoint", str(tmp_path / "checkpoint")]
    source, back = folders["llava trained"], tmp_path / "my-llava"
    assert main(["from_hf", "--hf", str(source), "--out", str(tmp_path / "checkpoint")]) == 0
    named = ["--layout", "original", "--vision_tower", str(folders["clip"])]
    assert main(["to_hf", *job, *named, "--out", str(back)]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (source, back))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    written = json.loads((back / "config.json").read_text())
    assert written["architectures"] == ["LlavaLlamaForCausalLM"] and written["unfreeze_mm_vision_tower"]
    assert model_config(job_of(path=back)) == model_config(job_of(path=source))


def test_the_image_has_no_row_there(tmp_path):
    """Nor what stands behind it, where nothing of that is read for anything else."""
    save(llava(rows=1024), tmp_path / "hf")
    write_job(tmp_path / "job.toml", "assets/tokenizer")
    job = ["--job.config_file", str(tmp_path / "job.toml"), "--checkpoint", str(tmp_path / "checkpoint")]
    assert main(["from_hf", "--hf", str(tmp_path / "hf"), "--out", str(tmp_path / "checkpoint")]) == 0
    named = ["--layout", "original", "--vision_tower", "openai/clip-vit-large-patch14-336"]
    assert main(["to_hf", *job, *named, "--out", str(tmp_path / "llava")]) == 0
    kept, whole = load_file(tmp_path / "llava" / "model.safetensors"), state_of(tmp_path / "hf")
    image = load_tokenizer("assets/tokenizer").image_id
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(kept[name], whole[f"language_model.{name}"][:image])
    assert json.loads((tmp_path / "llava" / "config.json").read_text())["vocab_size"] == image


def test_the_published_config_gives_the_sizes_of_the_flavor_and_every_key_has_its_place():
    file, flavor = ConfigFile(PUBLISHED, "config.json"), FLAVORS["llava-1.5-7b"]
    config = hf_config.vlm_config(file)
    decoder = dataclasses.replace(flavor.decoder, vocab_size=32000, model_type="llama")
    assert config == dataclasses.replace(flavor, decoder=decoder, resize="native")
    with torch.device("meta"):
        shapes = {name for name, _ in VLM(config, 32000, "sdpa", 16).named_parameters()}
    rows = [row for part in PARTS for row in part_rows(part, config.encoder, FAMILIES["llava_llama"])]
    tower = [f"model.vision_tower.vision_tower.vision_model.{n}" for n in TOWER]
    pieces = to_ours(dict.fromkeys([*DECODER, *PROJECTOR, *tower], 577), rows)
    assert pieces.of.keys() == shapes and not pieces.unused


@pytest.mark.parametrize("model_type", ["llava", "llava_llama"])
def test_older_ones_share_the_model_type_of_transformers(model_type):
    assert kind_of(ConfigFile(PUBLISHED | {"model_type": model_type}, "config.json")) == "llava_llama"
    assert kind_of(ConfigFile({"model_type": "llava"}, "config.json")) == "llava"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"mm_vision_tower": "google/siglip"},
            "mm_vision_tower = google/siglip: no such folder, and none of",
        ),
        ({"mm_projector_type": "identity"}, "mm_projector_type = 'identity'"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature = 'cls'"),
        ({"mm_vision_select_layer": 25}, "mm_vision_select_layer = 25"),
        ({"mm_hidden_size": 768}, "mm_hidden_size = 768, but openai/clip-vit-large-patch14-336 is 1024 wide"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end = True"),
    ],
)
def test_what_it_is_not_is_refused_by_name(values, message):
    with pytest.raises(ConfigError, match=message):
        hf_config.vlm_config(ConfigFile(PUBLISHED | values, "config.json"))


def test_a_tower_that_is_nowhere_is_told_before_anything_is_read(folders):
    shutil.rmtree(folders["clip"])
    config = folders["llava frozen"] / "config.json"
    config.write_text(config.read_text().replace("../clip", "openai/clip-vit-large-patch14-336"))
    with pytest.raises(ConfigError, match="the tower is neither here nor in .*initial_load_encoder_path"):
        model_config(job_of(path=folders["llava frozen"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layout", "original", "--out", "my-model"], "has 'llava' in it"),
        (["--layout", "original", "--out", "llava", "--part", "encoder"], "is of the whole model"),
        (["--vision_tower", "clip", "--out", "llava"], "--vision_tower needs --layout original"),
    ],
)
def test_what_cannot_be_written_is_told_before_the_checkpoint_is_read(options, message):
    with pytest.raises(ConfigError, match=message):
        convert_to_hf.main(options)
