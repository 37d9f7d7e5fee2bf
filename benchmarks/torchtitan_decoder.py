"""The training step that PyTorch's own torchtitan makes of rows of text, with its Llama 3 at given sizes.

    PYTHONPATH=FOLDER python -P benchmarks/torchtitan_decoder.py WORK

FOLDER holds that distribution. It is imported under the name of ours, so this runs by path, in a process of
its own, imports nothing of ours, and is started by text_decoder.py, which says what is in WORK. Model,
recomputation, compilation, precision, loss, optimizer and clipping are theirs, as their trainer calls them on
one device: parameters in float32, products in bfloat16 by autocast, causal SDPA, the loss of all logits at
once. Out: WORK/result.json, the losses of all steps, and seconds and memory of those that are timed.
"""

import contextlib
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100  # a label


def theirs(name: str) -> Any:
    """A module of the other torchtitan."""
    return importlib.import_module(f"torchtitan.{name}")


def job_config(work: dict[str, Any]) -> Any:
    """Their job, with the options that both sides share."""
    config = theirs("config").JobConfig()
    for section, values in work["job"].items():
        for name, value in values.items():
            assert hasattr(getattr(config, section), name), f"{section}.{name}"
            setattr(getattr(config, section), name, value)
    return config


def model_of(work: dict[str, Any], weights: dict[str, Tensor] | None) -> nn.Module:
    """Their model on the device, in float32. `weights`: by Hugging Face names; None: random ones."""
    llama, sizes = theirs("models.llama3"), theirs("models.llama3.model.args")
    scaling = sizes.RoPEScalingArgs(**work["rope_scaling"])
    arguments = sizes.TransformerModelArgs(**work["sizes"], rope_scaling_args=scaling)
    with torch.device(work["device"]):
        model = llama.Transformer(arguments)
    if work["tied"]:
        model.output.weight = model.tok_embeddings.weight
    if weights is None:
        with torch.no_grad():
            model.init_weights()
    else:
        adapter = theirs("models.llama3.model.state_dict_adapter").Llama3StateDictAdapter(arguments, None)
        model.load_state_dict(adapter.from_hf(weights))
    return model.train()


class Steps:
    """Optimizer steps, as their trainer takes them."""

    def __init__(self, work: dict[str, Any], weights: dict[str, Tensor] | None):
        config, distributed = job_config(work), theirs("distributed")
        alone = distributed.ParallelDims(1, 1, 1, 1, 1, 1, 1, world_size=1)
        self.device, spec = work["device"], theirs("models.llama3").get_train_spec()
        self.model = spec.parallelize_fn(model_of(work, weights), alone, config)
        self.loss = spec.build_loss_fn(config)
        self.optimizers = spec.build_optimizers_fn([self.model], config.optimizer, alone)
        self.clip, self.max_norm = distributed.utils.clip_grad_norm_, config.training.max_norm
        param = config.training.mixed_precision_param
        self.precision: Any = contextlib.nullcontext()
        if param != "float32":
            self.precision = distributed.utils.maybe_enable_amp(alone, param, self.device)

    def __call__(self, microbatches: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Take a step on tokens and labels of each forward. Returns the mean loss, on the device."""
        valid = sum((labels != IGNORED).sum() for _, labels in microbatches)
        total = torch.zeros((), device=self.device)
        for tokens, labels in microbatches:
            with self.precision:
                logits = self.model(tokens.to(self.device))
                loss = self.loss(logits, labels.to(self.device)) / valid
            del logits  # before backward, since they are the largest
            loss.backward()
            total += loss.detach()
        self.clip(self.model.parameters(), self.max_norm, foreach=True)
        self.optimizers.step()
        self.optimizers.zero_grad()
        return total


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def memory_gib(device: str) -> float:
    """The most that was reserved, on CPU the most that the process held."""
    if device == "cuda":
        return torch.cuda.max_memory_reserved() / 2**30
    # getrusage would count what the process that started this one held
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 2**20


def main(folder: Path) -> None:
    work = json.loads((folder / "work.json").read_text())
    steps = torch.load(folder / "rows.pt")
    weights = torch.load(folder / "weights.pt") if (folder / "weights.pt").exists() else None
    take, losses = Steps(work, weights), []
    for step in steps[: work["warm_up"]]:
        losses.append(take(step))
    synchronise(work["device"])
    if work["device"] == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for step in steps[work["warm_up"] :]:
        losses.append(take(step))
    synchronise(work["device"])
    result = {"seconds": time.perf_counter() - started, "memory": memory_gib(work["device"])}
    result |= {"losses": [loss.item() for loss in losses]}
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
