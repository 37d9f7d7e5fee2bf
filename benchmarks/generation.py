"""How many tokens a second does greedy decoding give, compared with `transformers` on the same weights?

    python -m benchmarks.generation [--flavor FLAVOR | --hf FOLDER] [--tokens 64] [--sequences 1 8]

A folder with random weights is written (bfloat16 on a GPU, float32 on a CPU) and opened by both. Every
sequence gets the same prompt, one image of 448 x 448 and a question, and as many tokens; answers never end
before. Both are warmed up; "tokens/s" counts the new tokens of all sequences over all the time from the
prompts to the last token, "decoding" leaves the reading of prompts and the first token out. On a GPU ours
runs compiled and is run once more with synchronisations counted.

Expected: at least as fast as transformers with one sequence on CPU, where both are bound by reading the
weights once a token, and faster with more; on a GPU one synchronisation a step, for the tokens that were
chosen. Seen on CPU (results/2026-11-28-generation.md): 0.66 and 0.73 of its tokens a second. Half of a
token's time is products, as theirs is; the rest is many small operations, which nothing compiles there.
"""

import argparse
import json
import platform
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from experiments.vlm.config import VLMJobConfig
from experiments.vlm.data.document import Picture
from experiments.vlm.generate.answering import Answering, open_answering
from experiments.vlm.generate.prompt import Prompt
from experiments.vlm.model.config import EncoderConfig, ProjectorConfig, VLMConfig
from experiments.vlm.model.families import family_of
from experiments.vlm.model.flavors import FLAVORS
from experiments.vlm.spec import SPEC
from torchtitan.components.tokenizer import load_tokenizer
from torchtitan.generation.engine import Request
from torchtitan.models.decoder.flavors import DECODERS

TOKENIZER = str(Path(__file__).parents[1] / "assets/tokenizer")
SIZES = {
    "dim": 512,
    "layers": 8,
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 64,
    "mlp_dim": 1536,
    "vocab_size": 32000,
}
SMALL = VLMConfig(  # 50 million parameters
    EncoderConfig(384, 6, 6, 1536), ProjectorConfig(512), replace(DECODERS["qwen3-0.6B"], **SIZES)
)
NEVER_ENDS = 10**9  # an id that no vocabulary has


def write_folder(config: VLMConfig, folder: Path, device: str) -> None:
    """A random model as transformers saves it."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    tokenizer = load_tokenizer(TOKENIZER)
    values = family_of(config).write(config, config.decoder.vocab_size, tokenizer.image_id)
    (folder / "config.json").write_text(json.dumps(values))
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    model.to(torch.bfloat16 if device == "cuda" else torch.float32).save_pretrained(folder)


def open_ours(folder: Path, device: str, sequences: int, tokens: int) -> Answering:
    job = VLMJobConfig()
    job.model.flavor, job.model.tokenizer_path = "", TOKENIZER
    job.checkpoint.initial_load_in_hf, job.checkpoint.initial_load_path = True, str(folder)
    job.job.dump_folder, job.compile.enable = str(folder), device == "cuda"
    job.training.mixed_precision_param = "bfloat16" if device == "cuda" else "float32"
    return open_answering(job, SPEC, None, "", sequences, 1024 + tokens)


def prompt_of(answering: Answering) -> Prompt:
    values = np.random.default_rng(0).integers(0, 256, (448, 448, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(values).save(file, "png")
    return answering.prompter.prompt([("", [Picture(file.getvalue(), "noise"), "What is in the picture?"])])


def run_ours(answering: Answering, prompt: Prompt, sequences: int, tokens: int) -> Iterator[float]:
    """When each token came, of all sequences."""
    requests = [Request(number, prompt, max_tokens=tokens) for number in range(sequences)]
    for _ in answering.engine.answer(requests):
        yield time.perf_counter()


def times_of_ours(answering: Answering, prompt: Prompt, sequences: int, tokens: int) -> tuple[float, float]:
    """Seconds in all, and those after the first token of the last sequence that was admitted."""
    began = time.perf_counter()
    came = list(run_ours(answering, prompt, sequences, tokens))
    return came[-1] - began, came[-1] - came[sequences - 1]


def inputs_of(prompt: Prompt, sequences: int, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The prompt as transformers' processor gives it."""
    grid = prompt.grid_thw.reshape(-1, 3)
    order = [i for i in np.lexsort((grid[:, 2], grid[:, 1])) if grid[i, 0] >= 0]
    pixels = prompt.pixel_values.reshape(len(grid), -1)[order] / 127.5 - 1
    height, width = grid[order[-1], 1:] + 1
    return {
        "input_ids": torch.tensor([prompt.ids] * sequences, device=device),
        "attention_mask": torch.ones(sequences, len(prompt.ids), dtype=torch.int64, device=device),
        "pixel_values": torch.tensor(pixels, dtype=dtype, device=device).expand(sequences, -1, -1),
        "pixel_attention_mask": torch.ones(sequences, len(order), dtype=torch.int32, device=device),
        "spatial_shapes": torch.tensor([[height, width]] * sequences, device=device),
    }


