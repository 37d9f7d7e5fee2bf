"""Weight names both ways: what transformers calls them, what has no place here,
and what must not go unseen.
"""

import pytest
import torch

from experiments.vlm.model.vit import VisionEncoder
from tests.reference.hf_names import DECODER_ROWS, ENCODER_ROWS, VLM_ROWS, decoder_to_hf, vlm_to_hf
from tests.reference.models import (
    ENCODER,
    LLAMA,
    QWEN2,
    QWEN3,
    VOCAB,
    hf_text_config,
    hf_vision_config,
    small_vlm,
)
from torchtitan.models.decoder.model import Decoder
from torchtitan.models.weight_names import Part, Row, Transform, prefixed, read, write


@pytest.mark.parametrize("config", [LLAMA, QWEN2, QWEN3], ids=["llama", "qwen2", "qwen3"])
def test_decoder_weights_go_out_and_come_back(config):
    from transformers import AutoModelForCausalLM

    weights = dict(Decoder(config, VOCAB, "sdpa", 16).named_parameters())
    theirs = decoder_to_hf(weights, config)
    expected = {
        name for name, _ in AutoModelForCausalLM.from_config(hf_text_config(config)).named_parameters()
    }
    assert theirs.keys() == expected  # named_parameters leaves a tied output layer out, as a saved file does
    back = read(theirs, DECODER_ROWS)
    assert not back.unused and back.named.keys() == weights.keys()
    assert all(torch.equal(weight, back.named[name]) for name, weight in weights.items())


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_encoder_reads_both_spellings_and_names_the_pooling_head(prefix):
    from transformers import Siglip2VisionModel

    theirs = Siglip2VisionModel(hf_vision_config(ENCODER, head=True)).state_dict()
    read_back = read({prefix + name: weight for name, weight in theirs.items()}, ENCODER_ROWS)
    assert read_back.named.keys() == VisionEncoder(ENCODER, "sdpa").state_dict().keys()
    assert read_back.unused and all(name.startswith(prefix + "head.") for name in read_back.unused)
    written = write(read_back.named, ENCODER_ROWS)
    assert written.keys() == {name for name in theirs if not name.startswith("head.")}
    assert all(torch.equal(weight, theirs[name]) for name, weight in written.items())


def test_the_tower_of_a_whole_siglip2_file_is_found_among_the_rest():
    tower = write(VisionEncoder(ENCODER, "sdpa").state_dict(), ENCODER_ROWS)
    others = [
        "logit_scale",
        "logit_bias",
        "text_model.encoder.layers.0.mlp.fc1.weight",
        "text_model.head.weight",
    ]
    whole = {"vision_model." + name: weight for name, weight in tower.items()} | {
        name: torch.zeros(1) for name in others
    }
    assert read(whole, ENCODER_ROWS).unused == others


def test_an_older_spelling_of_the_whole_model_is_read():
    model = small_vlm(QWEN2)
    theirs = vlm_to_hf(model.state_dict(), model.config)
    assert "lm_head.weight" not in theirs
    older = {
        name.replace("vision_tower.", "vision_tower.vision_model."): weight for name, weight in theirs.items()
    }
    back = read(older, VLM_ROWS)
    assert not back.unused and back.named.keys() == dict(model.named_parameters()).keys()


def test_a_weight_without_a_name_or_with_two_is_an_error():
    with pytest.raises(ValueError, match=r"layers.0.extra has no name"):
        write({"layers.0.extra": torch.zeros(1)}, DECODER_ROWS)
    twice = {"post_layernorm.bias": torch.zeros(1), "vision_model.post_layernorm.bias": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"norm.bias is there twice"):
        read(twice, ENCODER_ROWS)


def test_stars_are_carried_over_in_order_and_transforms_go_both_ways():
    rows = prefixed(
        [Row("a.*.b.*", "x.*.y.*", Transform(lambda w: w.T, lambda w: w.T.contiguous()))], "in.", "out."
    )
    weight = torch.arange(6.0).view(2, 3)
    ours = read({"in.a.7.b.bias": weight, "in.a.7.8.b.bias": weight}, rows)
    assert ours.unused == ["in.a.7.8.b.bias"]  # a star is one part of a name
    assert torch.equal(ours.named["out.x.7.y.bias"], weight.T)
    assert torch.equal(write(ours.named, rows)["in.a.7.b.bias"], weight)


def test_weights_are_split_stacked_and_offset_along_their_rows():
    rows = [
        *(Row("qkv.*", f"w{name}.*", theirs_part=Part(k, 3)) for k, name in enumerate("qkv")),
        Row("gate.weight", "w13.weight", ours_part=Part(0, 2)),
        Row("up.weight", "w13.weight", ours_part=Part(1, 2)),
        Row("table.weight", "first", theirs_part=Part(0, 2, first=0, last=1)),
        Row("table.weight", "rest", theirs_part=Part(1, 2, first=1)),
    ]
    theirs = {
        "qkv.weight": torch.randn(12, 2), "qkv.bias": torch.randn(12), "up.weight": torch.randn(3, 2),
        "gate.weight": torch.randn(3, 2), "table.weight": torch.randn(5, 2),
    }  # fmt: skip
    ours = read(theirs, rows).named
    assert torch.equal(ours["wk.weight"], theirs["qkv.weight"][4:8])
    assert torch.equal(ours["wv.bias"], theirs["qkv.bias"][8:])
    assert torch.equal(ours["w13.weight"], torch.cat([theirs["gate.weight"], theirs["up.weight"]]))
    assert torch.equal(ours["first"], theirs["table.weight"][:1]) and len(ours["rest"]) == 4
    back = write(ours, rows)
    assert back.keys() == theirs.keys() and all(torch.equal(back[name], theirs[name]) for name in theirs)
    with pytest.raises(ValueError, match="w13.weight is not whole: there is only gate.weight of its 2 parts"):
        read({"gate.weight": theirs["gate.weight"]}, rows)
