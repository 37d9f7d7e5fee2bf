"""The decoder alone on text: our trainer's rows, and the same rows given to PyTorch's own torchtitan.

Every row is one document of S tokens, so that a causal mask is all that either needs and no row is padded.
Ours is the model of the job with an encoder of the debug model's size, which text leaves idle. Theirs runs in
a process of its own (torchtitan_decoder.py). Expected of the two: the same products, so that what differs is
attention (flex, SDPA), the output layer (chunks, all logits at once: there ours takes less memory) and
precision (weights cast once a step, in every forward). Before anything is measured both train a small decoder
of the same kind from the same weights in float32; where their losses are apart, nothing is compared.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.train_job import WORDS, job_of
from experiments.vlm.batch import IGNORE
from experiments.vlm.config import VLMJobConfig
from experiments.vlm.model.config import ProjectorConfig, VLMConfig
from experiments.vlm.model.flavors import FLAVORS
from experiments.vlm.spec import SPEC
from tests.samples import write_jsonl
from torchtitan.config.errors import UserError, did_you_mean
from torchtitan.config.job import Optimizer
from torchtitan.layers.init import initialise
from torchtitan.layers.masks import Mask
from torchtitan.layers.rope_scaling import RopeScaling
from torchtitan.models.decoder.flavors import DecoderConfig
from torchtitan.models.decoder.hf import BODY, HEAD
from torchtitan.models.decoder.model import Decoder, initial_weight
from torchtitan.models.weight_names import prefixed, write

# The last whose Llama 3 trains in torch 2.11 and on a CPU: 0.3.0 imports names that torch 2.11 lacks, and
# its attention trains on GPUs alone.
VERSION = "0.2.2"
NEEDS = (  # of its modules; what of these a Python lacks goes into the same folder
    *("datasets", "dill", "fsspec", "multiprocess", "pandas", "pyarrow", "python-dateutil", "six"),
    *("tensorboard", "tokenizers", "torchdata", "triton", "tyro", "tzdata", "xxhash"),
)
PROGRAM = Path(__file__).with_name("torchtitan_decoder.py")
OF_TEXT = ("tokens", "positions", "document_ids", "labels", "source_ids")
DOCUMENTS = 16  # of a slot, over and over
SMALL = {"dim": 64, "layers": 2, "heads": 4, "head_dim": 16, "mlp_dim": 96, "vocab_size": 512}
SMALL_STEPS, SMALL_ROWS, SMALL_TOKENS, SMALL_LR = 3, 2, 64, 1e-3
CLOSE = 1e-4  # losses that count as the same
Rows = list[list[tuple[Tensor, Tensor]]]  # tokens and labels, int64 [B, S], of each forward of each step

TEXT = dataclasses.replace(
    SPEC, loss=lambda model, tensors: model(**{name: tensors[name] for name in OF_TEXT})
)


def decoder_of(flavor: str) -> DecoderConfig:
    """Raises UserError where there is no such flavor."""
    if flavor not in FLAVORS:
        raise UserError(f"--flavor {flavor}: no such flavor{did_you_mean(flavor, FLAVORS)}")
    return FLAVORS[flavor].decoder


def text_options(flavor: str, folder: Path) -> list[str]:
    """Options of a job that trains the decoder of `flavor` on the texts of `folder`."""
    name, idle = f"text-{flavor}", FLAVORS["debugmodel"].encoder
    FLAVORS[name] = VLMConfig(idle, ProjectorConfig(2 * idle.dim), decoder_of(flavor))
    return [
        *("--model.flavor", name, "--training.dataset", "text", "--training.dataset_path", str(folder)),
        *("--training.freeze", "encoder", "projector", "--data.patches_per_row", "64"),
        *("--data.max_patches_per_image", "64"),
    ]


def text_job(options: argparse.Namespace, given: list[str], folder: Path) -> VLMJobConfig:
    """The job of the decoder alone, whose texts are then written."""
    texts = folder / "texts"
    texts.mkdir(exist_ok=True)
    job = job_of(options, "text", [*text_options(options.flavor, texts), *given], folder)
    write_texts(texts, job)
    return job


def write_texts(folder: Path, job: VLMJobConfig) -> None:
    """A file for each slot of documents of S tokens, of words that are one token."""
    tokenizer, draw = SPEC.load_tokenizer(job), random.Random(0)
    single = [word for word in WORDS if len(tokenizer.encode(f" {word}")) == 1]
    length = job.training.seq_len - 1 - (tokenizer.bos_id is not None)
    for slot in range(job.training.global_batch_size):
        texts = ("".join(f" {word}" for word in draw.choices(single, k=length)) for _ in range(DOCUMENTS))
        write_jsonl(folder / f"{slot:05d}.jsonl", [{"text": text} for text in texts])


def row_of(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens and labels of a batch, copied."""
    if tensors["document_ids"].any():
        raise ValueError("a row is not one document of S tokens, so a causal mask would not be its own")
    return tensors["tokens"].long().clone(), tensors["labels"].long().clone()


