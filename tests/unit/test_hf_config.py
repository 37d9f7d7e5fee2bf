"""config.json read as transformers reads it, and written so that it reads the same."""

import json
from dataclasses import replace

import pytest

from experiments.vlm.config import VLMJobConfig
from experiments.vlm.model import hf_config as vlm
from experiments.vlm.model.config import ProjectorConfig, VLMConfig
from experiments.vlm.model.families import family_of
from experiments.vlm.model.flavors import ENCODERS, FLAVORS
from experiments.vlm.model.towers import write_encoder
from experiments.vlm.model_config import model_config
from tests.reference.models import ENCODER, LLAMA, QWEN2, QWEN3
from torchtitan.config.errors import ConfigError
from torchtitan.config.layout import Degrees
from torchtitan.models.decoder import hf_config as decoder
from torchtitan.models.decoder.check import check_decoder
from torchtitan.models.decoder.flavors import DECODERS, DecoderConfig
from torchtitan.models.hf.config_file import ConfigFile, read_config

MISTRAL = replace(LLAMA, rope_scaling=None, window=512, model_type="mistral", context=2048)
SMALL = {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3, "mistral": MISTRAL}


def of(**values) -> ConfigFile:
    return ConfigFile(values, "folder/config.json")


def theirs(config: DecoderConfig, **values):
    """The configuration that transformers makes of what we write, as values."""
    from transformers import AutoConfig

    written = decoder.hf_config(config, config.vocab_size) | values
    return AutoConfig.for_model(written.pop("model_type"), **written).to_dict()


@pytest.mark.parametrize("name", SMALL)
def test_what_is_written_is_read_back_by_transformers_and_by_us(name):
    config = SMALL[name]
    once = decoder.decoder_config(ConfigFile(json.loads(json.dumps(decoder.hf_config(config, 96))), "x"))
    again = decoder.decoder_config(ConfigFile(theirs(config), "x"))
    assert once == again == replace(config, model_type=decoder.model_type_of(config))


@pytest.mark.parametrize("name", SMALL)
def test_a_sparse_file_means_the_defaults_of_its_class(name):
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(name).to_dict()
    nulls = {key: None for key in ("head_dim", "rope_scaling", "rms_norm_eps", "tie_word_embeddings")}
    sparse = decoder.decoder_config(of(model_type=name, **nulls))
    assert sparse == decoder.decoder_config(ConfigFile(theirs, "theirs"))
    as_many = decoder.decoder_config(of(model_type=name, num_attention_heads=6, num_key_value_heads=None))
    assert as_many.kv_heads == 6
    assert sparse.vocab_size == theirs["vocab_size"] and sparse.mlp_dim == theirs["intermediate_size"]


def test_both_spellings_of_the_rotary_settings_mean_the_same():
    """Where both are there rope_scaling counts, as in transformers."""
    from transformers import LlamaConfig

    scaling = {"factor": 8.0, "original_max_position_embeddings": 64, "high_freq_factor": 2.0}
    kinds = [scaling | {"rope_type": "llama3"}, scaling | {"type": "llama3"}]
    old = [of(model_type="llama", rope_theta=5e5, rope_scaling=kind) for kind in kinds]
    new = of(model_type="llama", rope_parameters=kinds[0] | {"rope_theta": 500000})
    for file in (*old, new):
        config = decoder.decoder_config(file)
        assert config.rope_theta == 5e5 and config.rope_scaling is not None
        assert config.rope_scaling.factor == 8 and config.rope_scaling.original_context == 64
    plain, longer = {"rope_theta": 900.0}, kinds[0] | {"rope_theta": 5e5, "low_freq_factor": 1.0}
    both = of(model_type="llama", rope_parameters=plain, rope_scaling=longer)
    assert decoder.decoder_config(both) == decoder.decoder_config(new)
    assert LlamaConfig(rope_parameters=plain, rope_scaling=longer).rope_parameters == longer
    unscaled = of(model_type="llama", rope_theta=5e5, rope_scaling=None)
    assert decoder.decoder_config(unscaled).rope_scaling is None


@pytest.mark.parametrize("top", [None, True, False])
@pytest.mark.parametrize("section", [None, True, False])
def test_the_flag_of_the_tied_table_is_found_wherever_it_stands(top, section):
    """The top counts, as in transformers; where it is missing the section is asked before the default."""
    text = {"model_type": "qwen3", "tie_word_embeddings": section}
    file = of(model_type="lfm2_vl", tie_word_embeddings=top, text_config=text)
    expected = top if top is not None else section if section is not None else True
    assert vlm.decoder_config(file).tied_embeddings is expected
    both = of(**file.values, tie_embedding=not expected)
    assert vlm.decoder_config(both).tied_embeddings is not expected


def test_a_published_row_is_what_its_config_says():
    row = DECODERS["llama3.2-1B"]
    read = decoder.decoder_config(ConfigFile(theirs(row), "theirs"))
    assert replace(read, model_type="") == row
    whole = FLAVORS["so400m-qwen3-0.6B"]
    written = family_of(whole).write(whole, whole.decoder.vocab_size, 7)
    read = vlm.vlm_config(ConfigFile(json.loads(json.dumps(written)), "written"))
    assert replace(read, decoder=replace(read.decoder, model_type="")) == whole


