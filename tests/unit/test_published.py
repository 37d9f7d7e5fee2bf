"""Every published folder: built on the meta device from its config.json, each of its tensors has a place or a
reason, and the parameters are as many as published.

The files in tests/published hold config.json as published, and the names of its tensors, with the number of
layers (or which) for `layers.*`.
"""

import json
import re
from pathlib import Path

import pytest
import torch

from experiments.vlm.model import hf_config as vlm
from experiments.vlm.model.config import ProjectorConfig, VLMConfig
from experiments.vlm.model.families import FAMILIES
from experiments.vlm.model.hf import left_over, part_rows
from experiments.vlm.model.towers import INSIDE, TOWERS
from experiments.vlm.model.vit import VisionEncoder
from experiments.vlm.model.vlm import VLM
from tests.reference.hf_names import VLM_ROWS
from torchtitan.components.weights import shapes_of
from torchtitan.config.errors import ConfigError
from torchtitan.models.decoder.model import Decoder
from torchtitan.models.hf.config_file import ConfigFile
from torchtitan.models.weight_names import to_ours, to_theirs

FOLDERS = sorted((Path(__file__).parents[1] / "published").glob("*.json"))


def names_of(keys: dict[str, int | list[int]]) -> list[str]:
    """0: no layers, the name itself."""
    return [
        name.replace("layers.*", f"layers.{n}")
        for name, layers in keys.items()
        for n in (range(layers or 1) if isinstance(layers, int) else layers)
    ]


@pytest.mark.parametrize("path", FOLDERS, ids=lambda path: path.stem)
def test_a_published_folder_is_built_and_every_tensor_has_its_place(path):
    published = json.loads(path.read_text())
    file, names = ConfigFile(published["config"], path.stem), names_of(published["keys"])
    tower = file.model_type in (*FAMILIES, *TOWERS, *INSIDE)
    part = "encoder" if tower else "decoder"
    encoder = vlm.encoder_config(file) if tower else None
    with torch.device("meta"):
        if encoder:
            built: torch.nn.Module = VisionEncoder(encoder, "sdpa")
        else:
            config = vlm.decoder_config(file)
            built = Decoder(config, config.vocab_size, "sdpa", 1024)
    shapes = shapes_of(torch.nn.ModuleDict({part: built}))
    assert sum(parameter.numel() for parameter in built.parameters()) == published["parameters"]
    pieces = to_ours(dict.fromkeys(names, 1), part_rows(part, encoder, FAMILIES.get(file.model_type)))
    assert pieces.of.keys() == shapes.keys()
    reasons = left_over([part], encoder)
    unknown = [n for n in pieces.unused if not any(re.fullmatch(pattern, n) for pattern in reasons)]
    assert not unknown


@pytest.mark.parametrize("decoder", ["Llama-3.1-8B-Instruct", "Qwen3-8B"])
def test_whole_models_of_full_size_have_a_name_for_every_weight_and_the_published_parameters(decoder):
    tower, text = (
        json.loads((FOLDERS[0].parent / f"{name}.json").read_text())
        for name in ("siglip2-so400m-patch16-naflex", decoder)
    )
    towers = (
        vlm.encoder_config(ConfigFile(tower["config"], "x")),
        vlm.decoder_config(ConfigFile(text["config"], "x")),
    )
    config = VLMConfig(towers[0], ProjectorConfig(4096), towers[1])
    with torch.device("meta"):
        model = VLM(config, config.decoder.vocab_size, "sdpa", 1024)
    projector = sum(parameter.numel() for parameter in model.projector.parameters())
    wide = 4 * 1152
    assert projector == 2 * wide + (wide + 1) * 4096 + (4096 + 1) * 4096
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert counted == tower["parameters"] + text["parameters"] + projector
    theirs = to_theirs({name: shape[0] for name, shape in shapes_of(model).items()}, VLM_ROWS)
    assert (
        len(theirs.of) == len(shapes_of(model))
        and to_ours(dict.fromkeys(theirs.of, 1), VLM_ROWS).unused == []
    )


def test_the_decoder_of_lfm2_is_refused_by_name():
    published = json.loads(next(path for path in FOLDERS if path.stem.startswith("LFM2")).read_text())
    with pytest.raises(ConfigError, match="text_config: model_type = 'lfm2': no decoder of that kind here"):
        vlm.vlm_config(ConfigFile(published["config"], "LFM2.5/config.json"))
