"""Where do the seconds of a training step go, and what share of the GPU's peak is useful work?

    python -m benchmarks.train_step [--flavor so400m-llama3.2-1B] [--slots 2] [--accumulation 4] [--steps 8]
                                    [--ways eager compiled graphed fp8 transformers text torchtitan]
                                    [--torchtitan-folder FOLDER] [--photos FOLDER] [--kernels]
                                    [--section.field VALUE ...]

The trainer itself, with its loader, on the documents of train_job.py. Further options are the job's.
In one run: useful MFU (encoder on patches, decoder on tokens; padding and recomputation count nothing),
rates, occupancies and peak memory; the seconds of each part, from events on the device, and the share of the
peak that encoder, decoder and output layer reach in theirs; recompilations and synchronisations of a step.
Where the whole step is one CUDA graph, its parts cannot be measured. `--kernels`: launches and time by kind
of kernel, of one step under the profiler. `transformers`: a step of its model of the same sizes on the same
documents, padded, made ready beforehand (transformers_step.py). `text`: the decoder alone, compiled, on rows
of text; `torchtitan`: PyTorch's own on the same rows, where both learn the same (text_decoder.py).

Two lines at the end: a table for people, one JSON line for others.
"""

import argparse
import dataclasses
import gc
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import profiled
from benchmarks.stopwatch import Stopwatch
from benchmarks.text_decoder import (
    TEXT,
    options_of,
    require_same_losses,
    require_torchtitan,
    row_of,
    text_job,
    trained_by_torchtitan,
)
from benchmarks.train_job import WAYS, add_job_arguments, batches_of, job_of, write_shards
from benchmarks.transformers_step import Steps, model_of, unpacked
from experiments.vlm.costs.flops import Work, flops_of_work, image_pairs
from experiments.vlm.spec import SPEC
from torchtitan.build import build
from torchtitan.components.flops import causal_pairs, product_flops
from torchtitan.components.loader import Tensors
from torchtitan.config.errors import UserError
from torchtitan.distributed.process_group import close_process_group, open_process_group
from torchtitan.tools.hardware import peak_flops, peak_memory_gib
from torchtitan.train import Trainer

USUAL = ["eager", "compiled", "graphed"]
WARM_UP, OF_OTHERS = 5, 2  # steps before those that are timed