class Theirs:
    """transformers' generate."""

    def __init__(self, folder: Path, device: str):
        from transformers import AutoModelForImageTextToText

        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.device = device
        opened = AutoModelForImageTextToText.from_pretrained(folder, dtype=self.dtype)
        self.model = opened.to(device).eval()

    def run(self, prompt: Prompt, sequences: int, tokens: int) -> float:
        """Seconds."""
        inputs = inputs_of(prompt, sequences, self.device, self.dtype)
        began = time.perf_counter()
        with torch.no_grad():
            self.model.generate(
                **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
            )
        return time.perf_counter() - began


def synchronisations(answering: Answering, prompt: Prompt, sequences: int, tokens: int) -> float:
    """A step, by CUDA's own count. Each prompt is a step, and so is each further token of all sequences."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(run_ours(answering, prompt, sequences, tokens))
    torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchroniz" in str(warning.message)]
    return len(waits) / (sequences + tokens - 1)


def compare(folder: Path, device: str, sequences: int, tokens: int) -> dict[str, float | str]:
    """One row of the table."""
    ours, theirs = open_ours(folder, device, sequences, tokens), Theirs(folder, device)
    ours.engine.ends = frozenset({NEVER_ENDS})
    prompt = prompt_of(ours)
    times_of_ours(ours, prompt, sequences, 4)
    theirs.run(prompt, sequences, 4)
    pairs = [
        (times_of_ours(ours, prompt, sequences, tokens), theirs.run(prompt, sequences, tokens))
        for _ in range(3)
    ]
    (whole, decoding), their_whole = min(p[0] for p in pairs), min(p[1] for p in pairs)
    their_first = min(theirs.run(prompt, sequences, 1) for _ in range(3))
    row: dict[str, float | str] = {
        "sequences": sequences,
        "ours": sequences * tokens / whole,
        "transformers": sequences * tokens / their_whole,
        "ratio": their_whole / whole,
        "decoding": sequences * (tokens - 1) / decoding,
        "decoding, transformers": sequences * (tokens - 1) / (their_whole - their_first),
    }
    row["decoding, ratio"] = row["decoding"] / row["decoding, transformers"]  # type: ignore
    if device == "cuda":
        row["synchronisations"] = synchronisations(ours, prompt, sequences, tokens)
    return row


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--flavor", choices=sorted(FLAVORS), help="sizes; else 50 million parameters")
    parser.add_argument("--hf", type=Path, help="a folder with weights, in place of random ones")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.tokens} tokens")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.hf or Path(temporary)
        if not args.hf:
            write_folder(FLAVORS[args.flavor] if args.flavor else SMALL, folder, device)
        rows = [compare(folder, device, sequences, args.tokens) for sequences in args.sequences]
    print("| " + " | ".join(rows[0]) + " |\n|" + " --- |" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{value:.4g}" for value in row.values()) + " |")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
