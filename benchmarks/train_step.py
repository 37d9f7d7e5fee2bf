"""Where do the seconds of a training step go, and what share of the GPU's peak is useful work?

    python -m benchmarks.train_step [--flavor so400m-llama3.2-1B] [--slots 2] [--accumulation 4] [--steps 8]
                                    [--ways eager compiled graphed fp8 transformers] [--photos FOLDER]
                                    [--kernels] [--section.field VALUE ...]

The trainer itself, with its loader, on packed slots of S = 8192 tokens: photographs of many sizes, cut from
those of FOLDER with a fixed seed, each with a caption of 20 to 300 words. Further options are the job's.
In one run: useful MFU (encoder on patches, decoder on tokens; padding and recomputation count nothing),
rates, occupancies and peak memory; the seconds of each part, from events on the device, and the share of the
peak that encoder, decoder and output layer reach in theirs; recompilations and synchronisations of a step.
Where the whole step is one CUDA graph, its parts cannot be measured. `--kernels`: launches and time by kind
of kernel, of one step under the profiler. `transformers`: a step of its model of the same sizes on the same
documents, padded, made ready beforehand (transformers_step.py).

Two lines at the end: a table for people, one JSON line for others.
"""

import argparse
import gc
import io
import itertools
import json
import math
import random
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.kernels import profiled
from benchmarks.stopwatch import Stopwatch
from benchmarks.transformers_step import Steps, model_of, unpacked
from experiments.__main__ import checked_job
from experiments.vlm.config import VLMJobConfig
from experiments.vlm.flops import Work, flops_of_work, image_pairs
from experiments.vlm.spec import SPEC
from tests.samples import write_tar
from torchtitan.build import build
from torchtitan.components.flops import causal_pairs, product_flops
from torchtitan.components.loader import Tensors
from torchtitan.distributed.process_group import close_process_group, open_process_group
from torchtitan.tools.hardware import peak_flops, peak_memory_gib
from torchtitan.train import Trainer

ROOT = Path(__file__).parents[1]
WAYS = {
    "eager": [],
    "compiled": ["--compile.enable"],
    "graphed": ["--compile.enable", "--compile.cuda_graphs"],
    "fp8": ["--compile.enable", "--float8.enable"],
}
USUAL = ["eager", "compiled", "graphed"]
WORDS = [
    "one",
    "two",
    "three",
    "small",
    "large",
    "red",
    "green",
    "house",
    "tree",
    "street",
    "above",
    "of",
    "a",
]
SHARDS, PHOTOS = 4, 240
WARM_UP, OF_OTHERS = 5, 2  # steps before those that are timed
SHORTEST, LONGEST = 96, 1400  # pixels of a side