class TimedTrainer(Trainer):
    """With an event between the parts of each step."""

    def watch(self) -> None:
        first = "embeddings" if self.run.spec is TEXT else "encoder"
        self.stopwatch = Stopwatch(self.run.forward_backward.parts[0], self.run.mesh.device, first)

    def optimizer_step(
        self, microbatches: Iterable[Tensors], scale: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not hasattr(self, "stopwatch"):
            return super().optimizer_step(microbatches, scale)
        self.stopwatch.start()
        result = super().optimizer_step(self.stopwatch.between(microbatches), scale)
        self.stopwatch.ends("optimizer")
        return result


class PartFlops:
    """Useful FLOPs of the towers and of the output layer, of all batches since `total` was set to zero."""

    def __init__(self, model: Any):
        self.of_work, self.output = flops_of_work(model), product_flops(model)["decoder.output"]
        self.total = dict.fromkeys(("encoder", "decoder", "output layer"), 0.0)

    def __call__(self, batch: Any) -> int:
        tensors, tokens, patches = batch.tensors, batch.counts["tokens"], batch.counts["patches"]
        pairs = causal_pairs(tensors["positions"], tensors["document_ids"])
        encoder = self.of_work(Work(patches, 0, image_pairs(tensors["grid_thw"]), 0))
        decoder = self.of_work(Work(0, tokens, 0, pairs))
        self.total["encoder"] += encoder
        self.total["output layer"] += self.output * tokens
        self.total["decoder"] += decoder - self.output * tokens
        return encoder + decoder


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def waits_and_recompiles(trainer: Trainer) -> tuple[int, int]:
    """Synchronisations of one step, but for its input, and frames that dynamo compiled in it."""
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        trainer.train_step()
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
    # besides them, the mode itself says that it is a prototype
    waits = [warning for warning in caught if "called a synchronizing" in str(warning.message)]
    for warning in waits:
        print(f"  waits: {warning.filename}:{warning.lineno}")
    return len(waits), torch._dynamo.utils.counters["stats"]["unique_graphs"] - compiled


def rates(trainer: TimedTrainer, steps: int) -> dict[str, Any]:
    """Over `steps` steps, as the trainer's own meter has them."""
    synchronise()
    trainer.run.meter.restart()
    started = time.perf_counter()
    for _ in range(steps):
        trainer.train_step()
    synchronise()
    seconds = (time.perf_counter() - started) / steps
    values, _ = trainer.run.meter.read()
    return {"step_s": seconds} | values


def parts(trainer: TimedTrainer, flops: PartFlops, peak: float | None) -> dict[str, Any]:
    """Seconds of each part of a step, and where the peak is known the percentage of it that each reached."""
    trainer.watch()
    trainer.train_step()  # the first with hooks is slower
    flops.total = dict.fromkeys(flops.total, 0.0)
    trainer.train_step()
    seconds = trainer.stopwatch.seconds()
    done = {part: flops for part, flops in flops.total.items() if flops}
    reached = {part: 100 * flops / seconds[part] / peak for part, flops in done.items()} if peak else {}
    return {"parts": seconds, "part_mfu": reached}


def one_way(options: argparse.Namespace, way: str, given: list[str], folder: Path) -> dict[str, Any]:
    """Everything that is measured of one way to run the step."""
    spec = TEXT if way == "text" else SPEC
    job = text_job(options, given, folder) if spec is TEXT else job_of(options, way, given, folder)
    device = open_process_group(job.comm, folder)
    whole = SPEC.build_model(job, SPEC.load_tokenizer(job))
    flops, peak = PartFlops(whole), peak_flops(device)
    began = time.perf_counter()
    trainer = TimedTrainer(build(job, spec, device))
    try:
        trainer.run.flops = flops
        for _ in range(WARM_UP):
            trainer.train_step()
        synchronise()
        row: dict[str, Any] = {"way": way, "start_s": time.perf_counter() - began}
        row |= rates(trainer, options.steps)
        print(f"  {way}: {row['step_s']:.3f} s a step, MFU {row['mfu']}", flush=True)  # should the rest fail
        waits, recompiles = waits_and_recompiles(trainer)
        row |= {"waits": waits, "recompiles": recompiles}
        if not job.compile.cuda_graphs:
            row |= parts(trainer, flops, peak)
        if options.kernels and device.type == "cuda":
            rows, lines = profiled(trainer.train_step)
            row["kernels"] = {kind.kind: (kind.launches, kind.seconds) for kind in rows}
            row["launches"] = sum(kind.launches for kind in rows)
            print("\n".join(lines))
    finally:
        trainer.close()
        close_process_group()
    return row


class OthersWork:
    """Useful FLOPs and counts of the batches that another trainer gets."""

    def __init__(self, flops: PartFlops):
        self.flops, self.done, self.counts = flops, [], []

    def add(self, batches: list[Any]) -> None:
        self.done.append(sum(map(self.flops, batches)))
        self.counts.append([batch.counts for batch in batches])

    def row(self, way: str, seconds: float, memory: float, peak: float | None) -> dict[str, Any]:
        """Rates of all steps but the first OF_OTHERS."""
        timed = [each for step in self.counts[OF_OTHERS:] for each in step]
        counted = {name: sum(each[name] for each in timed) / seconds for name in ("tokens", "images")}
        return {
            "way": way,
            "step_s": seconds / len(self.done[OF_OTHERS:]),
            "mfu": 100 * sum(self.done[OF_OTHERS:]) / seconds / peak if peak else None,
            "tps": counted["tokens"],
            "images/s": counted["images"],
            "memory": memory,
        }


def of_transformers(options: argparse.Namespace, way: str, given: list[str], folder: Path) -> dict[str, Any]:
    """The same rates of a step of transformers."""
    job = job_of(options, "eager", given, folder)
    tokenizer, config = SPEC.load_tokenizer(job), SPEC.model_config(job)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work, merged = OthersWork(PartFlops(SPEC.build_model(job, tokenizer))), config.projector.merge_size**2
    arguments = []
    for batches in batches_of(job, tokenizer, OF_OTHERS + options.steps):
        arguments.append([unpacked(batch.tensors, merged) for batch in batches])
        work.add(batches)
    take = Steps(model_of(config, tokenizer.image_id, device), job.optimizer.lr)
    for step in arguments[:OF_OTHERS]:
        take(step)
    synchronise()
    started = time.perf_counter()
    for step in arguments[OF_OTHERS:]:
        take(step)
    synchronise()
    seconds = time.perf_counter() - started
    return work.row(way, seconds, peak_memory_gib(device), peak_flops(device))


def of_torchtitan(options: argparse.Namespace, way: str, given: list[str], folder: Path) -> dict[str, Any]:
    """The same rates of a step of PyTorch's torchtitan, on the rows of `text`."""
    job = text_job(options, given, folder)
    tokenizer = SPEC.load_tokenizer(job)
    whole, device = SPEC.build_model(job, tokenizer), "cuda" if torch.cuda.is_available() else "cpu"
    work, rows = OthersWork(PartFlops(whole)), []
    for batches in batches_of(job, tokenizer, OF_OTHERS + options.steps):
        rows.append([row_of(batch.tensors) for batch in batches])
        work.add(batches)
    vocab_size = len(whole.get_parameter("decoder.output.weight"))
    config = dataclasses.replace(SPEC.model_config(job).decoder, vocab_size=vocab_size)
    theirs = options.torchtitan_folder, folder / "torchtitan"
    ran = trained_by_torchtitan(*theirs, config, options_of(job), device, rows, OF_OTHERS)
    return work.row(way, ran["seconds"], ran["memory"], peak_flops(torch.device(device)))


OTHERS = {"transformers": of_transformers, "torchtitan": of_torchtitan}


def shown(row: dict[str, Any]) -> str:
    mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.1f} %"
    lines = [
        f"{row['way']}: {row['step_s']:.3f} s a step, MFU {mfu}, {row['tps']:,.0f} tokens/s, "
        f"{row['images/s']:.0f} images/s, {row['memory']:.1f} GiB"
    ]
    if "waits" in row:
        lines.append(
            f"    data_wait {row['data_wait']:.1f} %, tokens {row['tokens']:.0f} %, patches "
            f"{row['patches']:.0f} %, {row['waits']} waits, {row['recompiles']} recompiles, "
            f"{row.get('launches', 'n/a')} launches, ready in {row['start_s']:.0f} s"
        )
    total = sum(row.get("parts", {}).values())
    for part, seconds in row.get("parts", {}).items():
        reached = row.get("part_mfu", {}).get(part)
        share = "" if reached is None else f"  {reached:.1f} % of the peak"
        lines.append(f"    {part:<14}{1000 * seconds:9.1f} ms {100 * seconds / total:5.1f} %{share}")
    for kind, (launches, seconds) in row.get("kernels", {}).items():
        lines.append(f"    {kind:<22}{launches:6} launches{1000 * seconds:9.1f} ms")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_job_arguments(parser, "so400m-llama3.2-1B", accumulation=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--ways", nargs="+", choices=[*WAYS, *OTHERS], default=USUAL)
    parser.add_argument("--torchtitan-folder", type=Path, help="of pip install --target")
    parser.add_argument("--kernels", action="store_true", help="one step under the profiler")
    options, given = parser.parse_known_args()
    rows, failed = [], False
    with tempfile.TemporaryDirectory() as folder:
        if "torchtitan" in options.ways:
            try:
                require_torchtitan(options.torchtitan_folder, options.flavor)
                require_same_losses(options.torchtitan_folder, options.flavor, Path(folder) / "small")
            except UserError as error:
                parser.exit(2, f"error: {error}\n")
        if not {"text", "torchtitan"}.issuperset(options.ways):
            write_shards(Path(folder), options.photos)
        for way in options.ways:
            measure = OTHERS.get(way, one_way)
            try:
                rows.append(measure(options, way, given, Path(folder)))
                print(shown(rows[-1]), flush=True)
            except UserError as error:  # what was measured is printed all the same
                print(f"{way}: error: {error}", flush=True)
                failed = True
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()  # for a way in a process of its own
    tokens = {row["way"]: row["tps"] for row in rows}
    if {"text", "torchtitan"}.issubset(tokens):
        ratio = tokens["text"] / tokens["torchtitan"]
        print(f"text: {ratio:.2f} times the tokens a second of torchtitan")
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    facts = {"benchmark": "train_step", "hardware": hardware, "torch": torch.__version__}
    print(json.dumps(facts | {"flavor": options.flavor, "slots": options.slots, "rows": rows}))
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
