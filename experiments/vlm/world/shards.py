"""The embedded worlds and how their shards are written.

`captions` and `sees` are tar files as CC12M has them (KEY.jpg, KEY.txt, KEY.json; `sees` keeps lossless
KEY.png and KEY.txt: half the size). `interleaved` is parquet as OBELICS has it: `texts` and `images` are
parallel lists, one of the two null at each index, an image a record of bytes and path; `metadata` and
`general_metadata` are JSON strings. `questions` are tar files of conversations as LLaVA has them (KEY.jpg,
KEY.json), `reads` too, with several images (KEY.0.png) and, for evaluation, the question and its answer by
themselves. `llava_captions` and `llava_questions` are what LLaVA's two phases read: a JSON list of
conversations that name pictures in a folder next to it.

A sample is a function of seed, name and number alone.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from experiments.vlm.tar_file import write_samples
from experiments.vlm.world.caption import describe, varied_caption
from experiments.vlm.world.document import draw_document, questions
from experiments.vlm.world.render import jpeg, png, render
from experiments.vlm.world.scene import Scene, sees_scene, varied_scene
from experiments.vlm.world.strips import ask_for, draw_strip, random_document

SPLITS = ("train", "heldout")
PICTURES = "pictures"  # the folder next to a JSON list
DESCRIBE = ("What does the picture show?", "Say in a few words what is drawn.", "Describe this picture.")
Draw = Callable[[random.Random, bool, str], dict]  # generator, held out, key -> the record of one sample


@dataclass(frozen=True)
class World:
    """How many samples an embedded world has, and how they are drawn and written."""

    samples: dict[str, int]  # of each split
    shard: int  # samples a shard
    suffix: str  # of a shard
    draw: Draw
    write: Callable[[Path, Iterator[dict]], None]

    def shards(self, split: str) -> list[range]:
        """The samples of each shard."""
        samples = self.samples[split]
        return [range(first, min(first + self.shard, samples)) for first in range(0, samples, self.shard)]


def _sees_sample(rng: random.Random, heldout: bool, key: str) -> dict:
    scene = sees_scene(rng, heldout)
    return {f"{key}.png": png(render(scene)), f"{key}.txt": describe(scene).encode()}


def _captions_sample(rng: random.Random, heldout: bool, key: str) -> dict:
    scene = varied_scene(rng, heldout, longest=512)
    caption = varied_caption(scene, rng)
    record = {"key": key, "caption": caption, "width": scene.width, "height": scene.height}
    image = jpeg(render(scene), rng.randint(85, 95))
    return {f"{key}.jpg": image, f"{key}.txt": caption.encode(), f"{key}.json": json.dumps(record).encode()}


def _interleaved_sample(rng: random.Random, heldout: bool, key: str) -> dict:
    parts = draw_document(rng, heldout)
    images = [
        _image_record(part, f"{key}-{i}", rng) if isinstance(part, Scene) else None
        for i, part in enumerate(parts)
    ]
    sizes = [
        {"original_width": part.width, "original_height": part.height} if isinstance(part, Scene) else None
        for part in parts
    ]
    return {
        "texts": [part if isinstance(part, str) else None for part in parts],
        "images": images,
        "metadata": json.dumps(sizes),
        "general_metadata": json.dumps({"url": f"embedded:interleaved/{key}"}),
    }


def _questions_sample(rng: random.Random, heldout: bool, key: str) -> dict:
    scene = varied_scene(rng, heldout, longest=512)
    record = {"id": key, "conversations": _asked(scene, rng)}
    return {
        f"{key}.jpg": jpeg(render(scene), rng.randint(85, 95)),
        f"{key}.json": json.dumps(record).encode(),
    }


def _asked(scene: Scene, rng: random.Random) -> list[dict[str, str]]:
    asked = questions(scene)
    return _turns(
        *((question, f"{answer}.") for question, answer in rng.sample(asked, rng.randint(1, len(asked))))
    )


def _turns(*said: tuple[str, str]) -> list[dict[str, str]]:
    """Questions and answers as turns, the first with the picture."""
    turns: list[dict[str, str]] = []
    for question, answer in said:
        place = "" if turns else "<image>\n"
        turns += [{"from": "human", "value": place + question}, {"from": "gpt", "value": answer}]
    return turns


def _llava_captions_sample(rng: random.Random, heldout: bool, key: str) -> dict:
    scene = varied_scene(rng, heldout, longest=256)
    return _llava_sample(key, scene, _turns((rng.choice(DESCRIBE), varied_caption(scene, rng))))


def _llava_questions_sample(rng: random.Random, heldout: bool, key: str) -> dict:
    scene = varied_scene(rng, heldout, longest=256)
    return _llava_sample(key, scene, _asked(scene, rng))


def _llava_sample(key: str, scene: Scene, turns: list[dict[str, str]]) -> dict:
    record = {"id": key, "image": f"{PICTURES}/{key}.jpg", "conversations": turns}
    return {"record": record, "picture": jpeg(render(scene), 90)}


def _reads_sample(rng: random.Random, heldout: bool, key: str) -> dict:
    strips, asked = random_document(rng, heldout)
    wanted, answer = ask_for(strips, asked), strips[asked].text
    turns = [{"from": "human", "value": wanted}, {"from": "gpt", "value": answer}]
    record = {"id": key, "question": wanted, "answers": [answer], "conversations": turns}
    # Held-out digits are shown as they were written.
    images = [png(draw_strip(strip, rng, written_anew=not heldout)) for strip in strips]
    members = {f"{key}.{number}.png": image for number, image in enumerate(images)}
    return members | {f"{key}.json": json.dumps(record).encode()}


def _image_record(scene: Scene, stem: str, rng: random.Random) -> dict:
    image = render(scene)
    if rng.random() < 0.2:
        return {"bytes": png(image), "path": f"{stem}.png"}
    return {"bytes": jpeg(image, rng.randint(85, 95)), "path": f"{stem}.jpg"}


def _write_tar(path: Path, records: Iterator[dict]) -> None:
    with path.open("wb") as file:
        write_samples(file, records)


def _write_parquet(path: Path, records: Iterator[dict]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = [
        ("texts", pa.list_(pa.string())),
        ("images", pa.list_(image)),
        ("metadata", pa.string()),
        ("general_metadata", pa.string()),
    ]
    # Small row groups: a reader that wants one document loads no more than its neighbours.
    pq.write_table(
        pa.Table.from_pylist(list(records), schema=pa.schema(columns)),
        path,
        row_group_size=50,
        compression="none",
    )


def _write_llava(path: Path, samples: Iterator[dict]) -> None:
    (path.parent / PICTURES).mkdir(exist_ok=True)
    records = []
    for sample in samples:
        (path.parent / sample["record"]["image"]).write_bytes(sample["picture"])
        records.append(sample["record"])
    path.write_text(json.dumps(records, indent=1), encoding="utf-8")


WORLDS = {
    "captions": World({"train": 6_000, "heldout": 400}, 1_000, "tar", _captions_sample, _write_tar),
    "interleaved": World(
        {"train": 2_000, "heldout": 200}, 250, "parquet", _interleaved_sample, _write_parquet
    ),
    "llava_captions": World(
        {"train": 1_200, "heldout": 100}, 400, "json", _llava_captions_sample, _write_llava
    ),
    "llava_questions": World(
        {"train": 1_200, "heldout": 100}, 400, "json", _llava_questions_sample, _write_llava
    ),
    "questions": World({"train": 1_000, "heldout": 200}, 500, "tar", _questions_sample, _write_tar),
    "reads": World({"train": 30_000, "heldout": 500}, 3_000, "tar", _reads_sample, _write_tar),
    "sees": World({"train": 120_000, "heldout": 1_000}, 4_000, "tar", _sees_sample, _write_tar),
}


def write_shard(name: str, seed: int, folder: Path, number: int) -> None:
    """Draw shard `number` of a world's split ("sees/train") into `folder`, whole or not at all."""
    world_name, split = name.split("/")
    world = WORLDS[world_name]
    keys = (
        (f"{sample:09d}", random.Random(f"{seed} {name} {sample}")) for sample in world.shards(split)[number]
    )
    unfinished = folder / f"{number}.unfinished"
    world.write(unfinished, (world.draw(rng, split == "heldout", key) for key, rng in keys))
    unfinished.rename(folder / f"{split}-{number:05d}.{world.suffix}")
