"""An exported folder as AutoProcessor of stock transformers opens it, in a process of its own.

Lfm2VlImageProcessor needs torchvision, of which there is no build for a torch without CUDA. Its Python part
works once two operators that its library would bring are declared, which must not happen where other tests
import transformers; its decoders do not, so images are given as Pillow opens them.

    python -m tests.reference.hf_processor TORCHVISION REQUESTS.json OUT.npz

REQUESTS.json: a list of [folder, {"messages": [...], **options of apply_chat_template}]. OUT.npz has for
number n `ids_n` [tokens], and of images of their own size `sizes_n` [images, 2] in patches and `pixels_n`
[images, L, D]. With the option "answer", a number of tokens, AutoModelForImageTextToText opens the folder
too: `logits_n` [tokens, V] of the prompt, and `answer_n`, what it says greedily.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def torchvision_folder() -> Path:
    """With the torchvision that goes with this torch, fetched once; skips where it cannot be."""
    import torch

    minor = int(torch.__version__.split(".")[1])
    version = f"0.{minor + 15}.0"
    folder = Path(f"~/.cache/torchtitan-vlm/torchvision-{version}").expanduser()
    if not (folder / "torchvision").is_dir():
        options = ["--quiet", "--no-deps", "--target", str(folder), f"torchvision=={version}"]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", *options], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"could not import 'torchvision': {done.stderr.strip()[-200:]}")
    return folder


def processed(requests: list[tuple[str, dict]], scratch: Path) -> list[dict[str, np.ndarray]]:
    """What the processor in each folder makes of its conversation: ids, and sizes and pixels of images."""
    asked, answer = scratch / "requests.json", scratch / "processed.npz"
    asked.write_text(json.dumps(requests))
    files = [str(path) for path in (torchvision_folder(), asked, answer)]
    command = [sys.executable, "-m", "tests.reference.hf_processor", *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    found: list[dict[str, np.ndarray]] = [{} for _ in requests]
    with np.load(answer) as arrays:
        for name, array in arrays.items():
            what, _, number = name.partition("_")
            found[int(number)][what] = array
    return found


def asked(content: list[str | Path]) -> list[dict]:
    """A user's message, with the files of images in their places."""
    items = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "path": str(part)}
        for part in content
    ]
    return [{"role": "user", "content": items}]


def main(torchvision: str, asked: str, answer: str) -> None:
    sys.path.insert(0, torchvision)
    import torch

    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor, found = functools.cache(AutoProcessor.from_pretrained), {}
    model = functools.cache(AutoModelForImageTextToText.from_pretrained)
    for number, (folder, options) in enumerate(json.loads(Path(asked).read_text())):
        messages, answering = options.pop("messages"), options.pop("answer", 0)
        for item in (item for message in messages for item in message["content"] if "path" in item):
            item["image"] = Image.open(item.pop("path"))
        options |= {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor(folder).apply_chat_template(messages, **options)
        found[f"ids_{number}"] = np.array(inputs["input_ids"]).reshape(-1)
        if "spatial_shapes" in inputs:
            found[f"pixels_{number}"] = np.stack([np.asarray(pixels) for pixels in inputs["pixel_values"]])
            found[f"sizes_{number}"] = np.array(inputs["spatial_shapes"])
        if answering:
            with torch.no_grad():
                found[f"logits_{number}"] = model(folder)(**inputs).logits[0].numpy()
                said = model(folder).generate(**inputs, max_new_tokens=answering, do_sample=False)
            found[f"answer_{number}"] = said[0, inputs["input_ids"].shape[1] :].numpy()
    np.savez(answer, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