def require_torchtitan(folder: Path | None, flavor: str) -> None:
    """Raises UserError where the folder does not hold it, or its Llama 3 is not the flavor's decoder."""
    if folder is None or not (folder / f"torchtitan-{VERSION}.dist-info").is_dir():
        raise UserError(
            f"--torchtitan-folder {folder}: no torchtitan {VERSION} there; make it with: {command(folder)}"
        )
    config = decoder_of(flavor)
    if config.qkv_bias or config.qk_norm or config.heads * config.head_dim != config.dim:
        raise UserError(f"--flavor {flavor}: torchtitan's decoder is Llama 3; use a flavor with one")


def command(folder: Path | None) -> str:
    """The command that makes such a folder for this Python."""
    held = {distribution.name.lower() for distribution in importlib.metadata.distributions()}
    lacking = " ".join(name for name in NEEDS if name not in held)
    target = folder or "FOLDER"
    return f"{sys.executable} -m pip install --no-deps --target {target} torchtitan=={VERSION} {lacking}"


def trained_by_torchtitan(
    folder: Path,
    work: Path,
    config: DecoderConfig,
    job: dict[str, dict[str, Any]],
    device: str,
    steps: Rows,
    warm_up: int,
    weights: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Train there. Returns seconds and memory of the steps after `warm_up`, and the losses of all steps.

    `work`: a new folder. `job`: values of their options by section. `weights`: by our names; None: random.
    Raises UserError with the last line of its log where it fails.
    """
    work.mkdir()
    asked = {"job": job, "device": device, "warm_up": warm_up, "tied": config.tied_embeddings}
    (work / "work.json").write_text(json.dumps(asked | sizes_of(config, steps[0][0][0].shape[1])))
    torch.save(steps, work / "rows.pt")
    if weights is not None:
        torch.save(write(weights, [*prefixed(BODY, "model.", ""), *HEAD]), work / "weights.pt")
    environment = os.environ | {"PYTHONPATH": str(folder.resolve())}
    with (work / "log").open("w") as log:
        ran = subprocess.run(
            [sys.executable, "-P", PROGRAM, work], env=environment, cwd=work, stdout=log, stderr=log
        )
    if ran.returncode:
        last = (work / "log").read_text().rstrip().rpartition("\n")[2]
        lacks = f"; put what it lacks there: {command(folder)}" if "ModuleNotFoundError" in last else ""
        raise UserError(f"--torchtitan-folder {folder}: exit code {ran.returncode}, {last}{lacks}")
    return json.loads((work / "result.json").read_text())


def sizes_of(config: DecoderConfig, seq_len: int) -> dict[str, Any]:
    """The decoder's sizes by their names. Their rule for the width of the feed-forward is bent to give ours:
    two thirds of it, rounded up to a multiple of it.
    """
    scaling = config.rope_scaling or RopeScaling(factor=1.0)
    sizes = {"dim": config.dim, "n_layers": config.layers, "n_heads": config.heads}
    sizes |= {"n_kv_heads": config.kv_heads, "vocab_size": config.vocab_size, "max_seq_len": seq_len}
    sizes |= {"multiple_of": config.mlp_dim, "ffn_dim_multiplier": config.mlp_dim / (4 * config.dim)}
    return {
        "sizes": sizes | {"norm_eps": config.norm_eps, "rope_theta": config.rope_theta},
        "rope_scaling": {
            "scaling_factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        },
    }


def options_of(job: VLMJobConfig) -> dict[str, dict[str, Any]]:
    """Options of our job that theirs has too, by section. Raises UserError for what theirs lacks."""
    ac, adamw = job.activation_checkpoint, job.optimizer
    if ac.full_layers or ac.selective_layers or ac.memory_budget_gib or adamw.name != "AdamW":
        raise UserError("torchtitan has AdamW, and of recomputation activation_checkpoint.mode alone")
    names = ("lr", "beta1", "beta2", "eps", "weight_decay")
    return {
        "training": {
            "seq_len": job.training.seq_len,
            "max_norm": job.training.max_norm,
            "mixed_precision_param": job.training.mixed_precision_param,
        },
        "compile": {"enable": job.compile.enable},
        "activation_checkpoint": {"mode": ac.mode, "selective_ac_option": ac.selective_ac_option},
        "optimizer": {name: getattr(adamw, name) for name in names},
    }


def require_same_losses(folder: Path, flavor: str, work: Path) -> None:
    """Raises UserError where a small decoder of the flavor's kind learns otherwise there than here."""
    config = decoder_of(flavor)
    config = dataclasses.replace(config, **SMALL, kv_heads=4 if config.kv_heads == config.heads else 2)
    job = VLMJobConfig()
    job.optimizer = Optimizer(lr=SMALL_LR, weight_decay=0.0)
    job.training.seq_len, job.training.mixed_precision_param = SMALL_TOKENS, "float32"
    decoder = Decoder(config, config.vocab_size, "sdpa", SMALL_TOKENS)
    initialise(decoder, lambda name: initial_weight(name, config), 0)
    drawn = torch.Generator().manual_seed(0)
    shape = SMALL_STEPS, SMALL_ROWS, SMALL_TOKENS + 1
    drawn_SBT = torch.randint(config.vocab_size, shape, generator=drawn)
    steps = [[(drawn_BT[:, :-1].clone(), drawn_BT[:, 1:].clone())] for drawn_BT in drawn_SBT]
    for step in steps:
        step[0][1][:, -1] = IGNORE
    weights = {name: weight.clone() for name, weight in decoder.state_dict().items()}
    there = trained_by_torchtitan(folder, work, config, options_of(job), "cpu", steps, 0, weights)["losses"]
    here = losses(decoder, steps, job)
    apart = max(abs(one - other) for one, other in zip(here, there, strict=True))
    if not apart <= CLOSE:
        raise UserError(f"torchtitan loses {there} where we lose {here}: not the same training, so no ratio")
    print(
        f"  float32 on CPU, {SMALL_STEPS} steps from the same weights: losses {apart:.1e} apart", flush=True
    )


def losses(decoder: Decoder, steps: Rows, job: VLMJobConfig) -> list[float]:
    """The loss of each step of plain AdamW."""
    adamw, found = job.optimizer, []
    optimizer = torch.optim.AdamW(
        decoder.parameters(), adamw.lr, (adamw.beta1, adamw.beta2), adamw.eps, adamw.weight_decay
    )
    for ((tokens, labels),) in steps:
        positions = torch.arange(tokens.shape[1], dtype=torch.int32).expand_as(tokens)
        mask = Mask(segments=torch.zeros_like(positions), causal=True)
        assert decoder.tok_embeddings is not None
        loss = decoder(decoder.tok_embeddings(tokens), positions, mask, labels)[0] / (labels >= 0).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), job.training.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found
