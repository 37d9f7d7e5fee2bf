"""Megatron's files at any tensor parallel degree, written here as its converters write them: the same weights
as transformers has, and the same logits.
"""

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from experiments.commands import main
from experiments.commands.convert_from_torch import main as from_torch
from tests.reference.batches import Sizes, build_batch, draw_picture, words
from tests.reference.hf_folders import WIDTHS, save
from tests.reference.models import randomise
from tests.unit.test_hf_import import job_of, load
from tests.unit.test_llava import DEVIATION, MEAN
from torchtitan.config.errors import ConfigError

HEAD = 12
GROUPS, SHARED = 4, 2  # of the decoder: heads of keys, and of queries for each
HEADS = ["--encoder_head_dim", str(HEAD), "--decoder_head_dim", str(HEAD), "--rope_theta", "10000"]
PROJECTOR = 40


class Models:
    """Models of transformers, with random weights."""

    def __init__(self) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModel, MistralConfig, MistralForCausalLM

        self.clip = CLIPVisionModel(CLIPVisionConfig(**WIDTHS, image_size=16))
        text = {"hidden_size": 60, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": HEAD}
        heads = {"num_attention_heads": GROUPS * SHARED, "num_key_value_heads": GROUPS, "vocab_size": 128}
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        config = MistralConfig(**text, **heads, rope_parameters=rope, sliding_window=None, rms_norm_eps=1e-5)
        self.mistral = MistralForCausalLM(config)
        first, second = torch.nn.Linear(48, PROJECTOR, bias=False), torch.nn.Linear(PROJECTOR, 60, bias=False)
        self.projector = torch.nn.Sequential(first, torch.nn.GELU(), second)
        for number, model in enumerate((self.clip, self.mistral, self.projector)):
            randomise(model, number)


def stacked(q: Tensor, k: Tensor, v: Tensor, shared: int) -> Tensor:
    """One group after the other: its heads of q, then its k and its v."""
    pieces = []
    for group in range(len(k) // HEAD):
        first = group * shared * HEAD
        rows = slice(group * HEAD, group * HEAD + HEAD)
        pieces += [q[first : first + shared * HEAD], k[rows], v[rows]]
    return torch.cat(pieces)


def cut(tensor: Tensor, ranks: int, dim: int | None) -> list[Tensor]:
    return [t.clone() for t in ([tensor] * ranks if dim is None else tensor.chunk(ranks, dim))]


def layer(
    ours: dict, theirs: str, ranks: int, te: bool, shared: int, norms: tuple[str, str]
) -> dict[str, list]:
    made = {}
    for kind in ("weight", "bias"):
        if f"self_attn.q_proj.{kind}" in ours:
            qkv = [ours[f"self_attn.{name}_proj.{kind}"] for name in "qkv"]
            made[f"self_attention.linear_qkv.{kind}"] = cut(stacked(*qkv, shared), ranks, 0)
        for name, plain, inside in (
            (norms[0], "input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
            (norms[1], "pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
        ):
            if f"{name}.{kind}" in ours:
                made[(inside if te else plain) + kind] = cut(ours[f"{name}.{kind}"], ranks, None)
    if te:
        made["self_attention.linear_qkv._extra_state"] = [None] * ranks
    return {f"{theirs}.{name}": each for name, each in made.items()}


def inside(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


def clip_files(models: Models, ranks: int, te: bool) -> dict[str, list]:
    state = {n.removeprefix("vision_model."): t for n, t in models.clip.state_dict().items()}
    whole = {
        "class_token": state["embeddings.class_embedding"].expand(1, 1, -1),
        "position_embeddings.weight": state["embeddings.position_embedding.weight"],
        "conv1.weight": state["embeddings.patch_embedding.weight"],
        "ln_pre.weight": state["pre_layrnorm.weight"],
        "ln_pre.bias": state["pre_layrnorm.bias"],
    }
    made = {name: cut(tensor, ranks, None) for name, tensor in whole.items()}
    for number in range(3):
        ours, place = inside(state, f"encoder.layers.{number}."), f"decoder.layers.{number}"
        made |= layer(ours, place, ranks, te, 1, ("layer_norm1", "layer_norm2"))
        made[f"{place}.self_attention.linear_proj.weight"] = cut(ours["self_attn.out_proj.weight"], ranks, 1)
        made[f"{place}.self_attention.linear_proj.bias"] = cut(ours["self_attn.out_proj.bias"], ranks, None)
        made[f"{place}.mlp.linear_fc1.weight"] = cut(ours["mlp.fc1.weight"], ranks, 0)
        made[f"{place}.mlp.linear_fc1.bias"] = cut(ours["mlp.fc1.bias"], ranks, 0)
        made[f"{place}.mlp.linear_fc2.weight"] = cut(ours["mlp.fc2.weight"], ranks, 1)
        made[f"{place}.mlp.linear_fc2.bias"] = cut(ours["mlp.fc2.bias"], ranks, None)
    return made


def mistral_files(models: Models, ranks: int, te: bool) -> dict[str, list]:
    state = models.mistral.state_dict()
    made = {
        "embedding.word_embeddings.weight": cut(state["model.embed_tokens.weight"], ranks, 0),
        "output_layer.weight": cut(state["lm_head.weight"], ranks, 0),
        "decoder.final_layernorm.weight": cut(state["model.norm.weight"], ranks, None),
    }
    for number in range(2):
        ours, place = inside(state, f"model.layers.{number}."), f"decoder.layers.{number}"
        made |= layer(ours, place, ranks, te, SHARED, ("input_layernorm", "post_attention_layernorm"))
        made[f"{place}.self_attention.linear_proj.weight"] = cut(ours["self_attn.o_proj.weight"], ranks, 1)
        gates, ups = (ours[f"mlp.{name}_proj.weight"].chunk(ranks) for name in ("gate", "up"))
        made[f"{place}.mlp.linear_fc1.weight"] = [torch.cat(pair) for pair in zip(gates, ups, strict=True)]
        made[f"{place}.mlp.linear_fc2.weight"] = cut(ours["mlp.down_proj.weight"], ranks, 1)
    return made


def write(folder: Path, tensors: dict[str, list], ranks: int, **beside) -> Path:
    for rank in range(ranks):
        path = folder / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        torch.save({"model": {name: each[rank] for name, each in tensors.items()}} | beside, path)
    return folder


def combined(models: Models, ranks: int, te: bool, projector: bool = True) -> dict[str, list]:
    parts = {
        "vision_model": clip_files(models, ranks, te),
        "language_model": mistral_files(models, ranks, te),
    }
    if projector:
        first, second = models.projector[0].weight.detach(), models.projector[2].weight.detach()
        fc = {"linear_fc1.weight": cut(first, ranks, 0), "linear_fc2.weight": cut(second, ranks, 1)}
        parts["vision_projection.encoder"] = fc
    return {f"{part}.{name}": each for part, names in parts.items() for name, each in names.items()}


@pytest.fixture(scope="module")
def models() -> Models:
    return Models()


@pytest.mark.parametrize(("ranks", "te"), [(1, False), (2, True), (4, False)])
def test_the_weights_are_those_of_transformers_at_any_degree(models, tmp_path, ranks, te):
    arguments = argparse.Namespace(tensor_model_parallel_size=ranks)
    write(tmp_path / "in", combined(models, ranks, te), ranks, args=arguments, iteration=1)
    assert main(["from_torch", "--torch", str(tmp_path / "in"), "--out", str(tmp_path / "out"), *HEADS]) == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    clip = {n.removeprefix("vision_model."): t for n, t in models.clip.state_dict().items()}
    expected = {f"vision_tower.{n}": t for n, t in clip.items() if "position_ids" not in n}
    expected |= {f"language_model.{name}": t for name, t in models.mistral.state_dict().items()}
    expected |= {
        f"multi_modal_projector.linear_{n + 1}.weight": models.projector[2 * n].weight for n in (0, 1)
    }
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert "post_layernorm" in name or torch.equal(found[name], tensor), name


@torch.no_grad()
def test_the_logits_are_those_of_the_parts_one_after_the_other(models, tmp_path):
    write(tmp_path / "in" / "iter_0000001", combined(models, 2, False), 2)
    with pytest.raises(
        ConfigError, match="a folder of Megatron: torchtitan-vlm from_torch --torch .*/in --out"
    ):
        load(job_of(path=tmp_path / "in"))
    assert main(["from_torch", "--torch", str(tmp_path / "in"), "--out", str(tmp_path / "out"), *HEADS]) == 0
    ours = load(job_of(path=tmp_path / "out"))
    assert ours.config.projector.hidden_dim == PROJECTOR and not ours.config.projector.bias
    picture, before, after = draw_picture(4, 4, 4, 0), words(3, 1), words(6, 2)
    batch = build_batch([[[before, picture, after]]], Sizes(25, patches_per_row=17, merge=1, extra=1))
    logits = ours(**{name: value for name, value in batch.items() if name != "labels"})[0]
    pixels = picture.patches.unflatten(-1, (4, 4, 3)).permute(0, 2, 1, 3, 4).reshape(16, 16, 3) / 255
    seen = models.clip(
        pixel_values=((pixels - MEAN) / DEVIATION).permute(2, 0, 1)[None], output_hidden_states=True
    )
    visual = models.projector(seen.hidden_states[-1][:, 1:])
    embed = models.mistral.model.embed_tokens
    h = torch.cat([embed(torch.tensor([before])), visual, embed(torch.tensor([after]))], 1)
    assert (logits - models.mistral(inputs_embeds=h).logits[0]).abs().max() < 1e-3


@pytest.mark.parametrize(("files", "part"), [(clip_files, "encoder"), (mistral_files, "decoder")])
def test_a_part_alone_is_a_folder_of_its_class(models, tmp_path, files, part):
    write(tmp_path / "in", files(models, 2, True), 2)
    assert main(["from_torch", "--torch", str(tmp_path / "in"), "--out", str(tmp_path / "out"), *HEADS]) == 0
    theirs = models.clip if part == "encoder" else models.mistral
    again = type(theirs).from_pretrained(tmp_path / "out")
    for name, tensor in theirs.state_dict().items():
        assert "post_layernorm" in name or torch.equal(again.state_dict()[name], tensor), name


def test_a_decoder_whose_output_layer_is_its_embedding_says_so(models, tmp_path):
    tensors = mistral_files(models, 2, False)
    del tensors["output_layer.weight"]
    write(tmp_path / "in", tensors, 2)
    assert main(["from_torch", "--torch", str(tmp_path / "in"), "--out", str(tmp_path / "out"), *HEADS]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]


def test_without_a_projector_it_is_made_anew(models, tmp_path):
    write(tmp_path / "in", combined(models, 1, False, projector=False), 1)
    assert main(["from_torch", "--torch", str(tmp_path / "in"), "--out", str(tmp_path / "out"), *HEADS]) == 0
    job = job_of(path=tmp_path / "out")
    with pytest.raises(ConfigError, match="multi_modal_projector.linear_1.weight .* is not in"):
        load(job)
    job.checkpoint.initial_load_allow = ["missing"]
    projector = load(job).config.projector
    assert (projector.hidden_dim, projector.bias) == (64, False)


class Evil:
    def __reduce__(self):
        return print, ("opened",)


def spoilt(folder: Path, models: Models, how: str) -> None:
    tensors = combined(models, 2, False)
    if how == "code":
        write(folder, tensors, 2, args=Evil())
        return
    if how == "unknown":
        tensors["vision_model.adapter.weight"] = [torch.ones(2)] * 2
    if how == "different":
        tensors["vision_model.ln_pre.weight"][1] += 1
    write(folder, tensors, 2)
    if how == "missing":
        (folder / "mp_rank_00" / "model_optim_rng.pt").unlink()
    if how == "layers":
        (folder / "mp_rank_01").rename(folder / "mp_rank_00_001")
    if how == "cut short":
        path = folder / "mp_rank_01" / "model_optim_rng.pt"
        path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "code",
            "mp_rank_00/model_optim_rng.pt: holds more than tensors, which could run code",
        ),
        ("unknown", "vision_model.adapter.weight.* is nothing of CLIP, a projector or Mistral"),
        ("different", "vision_model.ln_pre.weight is not the same in all ranks"),
        ("missing", "has mp_rank_01, not mp_rank_00: a rank is missing"),
        ("layers", "write it with pipeline parallel 1"),
        ("cut short", "mp_rank_01/model_optim_rng.pt: cannot be read"),
        ("heads", "heads of 64 do not make 48 columns and 144 rows of q, k, v: .*--encoder_head_dim"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(models, tmp_path, capsys, how, message):
    spoilt(tmp_path / "in", models, how)
    options = ["--torch", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match=message):
        from_torch(options + ([] if how == "heads" else HEADS))
    assert not (tmp_path / "out").exists() and "opened" not in capsys.readouterr().out


def test_a_folder_of_pickles_becomes_one_of_safetensors(models, tmp_path):
    save(models.clip, tmp_path / "clip")
    state = load_file(tmp_path / "clip" / "model.safetensors")
    names = sorted(state)
    source = tmp_path / "in"
    source.mkdir()
    for number, part in enumerate((names[:20], names[20:])):
        held, path = {name: state[name] for name in part}, source / f"pytorch_model-{number}.bin"
        torch.save(held, path, _use_new_zipfile_serialization=bool(number))  # and as torch before 1.6 did
    (source / "config.json").write_bytes((tmp_path / "clip" / "config.json").read_bytes())
    split = ["--shard_gb", "1e-5"]
    assert main(["from_torch", "--torch", str(source), "--out", str(tmp_path / "out"), *split]) == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(state) and len(set(index.values())) > 2
    again = type(models.clip).from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in models.clip.state_dict().items())
    torch.save({"a": torch.ones(2, dtype=torch.complex64)}, source / "other.pt")
    with pytest.raises(ConfigError, match="other.pt: a is of torch.complex64, which is no kind of weight"):
        from_torch(["--torch", str(source), "--out", str(tmp_path / "again")])


def test_numbers_alone_are_taken_and_a_damaged_index_is_told(tmp_path):
    source, index = tmp_path / "in", tmp_path / "in" / "pytorch_model.bin.index.json"
    source.mkdir()
    held = {"logit_scale": torch.tensor(3.0), "turned": torch.ones(2, 3).t()}
    torch.save(held, source / "pytorch_model.bin")
    assert main(["from_torch", "--torch", str(source), "--out", str(tmp_path / "out")]) == 0
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in held.items())
    for damaged in ("{", "{}", '{"weight_map": [1]}'):
        index.write_text(damaged)
        with pytest.raises(ConfigError, match="index.json: is damaged: expected weight_map"):
            from_torch(["--torch", str(source), "--out", str(tmp_path / "again")])
    index.unlink()
    torch.save({"a": torch.empty(2, device="meta")}, source / "other.pt")
    with pytest.raises(ConfigError, match="other.pt: a is of no values"):
        from_torch(["--torch", str(source), "--out", str(tmp_path / "again")])
