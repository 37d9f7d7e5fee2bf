"""Folders of Megatron Energon: training reads the train split, validation the other."""

import json
import os

import fsspec
import pytest
import yaml

from experiments.vlm.config import Data, Source
from experiments.vlm.data.loader import Loader
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.sources.shards import list_shards, open_shard
from tests.samples import jpeg, write_tar
from tests.tiny_data import Characters, make_job, write_captions
from torchtitan.config.errors import ConfigError

SPLIT = {
    "exclude": [],
    "split_parts": {
        "train": ["shards/a.tar", "shards/{b,c}.tar"],
        "val": ["shards/d.tar"],
        "test": ["shards/e.tar"],
    },
}


def write(folder, told=SPLIT, name="split.yaml"):
    (folder / ".nv-meta").mkdir(parents=True)
    (folder / "shards").mkdir()
    dump = json.dumps if name.endswith("json") else yaml.safe_dump
    (folder / ".nv-meta" / name).write_text(dump(told))
    (folder / ".nv-meta" / "dataset.yaml").write_text("sample_type: {__class__: CaptioningSample}\n")
    (folder / ".nv-meta" / "index.sqlite").write_bytes(b"")
    for letter in "abcde":
        (folder / "shards" / f"{letter}.tar").write_bytes(b"x")
        (folder / "shards" / f"{letter}.tar.idx").write_bytes(b"x")
    return folder


def letters(path, split="train") -> str:
    return "".join(os.path.basename(shard)[0] for shard in list_shards(str(path), "cc12m", Data(), split))


@pytest.mark.parametrize("name", ["split.yaml", "split.json"])
def test_each_split_reads_its_own_shards(tmp_path, monkeypatch, name):
    folder = write(tmp_path / "energon", name=name)
    assert (letters(folder), letters(folder, "validation")) == ("abc", "d")
    assert letters(tmp_path) == "abc", "also where the folder lies deeper"
    assert letters(folder / "shards") == "abc", "and where it is entered"
    monkeypatch.chdir(folder)
    assert (letters("."), letters("shards", "validation")) == ("abc", "d")


def test_a_glob_and_a_file_name_their_shards_themselves(tmp_path):
    folder = write(tmp_path / "energon")
    assert letters(folder / "shards" / "*.tar") == "abcde"
    assert letters(folder / "shards" / "{d,e}.tar") == "de"


def test_other_folders_beside_it_are_read_whole(tmp_path):
    write(tmp_path / "energon")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "z.tar").write_bytes(b"x")
    assert letters(tmp_path) == "abcz"


def test_shards_and_samples_are_left_out_as_the_list_says(tmp_path):
    folder = write(tmp_path / "energon", SPLIT | {"exclude": ["shards/b.tar", "shards/a.tar/00{1,2}"]})
    assert letters(folder) == "ac"
    members = [[(f"00{number}.jpg", jpeg()), (f"00{number}.txt", b"a cat")] for number in range(3)]
    write_tar(folder / "shards" / "a.tar", sum(members, []))
    shard = open_shard(str(folder / "shards" / "a.tar"), Source(format="cc12m"), Data())
    assert shard.read(0)[0].key == "000"
    for number in (1, 2):
        with pytest.raises(Rejected, match="list leaves the sample out"):
            shard.read(number)


def test_a_shard_that_is_listed_and_not_there_stays_listed(tmp_path):
    folder = write(tmp_path / "energon")
    (folder / "shards" / "b.tar").unlink()
    assert letters(folder) == "abc"


@pytest.mark.parametrize(
    "told, line",
    [
        ({"split_parts": {"val": ["shards/d.tar"]}}, "split.yaml: no split train among val"),
        ({"split_parts": {"train": [], "val": ["shards/d.tar"]}}, "split.yaml: split train has no shards"),
        ({"split_parts": {"train": "shards/d.tar"}}, "split.yaml: a list of shards is expected"),
        ({"parts": 1}, "split.yaml: no split_parts"),
    ],
)
def test_a_split_that_says_nothing_is_an_error(tmp_path, told, line):
    with pytest.raises(ConfigError, match=line):
        letters(write(tmp_path / "energon", told))


def test_a_remote_folder_leaves_out_what_its_list_says(tmp_path):
    memory = fsspec.filesystem("memory")
    write_tar(tmp_path / "a.tar", [("001.jpg", jpeg(8, 8)), ("001.txt", b"x"), ("002.jpg", jpeg(8, 8))])
    memory.pipe({f"/of/energon/shards/{letter}.tar": (tmp_path / "a.tar").read_bytes() for letter in "abcde"})
    told = SPLIT | {"exclude": ["shards/a.tar/001", "shards/b.tar"]}
    memory.pipe("/of/energon/.nv-meta/split.yaml", yaml.safe_dump(told).encode())
    data = Data(cache_folder=str(tmp_path / "cache"))
    found = {}
    try:
        for folder in ("memory://of/energon", "memory://of"):
            assert (letters(folder), letters(folder, "validation")) == ("ac", "d")
            found[folder] = Source(format="webdataset", path=folder)
        for name, source in found.items():
            for shard in list_shards(source.path, "cc12m", data):
                excluded = open_shard(shard, source, data).excluded
                assert excluded == ({"001"} if shard.endswith("a.tar") else set()), (name, shard)
        # Who names a file may not be allowed to look for others in its folder.
        alone = Source(format="webdataset", path=shard)
        assert open_shard(shard.replace("c.tar", "a.tar"), alone, data).excluded == set()
    finally:
        memory.rm("/of", recursive=True)


def test_a_run_trains_on_no_shard_of_the_validation(tmp_path):
    folder = tmp_path / "energon"
    keys = write_captions(folder / "shards", shards=3, records=6)
    (folder / ".nv-meta").mkdir()
    parts = {"train": ["shards/captions-{0..1}.tar"], "val": ["shards/captions-2.tar"]}
    (folder / ".nv-meta" / "split.yaml").write_text(yaml.safe_dump({"split_parts": parts}))
    job = make_job(folder, tmp_path / "out", epochs=1)
    job.data.sources = [Source(format="cc12m", path=str(folder))]
    job.validation.enable, job.validation.sources = True, [Source(format="cc12m", path=str(folder))]
    seen = {}
    for split in ("train", "validation"):
        loader = Loader(job, Characters(), split=split)
        seen[split] = {sample.key for step in loader for batch in step.batches for sample in batch.samples}
        loader.close()
    assert seen == {"train": set(keys[:12]), "validation": set(keys[12:])}