def cut_photo(photos: list[Image.Image], draw: random.Random) -> bytes:
    """A piece of a photograph, resized; the logarithms of its sides are even."""
    height, width = (round(math.exp(draw.uniform(math.log(SHORTEST), math.log(LONGEST)))) for _ in "hw")
    photo = draw.choice(photos)
    scale = min(1.0, photo.width / width, photo.height / height)
    box_width, box_height = int(width * scale), int(height * scale)
    left, top = draw.randint(0, photo.width - box_width), draw.randint(0, photo.height - box_height)
    piece = photo.resize((width, height), box=(left, top, left + box_width, top + box_height))
    buffer = io.BytesIO()
    piece.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def write_shards(folder: Path, photos: Path) -> None:
    """Tars of pictures and captions, as CC12M has them."""
    opened = [Image.open(path).convert("RGB") for path in sorted(photos.glob("*.[jp][pn]g"))]
    draw = random.Random(0)
    for shard in range(SHARDS):
        members = []
        for number in range(PHOTOS // SHARDS):
            caption = " ".join(draw.choices(WORDS, k=draw.randint(20, 300))).encode()
            name = f"{shard:05d}{number:04d}"
            members += [(f"{name}.jpg", cut_photo(opened, draw)), (f"{name}.txt", caption)]
        write_tar(folder / f"{shard:05d}.tar", members)


def add_job_arguments(parser: argparse.ArgumentParser, flavor: str, accumulation: int) -> None:
    """What `job_of` and `write_shards` ask for, with these defaults."""
    parser.add_argument("--flavor", default=flavor)
    parser.add_argument("--slots", type=int, default=2, help="of a forward")
    parser.add_argument("--accumulation", type=int, default=accumulation, help="forwards of a step")
    parser.add_argument("--photos", type=Path, default=ROOT / "tests/photographs")


def job_of(options: argparse.Namespace, way: str, given: list[str], folder: Path) -> VLMJobConfig:
    slots = str(options.slots)
    argv = [
        *("--model.flavor", options.flavor, "--job.dump_folder", str(folder / way)),
        *("--model.tokenizer_path", str(ROOT / "assets/tokenizer")),
        *("--training.dataset", "cc12m", "--training.dataset_path", str(folder)),
        *("--training.local_batch_size", slots, "--training.seq_len", "8192"),
        *("--training.global_batch_size", str(options.slots * options.accumulation)),
        *("--training.steps", "1000", "--optimizer.lr", "1e-5"),
        *("--data.patches_per_row", "14336", "--data.num_workers", "6", "--comm.trace_buf_size", "0"),
        *WAYS[way],
        *given,
    ]
    job = checked_job(argv, 1)
    assert isinstance(job, VLMJobConfig)
    return job


def batches_of(job: VLMJobConfig, tokenizer: Any, steps: int) -> Iterator[list[Any]]:
    """The batches of each of a rank's first steps. They hold until the next: the loader writes that into the
    same memory.
    """
    place = {"rank": 0, "ranks": 1, "split": "train", "control": None, "agree": None, "group": None}
    with closing(SPEC.build_loader(job, tokenizer, **place)) as loader:
        for step in itertools.islice(loader, steps):
            yield step.batches


class TimedTrainer(Trainer):
    """With an event between the parts of each step."""

    def watch(self) -> None:
        self.stopwatch = Stopwatch(self.run.forward_backward.parts[0], self.run.mesh.device)

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
    reached = {part: 100 * done / seconds[part] / peak for part, done in flops.total.items()} if peak else {}
    return {"parts": seconds, "part_mfu": reached}


def one_way(options: argparse.Namespace, way: str, given: list[str], folder: Path) -> dict[str, Any]:
    """Everything that is measured of one way to run the step."""
    job = job_of(options, way, given, folder)
    device = open_process_group(job.comm, folder)
    whole = SPEC.build_model(job, SPEC.load_tokenizer(job))
    flops, peak = PartFlops(whole), peak_flops(device)
    began = time.perf_counter()
    trainer = TimedTrainer(build(job, SPEC, device))
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
        if way != "graphed":
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


def of_transformers(options: argparse.Namespace, given: list[str], folder: Path) -> dict[str, Any]:
    """The same rates of a step of transformers."""
    job = job_of(options, "eager", given, folder)
    tokenizer, config = SPEC.load_tokenizer(job), SPEC.model_config(job)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flops, merged = PartFlops(SPEC.build_model(job, tokenizer)), config.projector.merge_size**2
    arguments, done, counts = [], [], []
    for batches in batches_of(job, tokenizer, OF_OTHERS + options.steps):
        arguments.append([unpacked(batch.tensors, merged) for batch in batches])
        done.append(sum(map(flops, batches)))
        counts.append([batch.counts for batch in batches])
    take = Steps(model_of(config, tokenizer.image_id, device), job.optimizer.lr)
    for step in arguments[:OF_OTHERS]:
        take(step)
    synchronise()
    started = time.perf_counter()
    for step in arguments[OF_OTHERS:]:
        take(step)
    synchronise()
    seconds, peak = time.perf_counter() - started, peak_flops(device)
    timed = [each for step in counts[OF_OTHERS:] for each in step]
    counted = {name: sum(each[name] for each in timed) / seconds for name in ("tokens", "images")}
    return {
        "way": "transformers",
        "step_s": seconds / options.steps,
        "mfu": 100 * sum(done[OF_OTHERS:]) / seconds / peak if peak else None,
        "tps": counted["tokens"],
        "images/s": counted["images"],
        "memory": peak_memory_gib(device),
    }


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_job_arguments(parser, "so400m-llama3.2-1B", accumulation=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--ways", nargs="+", choices=[*WAYS, "transformers"], default=USUAL)
    parser.add_argument("--kernels", action="store_true", help="one step under the profiler")
    options, given = parser.parse_known_args()
    rows, hardware = [], torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), options.photos)
        for way in options.ways:
            if way == "transformers":
                rows.append(of_transformers(options, given, Path(folder)))
            else:
                rows.append(one_way(options, way, given, Path(folder)))
            print(shown(rows[-1]), flush=True)
            torch._dynamo.reset()
            gc.collect()
    facts = {"benchmark": "train_step", "hardware": hardware, "torch": torch.__version__}
    print(json.dumps(facts | {"flavor": options.flavor, "slots": options.slots, "rows": rows}))


if __name__ == "__main__":
    main()
