"""How much faster than transformers' SigLIP2 is the encoder on images of many sizes, at the same weights?

    python -m benchmarks.encoder [--size so400m] [--patches 14336] [--seconds 2]

Forward and backward in bfloat16 on a GPU, float32 on a CPU. Ours takes a packed row of `--patches` patches,
with compiled blocks on a GPU; theirs takes the same images, each padded to the largest, with a mask, as its
processor gives them. Features are compared first.

Expected: theirs computes 1,024 patches for every image, ours those that are there, so the ratio is at least
that of the patches; ours has no loop over images to resize positions either.
"""

import argparse
import dataclasses
import json
import random
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.attention import median_ms
from experiments.vlm.model.flavors import ENCODERS
from experiments.vlm.model.vit import VisionEncoder
from tests.reference.batches import Sizes, draw_picture, pack_pictures, pad_for_transformers
from tests.reference.hf_names import ENCODER_ROWS
from tests.reference.models import hf_vision_config
from torchtitan.distributed.compile import apply_compile
from torchtitan.models.weight_names import read

MOST = 1024  # patches of an image


def draw_sizes(patches: int) -> list[tuple[int, int]]:
    """Heights and widths in patches, even, until the row is full."""
    draw, sizes, left = random.Random(0), [], patches
    while left >= 64:
        height, width = (2 * round(2 ** draw.uniform(1, 5)) for _ in "hw")
        if height * width <= min(MOST, left):
            sizes.append((height, width))
            left -= height * width
    return sizes


def pair(size: str, device: str, dtype: torch.dtype) -> tuple[VisionEncoder, nn.Module]:
    from transformers import Siglip2VisionModel

    config = dataclasses.replace(ENCODERS[size])
    torch.manual_seed(0)
    with torch.device(device):
        theirs = Siglip2VisionModel(hf_vision_config(config))
        ours = VisionEncoder(config, "flex" if device == "cuda" else "sdpa")
    ours.load_state_dict(read(theirs.state_dict(), ENCODER_ROWS).named)
    return ours.to(dtype), theirs.to(dtype)


def passes(run: Callable[[], torch.Tensor], model: nn.Module) -> Callable[[], None]:
    gradient: list[torch.Tensor] = []

    def step() -> None:
        features = run()
        if not gradient:
            gradient.append(torch.randn_like(features))
        features.backward(gradient[0])
        model.zero_grad(set_to_none=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="so400m", choices=list(ENCODERS))
    parser.add_argument("--patches", type=int, default=14336, help="of the packed row")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--compile", action="store_true", help="theirs compiled, too")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None
    ours, theirs = pair(options.size, device, dtype)
    sizes = draw_sizes(options.patches)
    patch_size = ours.config.patch_size
    pictures = [[draw_picture(height, width, patch_size, seed) for seed, (height, width) in enumerate(sizes)]]
    packed = [
        x.to(device)
        for x in pack_pictures(pictures, Sizes(options.patches, options.patches, patch_size=patch_size))
    ]
    padded = {name: x.to(device) for name, x in pad_for_transformers(pictures[0]).items()}
    padded["pixel_values"] = padded["pixel_values"].to(dtype)
    with torch.no_grad():
        first = sizes[0][0] * sizes[0][1]
        own, other = ours(*packed)[0, :first].float(), theirs(**padded).last_hidden_state[0, :first].float()
        alike = nn.functional.cosine_similarity(own.mean(0), other.mean(0), dim=0).item()
    if device == "cuda":
        apply_compile(ours.layers)
    rows = {
        "ours": passes(lambda: ours(*packed), ours),
        "transformers": passes(lambda: theirs(**padded).last_hidden_state, theirs),
    }
    if options.compile:
        compiled = torch.compile(theirs)
        rows["transformers, compiled"] = passes(lambda: compiled(**padded).last_hidden_state, theirs)
    found = {name: median_ms(step, options.seconds, synchronise) for name, step in rows.items()}
    hardware = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    used = sum(h * w for h, w in sizes)
    print(f"{options.size}, {len(sizes)} images, {used} patches, {hardware}, torch {torch.__version__}")
    for name, ms in found.items():
        print(f"{name:<24}{ms:10.1f} ms {ms / found['ours']:6.2f}")
    computed = len(sizes) * padded["pixel_values"].shape[1]
    print(f"padded patches / patches {computed / used:.2f}, cosine {alike:.4f}")
    facts = {"benchmark": "encoder", "hardware": hardware, "torch": torch.__version__}
    print(json.dumps(facts | {"images": len(sizes), "patches": used, "ms": found}))


if __name__ == "__main__":
    main()
