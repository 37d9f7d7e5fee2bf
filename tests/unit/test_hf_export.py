"""What is imported goes out as it came, and what was trained opens in transformers and computes the same."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from experiments.commands import main
from experiments.vlm.config import VLMJobConfig
from experiments.vlm.model.config import ProjectorConfig, VLMConfig
from experiments.vlm.model.vlm import VLM
from experiments.vlm.spec import build_vlm
from tests.reference.batches import build_batch, example_slots
from tests.reference.hf_folders import (
    aimv2_model,
    clip_model,
    decoder_model,
    dinov3_model,
    fixed_model,
    naflex_model,
    save,
    state_of,
    whole_model,
)
from tests.reference.models import ENCODER, LLAMA, QWEN2, QWEN3
from tests.unit.test_hf_import import DECODERS, assert_packed_equals_alone, job_of, load
from tests.unit.test_vlm import sizes_of
from torchtitan.components.train_state import as_record
from torchtitan.components.weights import CheckpointSource, fill, shapes_of, to_empty
from torchtitan.config.errors import ConfigError
from torchtitan.models.hf.writing import TensorToWrite, write_folder

WHOLE = {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each kind, in different dtypes."""
    at = tmp_path_factory.mktemp("hf")
    made = {name: save(decoder_model(config), at / name, torch.bfloat16) for name, config in DECODERS.items()}
    made |= {
        f"whole-{name}": save(whole_model(config), at / f"whole-{name}") for name, config in WHOLE.items()
    }
    made["naflex"] = save(naflex_model(), at / "naflex", torch.float16)
    made |= {name: save(make(), at / name) for name, make in TOWERS.items()}
    return made | {"fixed": save(fixed_model(), at / "fixed")}


def command(*argv: object) -> None:
    assert main([str(word) for word in argv]) == 0


def assert_same(folder: Path, other: Path) -> None:
    """The same tensors, names and dtypes; config.json says the same to transformers."""
    from transformers import AutoConfig

    one, two = state_of(folder), state_of(other)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype and torch.equal(tensor, two[name]), name
    # What the tokenizer says, and what the class itself never reads.
    others = "bos_token_id eos_token_id pad_token_id image_token_id image_token_index"
    others += " pretraining_tp attention_bias mlp_bias"
    configs = [AutoConfig.from_pretrained(place).to_dict() for place in (folder, other)]
    for section in (*configs, *(values.get("text_config", {}) for values in configs)):
        for name in (*others.split(), "_name_or_path", "max_window_layers"):
            section.pop(name, None)
    assert configs[0] == configs[1]


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_model_goes_in_and_out_bit_for_bit(folders, tmp_path, name):
    command("from_hf", "--hf", folders[f"whole-{name}"], "--out", tmp_path / "checkpoint")
    command("to_hf", "--checkpoint", tmp_path / "checkpoint", "--out", tmp_path / "back")
    assert_same(folders[f"whole-{name}"], tmp_path / "back")


TOWERS = {"clip": clip_model, "aimv2": aimv2_model, "dinov3": dinov3_model}


@pytest.mark.parametrize(
    "encoder, decoder",
    [*((name, "qwen3") for name in ("fixed", *TOWERS)), *(("naflex", name) for name in DECODERS)],
)
def test_parts_go_in_and_out_bit_for_bit(folders, tmp_path, encoder, decoder):
    parts = {"encoder": folders[encoder], "decoder": folders[decoder]}
    named = [word for part, folder in parts.items() for word in (f"--{part}", folder)]
    command("from_hf", *named, "--out", tmp_path / "checkpoint")
    for part, folder in parts.items():
        command("to_hf", "--checkpoint", tmp_path / "checkpoint", "--out", tmp_path / part, "--part", part)
        assert_same(folder, tmp_path / part)


def trained(job: VLMJobConfig, folder: Path) -> VLM:
    """Three steps on packed images and text, then a checkpoint in `folder`."""
    model, batch = load(job), build_batch(example_slots(2), sizes_of(2))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(3):
        model(**batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    same = [name for name, weight in model.state_dict().items() if torch.equal(weight, before[name])]
    assert all(name.endswith("wk.bias") for name in same)  # the same bias on all keys changes no softmax
    folder.mkdir()
    weights = {"model." + name: parameter.detach() for name, parameter in model.named_parameters()}
    dcp.save(weights, checkpoint_id=str(folder), no_dist=True)
    record = {"step": 3, "model_only": True, "model": as_record(model.config)}
    (folder / "train_state.json").write_text(json.dumps(record))
    return model.eval()


@pytest.mark.parametrize("name", WHOLE)
@torch.no_grad()
def test_what_was_trained_opens_in_transformers_and_computes_the_same(folders, tmp_path, name):
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    with torch.enable_grad():
        ours = trained(job_of(path=folders[f"whole-{name}"]), tmp_path / "step-3")
    for part in ("all", "encoder", "decoder"):
        command("to_hf", "--checkpoint", tmp_path / "step-3", "--out", tmp_path / part, "--part", part)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "all").eval()
    assert theirs.dtype == torch.float32 and (tmp_path / "all" / "processor_config.json").is_file()
    theirs.config.image_token_id = theirs.model.config.image_token_id = 3  # the tests' own
    assert_packed_equals_alone(ours, theirs)
    # The towers alone hold the same weights as the whole.
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder").state_dict()
    whole = theirs.model.language_model.state_dict()
    assert all(torch.equal(weight, alone["model." + key]) for key, weight in whole.items())
    tower = AutoModel.from_pretrained(tmp_path / "encoder").state_dict()
    assert all(torch.equal(w, tower[key]) for key, w in theirs.model.vision_tower.state_dict().items())


