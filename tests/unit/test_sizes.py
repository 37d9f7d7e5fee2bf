"""Parameters in closed form are those of the built model."""

import pytest
import torch

from experiments.vlm.model.flavors import FLAVORS
from experiments.vlm.model.sizes import encoder_parameters, vlm_parameters
from experiments.vlm.model.vlm import VLM
from torchtitan.models.decoder.sizes import layer_parameters


@pytest.mark.parametrize("flavor", ["debugmodel", "so400m-llama3.1-8B", "base-qwen2.5-0.5B", "giant-qwen3-0.6B"])
def test_parameters_in_closed_form_are_those_of_the_model(flavor):
    config = FLAVORS[flavor]
    with torch.device("meta"):
        model = VLM(config, config.decoder.vocab_size, 2, "sdpa", 1024)
    assert vlm_parameters(config, config.decoder.vocab_size, 2) == sum(p.numel() for p in model.parameters())
    assert encoder_parameters(config.encoder) == sum(p.numel() for p in model.encoder.parameters())
    assert layer_parameters(config.decoder) == sum(p.numel() for p in model.decoder.layers["0"].parameters())
