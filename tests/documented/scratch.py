"""What a page's commands find: the repository, a short run, and files with the names of the pages."""

import json
from pathlib import Path

import pyarrow
from pyarrow import parquet

from tests.documented.pages import REPOSITORY
from tests.samples import jpeg, write_jsonl

BEFORE = """
./run_train.sh
./run_train.sh --job.config_file train_configs/vlm_sees.toml --checkpoint.interval 1
torchtitan-vlm to_hf --job.dump_folder outputs/vlm_sees --checkpoint step-2 --out FOLDER
"""


def repository(folder: Path) -> Path:
    """A folder that looks like a fresh clone; what is written into it stays in it."""
    folder.mkdir()
    for path in REPOSITORY.iterdir():
        if path.name == ".ci" or path.name[0] != "." and path.name != "outputs":
            (folder / path.name).symlink_to(path)
    for number, name in enumerate(("picture.jpg", "a.jpg", "b.png")):
        (folder / name).write_bytes(jpeg(64, 96, seed=number))
    write_jsonl(folder / "questions.jsonl", [{"prompt": "What is it?", "images": ["a.jpg"]}])
    task = {
        "question": "What is it?",
        "image": "a.jpg",
        "answers": ["A heron."],
        "choices": ["A heron.", "A boat."],
    }
    for name in ("ai2d.jsonl", "heldout.jsonl", "coco.jsonl"):
        write_jsonl(folder / name, [task])
    parquet.write_table(pyarrow.Table.from_pylist([task]), folder / "textvqa.parquet")
    (folder / "images").mkdir()
    (folder / "images" / "1.jpg").write_bytes(jpeg(64, 96))
    said = [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "A heron."}]
    (folder / "llava.json").write_text(json.dumps([{"image": "1.jpg", "conversations": said}]))
    return folder