def test_weights_are_written_in_the_dtype_that_is_asked_for_and_in_files_of_a_size(folders, tmp_path):
    trained(job_of(path=folders["whole-qwen3"]), tmp_path / "step-3")
    out = tmp_path / "out"
    command(
        "to_hf", "--checkpoint", tmp_path / "step-3", "--out", out, "--dtype", "bfloat16", "--shard_gb", 3e-5
    )
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    state = state_of(out)
    assert index["weight_map"].keys() == state.keys() and {t.dtype for t in state.values()} == {
        torch.bfloat16
    }
    assert index["metadata"]["total_size"] == sum(2 * tensor.numel() for tensor in state.values())
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    command("to_hf", "--checkpoint", tmp_path / "step-3", "--out", tmp_path / "one")
    for key, tensor in state_of(tmp_path / "one").items():
        assert torch.equal(tensor.bfloat16(), state[key]), key


def test_a_number_that_the_dtype_does_not_hold_is_told(tmp_path):
    rows = torch.tensor([[1.0, torch.inf], [-7e4, 2.0]])
    with pytest.raises(ConfigError, match=r"tensor w has 7e\+04, more than float16 holds"):
        write_folder({"w": TensorToWrite((2, 2), torch.float16, lambda: [rows])}, tmp_path)
    write_folder({"w": TensorToWrite((2, 2), torch.bfloat16, lambda: [rows])}, tmp_path)
    assert torch.equal(state_of(tmp_path)["w"], rows.bfloat16())


def test_a_checkpoint_made_of_folders_is_trained_from(folders, tmp_path):
    """It gives the weights that the folders give, and says its model itself."""
    parts = {"encoder": folders["naflex"], "decoder": folders["qwen3"]}
    named = [word for part, folder in parts.items() for word in (f"--{part}", folder)]
    command("from_hf", *named, "--out", tmp_path / "checkpoint")
    direct = load(job_of(encoder_path=parts["encoder"], decoder_path=parts["decoder"]))
    job = VLMJobConfig()
    job.checkpoint.initial_load_path = str(tmp_path / "checkpoint")
    model = build_vlm(job, None)
    assert model.config == direct.config
    source = CheckpointSource(tmp_path / "checkpoint", shapes_of(model))
    to_empty([model], "cpu")
    fill([model], model.tied_names(), 1, source)
    for name, weight in direct.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["to_hf", "--checkpoint", "step-9", "--out", "x"], "--checkpoint step-9: no complete checkpoint"),
        (["to_hf", "--checkpoint", "step-9"], "--out is missing"),
        (["to_hf", "--out", "."], "--out = .: is there already"),
        (["from_hf", "--out", "x"], "--hf is missing"),
        (["from_hf", "--hf", "nowhere", "--out", "x"], "--hf = nowhere: no such folder"),
        (["from_hf", "--hf", "nowhere"], "--out is missing"),
    ],
)
def test_a_wrong_command_is_told_and_writes_nothing(tmp_path, monkeypatch, capsys, argv, told):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    assert told in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name, known", [("to_hf", "Lfm2VlForConditionalGeneration"), ("from_hf", "mistral")])
def test_the_commands_list_what_they_know(capsys, name, known):
    command(name, "--list")
    assert known in capsys.readouterr().out


LIMITED = """
import re, resource, sys
from pathlib import Path
import experiments.vlm.weights.export
from experiments.commands import main
held = int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_a_model_larger_than_the_memory_of_the_process_is_exported(tmp_path):
    sizes = dataclasses.replace(QWEN3, dim=768, mlp_dim=1536, layers=15, vocab_size=512)
    config = VLMConfig(ENCODER, ProjectorConfig(56), sizes)
    with torch.device("meta"):
        model = VLM(config, sizes.vocab_size, "sdpa", 16)
    shapes = shapes_of(model).items()
    weights = {"model." + name: torch.full(shape, float(n)) for n, (name, shape) in enumerate(shapes)}
    held = sum(4 * weight.numel() for weight in weights.values())
    dcp.save(weights, checkpoint_id=str(tmp_path / "step-1"), no_dist=True)
    record = {"step": 1, "model_only": True, "model": as_record(config)}
    (tmp_path / "step-1" / "train_state.json").write_text(json.dumps(record))
    limit = 110_000_000
    assert held > 2 * limit
    words = ["to_hf", "--checkpoint", str(tmp_path / "step-1"), "--out", str(tmp_path / "out")]
    limited = [sys.executable, "-c", LIMITED, str(limit), *words]
    done = subprocess.run(limited, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    state = state_of(tmp_path / "out")
    assert torch.equal(
        state["model.language_model.layers.14.mlp.up_proj.weight"],
        weights["model.decoder.layers.14.feed_forward.w3.weight"],
    )
    print(f"{held:,} bytes of weights, written within {limit:,} bytes")
