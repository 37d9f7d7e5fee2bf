"""How fast are bytes turned into pixels of the planned size, and how close do these come to Pillow's?

    python -m benchmarks.image_decoding [--images 100] [--threads 1 2] [--rounds 3]

Expected: our chain (simplejpeg into a kept buffer, torch's antialiased resize) beats Pillow's decode and
resize by 1.6 or more, since Pillow's resize costs as much as its decoding and torch's a quarter of that; the
rest is libjpeg-turbo's own time, the same in every chain. Two threads on two idle cores should nearly double
it, since nothing holds the interpreter lock.

Of 12-megapixel JPEGs: what decoding at half the size gains, and what it costs in quality.
"""

import argparse
import io
import json
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import PIL
import simplejpeg
import torch
from PIL import Image

from benchmarks.photos import draw_photo, encode_jpeg, make_jpegs
from experiments.vlm.data import image as image_module
from experiments.vlm.data.image import decode, probe, write_patches
from experiments.vlm.data.image_plan import ImagePlan

PLAN = ImagePlan()
Chain = Callable[[bytes], np.ndarray]


def target(data: bytes) -> tuple[int, int]:
    h, w = PLAN.grid(*probe(data))
    return h * PLAN.patch_size, w * PLAN.patch_size


def pillow(data: bytes) -> np.ndarray:
    height, width = target(data)
    return np.asarray(
        Image.open(io.BytesIO(data)).convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    )


def simplejpeg_pillow(data: bytes) -> np.ndarray:
    height, width = target(data)
    return np.asarray(
        Image.fromarray(simplejpeg.decode_jpeg(data)).resize((width, height), Image.Resampling.BILINEAR)
    )


def simplejpeg_opencv(data: bytes) -> np.ndarray:
    height, width = target(data)
    return cv2.resize(simplejpeg.decode_jpeg(data), (width, height), interpolation=cv2.INTER_AREA)


def simplejpeg_torch(data: bytes) -> np.ndarray:
    pixels = torch.from_numpy(simplejpeg.decode_jpeg(data)).unsqueeze(0).permute(0, 3, 1, 2)
    return (
        torch.nn.functional.interpolate(pixels, target(data), mode="bilinear", antialias=True)[0]
        .permute(1, 2, 0)
        .numpy()
    )


def ours(data: bytes) -> np.ndarray:
    return decode(data, *target(data))


def ours_and_patches(data: bytes) -> np.ndarray:
    pixels = ours(data)
    count = pixels.shape[0] * pixels.shape[1] // PLAN.patch_size**2
    write_patches(
        pixels, PLAN, np.empty((count, PLAN.patch_size**2 * 3), np.uint8), np.empty((count, 3), np.int32)
    )
    return pixels


DECODERS: dict[str, Chain] = {
    "decode only: Pillow": lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")),
    "decode only: simplejpeg": simplejpeg.decode_jpeg,
    "decode only: OpenCV": lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR),
}
CHAINS: dict[str, Chain] = {
    "Pillow + Pillow": pillow,
    "simplejpeg + Pillow": simplejpeg_pillow,
    "simplejpeg + OpenCV INTER_AREA": simplejpeg_opencv,
    "simplejpeg + torch, fresh memory": simplejpeg_torch,
    "ours": ours,
    "ours, to patches": ours_and_patches,
}


def seconds(chain: Chain, images: list[bytes], threads: int) -> float:
    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        for _ in pool.map(chain, images):
            pass
        return time.perf_counter() - start


def rates(chains: dict[str, Chain], images: list[bytes], threads: int, rounds: int) -> dict[str, float]:
    """Images a second, the best of the rounds.

    Chains take turns, so that what else the machine does hits all alike.
    """
    best = dict.fromkeys(chains, math.inf)
    for _ in range(rounds + 1):  # the first warms up too
        for name, chain in chains.items():
            best[name] = min(best[name], seconds(chain, images, threads))
    return {name: len(images) / time_s for name, time_s in best.items()}


def decibels(chain: Chain, images: list[bytes]) -> tuple[float, float]:
    """Lowest and median PSNR against Pillow."""
    errors = [np.mean((chain(data).astype(np.float64) - pillow(data)) ** 2) for data in images]
    values = [99.0 if error == 0 else 10 * math.log10(255**2 / error) for error in errors]
    return min(values), float(np.median(values))


def compare_chains(images: list[bytes], threads: list[int], rounds: int) -> dict:
    measured = {count: rates(DECODERS | CHAINS, images, count, rounds) for count in threads}
    quality = {name: decibels(chain, images[:30]) for name, chain in CHAINS.items()}
    print(
        "\n| chain | "
        + " | ".join(f"images/s, {count} thread(s)" for count in threads)
        + " | to Pillow | dB, lowest / median |"
    )
    print("|---" * (len(threads) + 3) + "|")
    for name in DECODERS | CHAINS:
        row = [f"{measured[count][name]:.0f}" for count in threads]
        ratio = measured[threads[0]][name] / measured[threads[0]]["Pillow + Pillow"]
        shown = "{:.1f} / {:.1f}".format(*quality[name]) if name in quality else ""
        print(f"| {name} | {' | '.join(row)} | {ratio:.2f} | {shown} |")
    return {"images_per_s": measured, "decibels": quality}


def compare_scaling(rounds: int) -> dict:
    """12 megapixels, at half the size in the DCT domain and whole."""
    images = [encode_jpeg(draw_photo(3000, 4000, seed), quality=92) for seed in range(4)]
    shrinking = rates({"shrunk": ours}, images, 1, rounds)["shrunk"]
    quality = decibels(ours, images)
    chosen, image_module.jpeg_factor = image_module.jpeg_factor, lambda size, target, kernel: 1
    try:
        whole = rates({"whole": ours}, images, 1, rounds)["whole"]
    finally:
        image_module.jpeg_factor = chosen
    print(
        f"\n4000 x 3000: {shrinking:.1f} images/s shrunk in the decoder, {whole:.1f} decoded whole "
        f"({shrinking / whole:.2f} times),"
    )
    print(f"at {quality[0]:.1f} dB lowest, {quality[1]:.1f} dB median")
    return {"shrunk": shrinking, "whole": whole, "decibels": quality}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    images = make_jpegs(arguments.images)
    sizes = [probe(data) for data in images]
    megapixels = np.mean([h * w for h, w in sizes]) / 1e6
    kilobytes = np.mean([len(data) for data in images]) / 1e3
    print(
        f"{len(images)} JPEGs, {megapixels:.2f} megapixels and {kilobytes:.0f} kB each, to at most "
        f"{PLAN.max_patches} patches"
    )
    print(
        f"Pillow {PIL.__version__}, simplejpeg {simplejpeg.__version__}, OpenCV {cv2.__version__}, torch "
        f"{torch.__version__}"
    )
    found = compare_chains(images, arguments.threads, arguments.rounds)
    found["12 megapixels"] = compare_scaling(arguments.rounds)
    print("\n" + json.dumps({"benchmark": "image_decoding", "cores": os.cpu_count(), **found}))


if __name__ == "__main__":
    main()