def test_towers_of_any_size_and_of_one_size_are_told_apart():
    from transformers import AutoConfig

    naflex = vlm.encoder_config(ConfigFile(AutoConfig.for_model("siglip2").to_dict(), "theirs"))
    assert naflex == ENCODERS["base"]
    values = {"image_size": 384, "patch_size": 14, "hidden_size": 1152, "num_attention_heads": 16}
    alone = of(**AutoConfig.for_model("siglip_vision_model", **values).to_dict())
    inside = of(model_type="siglip", vision_config=values)
    for file in (alone, inside):
        fixed = vlm.encoder_config(file)
        assert (fixed.image_size, fixed.position_grid, fixed.patch_size) == (384, 27, 14)
        assert vlm.encoder_config(ConfigFile(write_encoder(fixed), "x")) == fixed


def test_the_whole_model_is_read_as_transformers_writes_it():
    from transformers import Lfm2VlConfig

    config = VLMConfig(ENCODER, ProjectorConfig(56, layer_norm=False, merge_size=3), QWEN3)
    written = family_of(config).write(config, 96, 5)
    theirs = Lfm2VlConfig(**{key: value for key, value in written.items() if key != "model_type"})
    read = vlm.vlm_config(ConfigFile(theirs.to_dict(), "theirs"))
    assert read == replace(config, decoder=replace(QWEN3, model_type="qwen3"))
    assert theirs.image_token_id == 5 and theirs.text_config.vocab_size == 96


WRONG = [
    ({"model_type": "lfm2"}, "model_type = 'lfm2': no decoder of that kind here; known: llama, mistral"),
    ({}, "model_type = ''"),
    ({"model_type": "llama", "hidden_size": "wide"}, "hidden_size = 'wide': expected a whole number"),
    ({"model_type": "llama", "num_hidden_layers": 0}, "num_hidden_layers = 0: must be > 0"),
    ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act = 'gelu': not supported here, only 'silu'"),
    ({"model_type": "llama", "attention_bias": True}, "attention_bias = True"),
    ({"model_type": "llama", "is_causal": False}, "is_causal = False: not supported here, only True"),
    ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window = True"),
    ({"model_type": "qwen2", "layer_types": 5}, "layer_types has 5: not supported here"),
    ({"model_type": "qwen2", "layer_types": ["sliding_attention"]}, "layer_types has 'sliding_attention'"),
    ({"model_type": "qwen3", "attention_bias": True}, "attention_bias = True"),
    ({"model_type": "llama", "rope_scaling": {"type": "yarn"}}, "rope_type = 'yarn'"),
    ({"model_type": "llama", "rope_scaling": {"type": "llama3"}}, "factor is missing"),
    ({"model_type": "llama", "rope_scaling": "none"}, "rope_scaling = 'none': expected a table"),
    ({"model_type": "llama", "num_key_value_heads": 5}, "5 key/value heads do not divide 32"),
]


@pytest.mark.parametrize(("values", "told"), WRONG, ids=[told[:30] for _, told in WRONG])
def test_a_decoder_that_is_not_ours_is_refused_with_its_key(values, told):
    with pytest.raises(ConfigError) as caught:
        decoder.decoder_config(of(**values))
    assert told in str(caught.value) and str(caught.value).startswith("folder/config.json")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"model_type": "vjepa2"}, "model_type = 'vjepa2': no encoder of that kind here"),
        ({"model_type": "siglip2_vision_model", "num_patches": 250}, "num_patches = 250: must be a square"),
        ({"model_type": "siglip2_vision_model", "num_attention_heads": 7}, "7 heads do not divide"),
        (
            {"model_type": "lfm2_vl", "vision_config": {"model_type": "clip"}},
            "vision_config: model_type = 'clip'",
        ),
    ],
)
def test_an_encoder_that_is_not_ours_is_refused_with_its_key(values, told):
    with pytest.raises(ConfigError, match=r"^folder/config.json") as caught:
        vlm.encoder_config(of(**values))
    assert told in str(caught.value)


def test_a_slot_longer_than_the_window_of_attention_is_refused():
    job, one = VLMJobConfig(), Degrees(1, 1, 1, 1, 1)
    job.training.seq_len = MISTRAL.window
    check_decoder(MISTRAL, job, one)
    job.training.seq_len += 1
    with pytest.raises(ConfigError, match="training.seq_len = 513: .*sliding window of 512"):
        check_decoder(MISTRAL, job, one)


def test_patches_follow_the_model_unless_given():
    job = VLMJobConfig()
    assert model_config(job).projector.merge_size == 2
    job.data.spatial_merge_size, job.data.patch_size = 4, 16
    assert model_config(job).projector.merge_size == 4
    job.data.patch_size = 14
    with pytest.raises(ConfigError, match="data.patch_size = 14: .* takes patches of 16"):
        model_config(job)


def test_a_folder_without_a_readable_config_is_told(tmp_path):
    for text, told in ((None, "No such file"), ("{", "is not JSON"), ("[]", "expected an object")):
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=told):
            read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"quantization_config": {"bits": 4}}')
    with pytest.raises(ConfigError, match="quantized weights"):
        read_config(tmp_path)
