"""Adapters as folders of peft: what peft computes with them on the exported base, and their way back."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from experiments.commands import main
from experiments.vlm.model import hf_config
from experiments.vlm.model.flavors import FLAVORS
from experiments.vlm.model.vlm import VLM
from experiments.vlm.weights.adapter import OF_PEFT, adapter_rows, adapter_source
from tests.reference.batches import build_batch, example_slots
from tests.reference.hf_folders import save, state_of, whole_model
from tests.reference.models import QWEN2, QWEN3
from tests.reference.tiled_models import tiled_model
from tests.unit.test_hf_import import job_of, load
from tests.unit.test_llava import llava
from tests.unit.test_vlm import inputs_alone, sizes_of
from torchtitan.components.lora import adapt
from torchtitan.components.train_state import as_record
from torchtitan.config.errors import ConfigError
from torchtitan.config.job import LoRA
from torchtitan.layers.lora import is_adapters
from torchtitan.models.hf.config_file import ConfigFile
from torchtitan.models.weight_names import read, write

OPTIONS = ["--lora.rank", "4", "--lora.alpha", "6"]
PATTERNS = [r"decoder.*(w[qv2])$", r"encoder.*(wo|fc1)$", "projector.linear_1"]


def lora_job(path: Path, **lora):
    job = job_of(path=path)
    for name, value in {"rank": 4, "alpha": 6.0, "patterns": PATTERNS, **lora}.items():
        setattr(job.lora, name, value)
    return job


@pytest.fixture(scope="module", params=[QWEN2, QWEN3], ids=["biases, tied", "qk norm"])
def trained(request, tmp_path_factory):
    """A base, a model that was adapted to it, and its checkpoint."""
    at = tmp_path_factory.mktemp("adapted")
    base = save(whole_model(request.param), at / "base")
    model = load(lora_job(base)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        (model(**build_batch(example_slots(2), sizes_of(2))).sum() / 50).backward()
        optimizer.step()
        optimizer.zero_grad()
    (at / "step-3").mkdir()
    weights = {"model." + name: parameter.detach() for name, parameter in model.named_parameters()}
    dcp.save(weights, checkpoint_id=str(at / "step-3"), no_dist=True)
    record = {"step": 3, "model_only": True, "model": as_record(model.config)}
    (at / "step-3" / "train_state.json").write_text(json.dumps(record))
    return at, model.eval()


def to_hf(at: Path, name: str, *options: str) -> Path:
    assert main(["to_hf", "--checkpoint", str(at / "step-3"), "--out", str(at / name), *options]) == 0
    return at / name


def differences(ours, theirs) -> list[float]:
    """The largest difference of the logits of each document."""
    slots, batch = example_slots(2), build_batch(example_slots(2), sizes_of(2))
    del batch["labels"]
    logits, found = ours(**batch), []
    for row, documents in enumerate(slots):
        for number, document in enumerate(documents):
            here = batch["document_ids"][row] == number
            alone = theirs(**inputs_alone(document, 2)).logits[0]
            found.append(float((logits[row, here] - alone).abs().max()))
    return found


def open_hf(folder: Path):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    model.config.image_token_id = model.model.config.image_token_id = 3  # the tests' own
    return model


@torch.no_grad()
def test_peft_opens_the_adapters_on_the_exported_base_and_computes_the_same(trained):
    from peft import PeftModel

    at, ours = trained
    base = open_hf(to_hf(at, "exported-base", "--adapters", "leave_out"))
    assert max(differences(ours, base)) > 1e-2, "something was learnt"
    adapted = PeftModel.from_pretrained(base, to_hf(at, "adapter", "--adapters", "only", *OPTIONS))
    names = {n for n, _ in adapted.named_parameters() if "lora_" in n}
    assert len(names) == sum(is_adapters(name) for name, _ in ours.named_parameters())
    assert max(differences(ours, adapted.base_model.model)) < 1e-4


@torch.no_grad()
def test_merged_on_export_it_computes_the_same_without_adapters(trained):
    at, ours = trained
    assert max(differences(ours, open_hf(to_hf(at, "merged", *OPTIONS)))) < 1e-4


def test_an_adapter_folder_is_read_back_bit_for_bit(trained):
    at, ours = trained
    folder = to_hf(at, "back", "--adapters", "only", *OPTIONS)
    again = load(lora_job(at / "base", initial_load_path=str(folder)))
    theirs = dict(ours.named_parameters())
    assert all(torch.equal(w, theirs[n]) for n, w in again.named_parameters() if is_adapters(n))


def test_what_peft_trained_is_read(trained):
    from peft import LoraConfig, get_peft_model

    at, _ = trained
    modules = [
        name.removeprefix("base_model.model.").partition(".lora_")[0]
        for name in state_of(to_hf(at, "names", "--adapters", "only", *OPTIONS))
    ]
    adapted = get_peft_model(open_hf(at / "base"), LoraConfig(r=4, lora_alpha=6, target_modules=modules))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.1)
        adapted.save_pretrained(at / "peft")
        ours = load(lora_job(at / "base", initial_load_path=str(at / "peft")))
        assert max(differences(ours, adapted.base_model.model)) < 1e-4


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 8}, r"lora.rank = 8: .*adapter_config.json has r = 4"),
        ({"alpha": 2.0}, r"lora.alpha = 2.0: .*has lora_alpha = 6"),
        ({"patterns": ["decoder.*wq$"]}, "has no place in the model"),
        ({"patterns": ["decoder"]}, "is not in .*adapter"),
    ],
    ids=["rank", "alpha", "fewer maps", "more maps"],
)
def test_an_adapter_of_another_kind_is_refused(trained, lora, message):
    at, _ = trained
    folder = at / "adapter-again"
    if not folder.exists():
        to_hf(at, "adapter-again", "--adapters", "only", *OPTIONS)
    with pytest.raises(ConfigError, match=message):
        load(lora_job(at / "base", initial_load_path=str(folder), **lora))


def test_what_an_adapter_computes_otherwise_is_refused(tmp_path):
    from peft import LoraConfig

    plain = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"]).to_dict()
    config = json.loads(json.dumps(plain, default=list))
    others = {
        "use_dora": True,
        "alora_invocation_tokens": [7],
        "of_tomorrow": 1,
        "init_lora_weights": "pissa",
    }
    for key, value in others.items():
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ConfigError, match=f"adapter_config.json: {key} = "):
            adapter_source(LoRA(rank=4, alpha=6, initial_load_path=str(tmp_path)), {}, FLAVORS["debugmodel"])
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapter_source(LoRA(rank=4, alpha=6, initial_load_path=str(tmp_path)), {}, FLAVORS["debugmodel"])


@pytest.mark.parametrize("kind", ["lfm2_vl", "llava", "next", "onevision"])
def test_adapters_have_the_names_and_shapes_that_peft_gives_them(kind):
    """In memory, where names are not those of files, and patches may be embedded by a convolution."""
    from peft import LoraConfig, get_peft_model

    makers = {"lfm2_vl": whole_model, "llava": llava}
    theirs = makers[kind]() if kind in makers else tiled_model(kind)
    config = hf_config.vlm_config(ConfigFile(theirs.config.to_dict(), "config.json"))
    with torch.device("meta"):
        ours = VLM(config, 96, "sdpa", 16)
    adapt(ours, LoRA(rank=2, patterns=["encoder", "projector", "decoder"]))
    adapters = {name: weight for name, weight in ours.named_parameters() if is_adapters(name)}
    named = write(adapters, adapter_rows(config))
    maps = sorted({name.removeprefix(OF_PEFT).partition(".lora_")[0] for name in named})
    adapted = get_peft_model(theirs, LoraConfig(r=2, target_modules=maps)).named_parameters()
    peft = {name.replace(".default", ""): p.shape for name, p in adapted if "lora_" in name}
    assert {name: weight.shape for name, weight in named.items()} == peft
    assert read(named, adapter_rows(config)).named.keys() == adapters.keys()


def test_adapters_are_not_merged_with_a_scale_that_is_not_theirs(trained, capsys):
    at, _ = trained
    assert main(["to_hf", "--checkpoint", str(at / "step-3"), "--out", str(at / "never")]) == 2
    assert "lora.rank = 0: checkpoint" in capsys.readouterr().err and not (at / "never").exists()
    record = at / "step-3" / "train_state.json"
    before = record.read_text()
    record.write_text(json.dumps(json.loads(before) | {"lora_scale": 6 / 4}))
    to_hf(at, "as-trained", *OPTIONS)
    command = ["to_hf", "--checkpoint", str(at / "step-3"), "--out", str(at / "never"), "--lora.rank", "4"]
    assert main(command) == 2 and "but 1.5 times in checkpoint" in capsys.readouterr().err
    assert main([*command, "--adapters", "only"]) == 2 and not (at / "never").exists()
    record.write_text(before)
