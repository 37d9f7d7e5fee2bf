"""A folder that is damaged or of another model: one line with tensor and file, before anything is read."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from experiments.vlm.check import check_weights
from tests.reference.hf_folders import decoder_model, naflex_model, save, state_of
from tests.reference.models import LLAMA, QWEN3
from tests.unit.test_hf_import import job_of, load, report
from torchtitan.config.errors import ConfigError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    at = tmp_path_factory.mktemp("hf")
    return {
        "llama": save(decoder_model(LLAMA), at / "llama"),
        "naflex": save(naflex_model(), at / "naflex"),
    }


# What happens to a folder, and what must be told of it. {file} and {folder} are where it was.
DAMAGE = {
    "cut": "tensor model.norm.weight in {file}: the file was cut short, 4 bytes are missing",
    "longer": "{file}: 1 bytes after its last tensor",
    "header": "{file}: is no safetensors file, or damaged (its header is not JSON)",
    "length": "{file}: is no safetensors file, or damaged (header)",
    "empty": "{file}: is no safetensors file, or damaged (header)",
    "dtype": "tensor model.norm.weight in {file}: dtype 'F31' is not known",
    "shape": "tensor model.norm.weight in {file}: [65] of F32 are 260 bytes, but it has 256",
    "overlap": "tensor model.norm.weight in {file}: begins at byte ",
    "narrow": "tensor model.norm.weight in {file} is [32], but decoder.norm.weight is [64]",
    "rows": "tensor model.embed_tokens.weight in {file} is [95, 64], but {folder}/config.json says 96 rows",
    "missing": "tensor model.norm.weight (decoder.norm.weight) is not in {folder}",
    "renamed": "tensor model.norm.weight (decoder.norm.weight) is not in {folder}; left over is tensor "
    "model.nork.weight in {file}",
    "other": "tensor model.embed_tokens.weight (decoder.tok_embeddings.weight) is not in {folder} (and 20 "
    "more); left over is tensor transformer.h.",
    "extra": "tensor model.extra in {file} has no place in the model",
    "layers": "tensor model.layers.1.input_layernorm.weight in {file} has no place in the model (and 8 more)",
    "integers": "tensor model.norm.weight in {file}: dtype I32 is no kind of weight here",
    "none": "{folder}: holds no *.safetensors",
    "pickle": "{folder}/pytorch_model.bin: a pickle can run code when it is opened",
    "shard": "{folder}/model-00002-of-00002.safetensors: is missing, and model-00001-of-00002",
    "twice": "tensor lm_head.weight is in {folder}/model.safetensors and in {folder}/other.safetensors",
}


def spoil(folder: Path, how: str) -> None:
    from safetensors.torch import save_file

    file, state = folder / "model.safetensors", state_of(folder)
    raw = bytearray(file.read_bytes())
    match how:
        case "cut":
            file.write_bytes(raw[:-4])
        case "longer":
            file.write_bytes(raw + b"x")
        case "header":
            raw[20] ^= 0x80
            file.write_bytes(raw)
        case "length":
            raw[6] ^= 1
            file.write_bytes(raw)
        case "empty":
            file.write_bytes(b"")
        case "dtype" | "shape" | "overlap":
            edit_header(file, how)
        case "narrow":
            save_file(state | {"model.norm.weight": torch.ones(32)}, file)
        case "rows":
            table = state["model.embed_tokens.weight"][:-1].clone()
            save_file(state | {"model.embed_tokens.weight": table}, file)
        case "missing":
            save_file({k: v for k, v in state.items() if k != "model.norm.weight"}, file)
        case "renamed":
            file.write_bytes(raw.replace(b"model.norm.weight", b"model.nork.weight"))
        case "other":
            save_file({f"transformer.h.{n}.weight": torch.ones(2) for n in range(3)}, file)
        case "extra":
            save_file(state | {"model.extra": torch.ones(2)}, file)
        case "layers":
            values = json.loads((folder / "config.json").read_text())
            values |= {"num_hidden_layers": 1, "layer_types": None}
            (folder / "config.json").write_text(json.dumps(values))
        case "integers":
            save_file(state | {"model.norm.weight": torch.ones(64, dtype=torch.int32)}, file)
        case "none":
            file.unlink()
        case "pickle":
            file.rename(folder / "pytorch_model.bin")
        case "shard":
            file.rename(folder / "model-00001-of-00002.safetensors")
        case "twice":
            save_file({"lm_head.weight": state["lm_head.weight"]}, folder / "other.safetensors")


def edit_header(file: Path, how: str) -> None:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    entry = header["model.norm.weight"]
    if how == "dtype":
        entry["dtype"] = "F31"
    elif how == "shape":
        entry["shape"] = [65]
    else:
        entry["data_offsets"] = [offset - 4 for offset in entry["data_offsets"]]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_or_other_folder_is_told_in_one_line_that_names_tensor_and_file(folders, tmp_path, how):
    folder = tmp_path / "spoilt"
    shutil.copytree(folders["llama"], folder)
    spoil(folder, how)
    with pytest.raises(ConfigError) as caught:
        report(job_of(encoder_path=folders["naflex"], decoder_path=folder))
    told = DAMAGE[how].format(file=folder / "model.safetensors", folder=folder)
    assert told in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("how", ["cut", "header", "none", "pickle", "shard"])
def test_what_a_header_shows_is_told_before_torch_is_asked(folders, tmp_path, how):
    folder = tmp_path / "spoilt"
    shutil.copytree(folders["llama"], folder)
    spoil(folder, how)
    with pytest.raises(ConfigError, match=str(folder)):
        check_weights(job_of(encoder_path=folders["naflex"], decoder_path=folder))


@pytest.mark.parametrize("how", ["missing", "unnamed", "elsewhere", "absent", "broken"])
def test_files_and_their_index_must_agree(folders, tmp_path, how):
    folder = save(decoder_model(QWEN3), tmp_path / "several", max_shard_size="40KB")
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    names = values["weight_map"]
    file, name = names["model.norm.weight"], "model.norm.weight"
    told = {
        "missing": f"{folder / file}: is missing; {index.name} says that tensor ",
        "unnamed": f"tensor {name} in {folder / file}: {index} does not name it",
        "elsewhere": f"tensor {name} in {folder / file}: {index.name} says that it is in ",
        "absent": f"tensor model.more is not in {folder / file}, though {index.name} says so",
        "broken": f"{index}: is damaged",
    }[how]
    if how == "missing":
        (folder / file).unlink()
    elif how == "unnamed":
        del names[name]
    elif how == "elsewhere":
        names[name] = next(other for other in names.values() if other != file)
    elif how == "absent":
        names["model.more"] = file
    index.write_text("{}" if how == "broken" else json.dumps(values))
    with pytest.raises(ConfigError) as caught:
        report(job_of(encoder_path=folders["naflex"], decoder_path=folder))
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("how", "kind"), [("missing", "missing"), ("extra", "left_over"), ("narrow", "shape")]
)
def test_what_is_allowed_is_reported_and_starts_fresh(folders, tmp_path, how, kind):
    folder = tmp_path / "spoilt"
    shutil.copytree(folders["llama"], folder)
    spoil(folder, how)
    job = job_of(encoder_path=folders["naflex"], decoder_path=folder)
    job.checkpoint.initial_load_allow = [kind]
    model, lines = load(job), report(job)
    if how == "extra":
        assert f"not taken: tensor model.extra in {folder}" in lines
    else:
        assert "decoder.norm.weight" in lines
        assert torch.equal(model.decoder.norm.weight, torch.ones(64))  # as fresh norms are
