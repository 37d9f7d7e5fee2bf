"""Which shards a source has, remote and compressed ones, and those that are not there."""

import bz2
import errno
import gzip
import io
import json
import os
import zipfile

import fsspec
import pyarrow as pa
import pytest

from experiments.vlm.check import check_path
from experiments.vlm.config import Data, Source
from experiments.vlm.data.document import Text
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.sources import shards
from experiments.vlm.data.sources.shards import list_shards, open_shard
from experiments.vlm.data.storage import file_cache
from experiments.vlm.data.storage.outages import Away
from tests.samples import jpeg, write_tar
from torchtitan.config.errors import ConfigError, StorageError


@pytest.fixture
def data(tmp_path):
    return Data(cache_folder=str(tmp_path / "cache"))


def names(tmp_path, pattern, data, format="cc12m"):
    return [os.path.relpath(path, tmp_path) for path in list_shards(str(tmp_path / pattern), format, data)]


def touch(tmp_path, *paths):
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"x")


def test_files_ranges_globs_and_folders(tmp_path, data):
    touch(
        tmp_path,
        *(f"a-{n:04}.tar" for n in (7, 8, 9, 10)),
        "b/c/x.tar",
        "b/y.tar.gz",
        "b/z.TGZ",
        "b/note.txt",
        "b/.hidden.tar",
    )
    assert names(tmp_path, "a-0008.tar", data) == ["a-0008.tar"]
    assert names(tmp_path, "a-{0008..0010}.tar", data) == ["a-0008.tar", "a-0009.tar", "a-0010.tar"]
    assert names(tmp_path, "{b,.}/*.tar*", data) == [
        "a-0007.tar",
        "a-0008.tar",
        "a-0009.tar",
        "a-0010.tar",
        "b/y.tar.gz",
    ]
    assert names(tmp_path, "b/**/*.tar", data) == ["b/c/x.tar"]
    assert names(tmp_path, "b", data) == ["b/c/x.tar", "b/y.tar.gz", "b/z.TGZ"]


def test_a_missing_shard_of_a_range_is_rejected_when_opened(tmp_path, data):
    touch(tmp_path, "a-0.tar")
    listed = list_shards(str(tmp_path / "a-{0..1}.tar"), "cc12m", data)
    assert len(listed) == 2
    with pytest.raises(Rejected) as error:
        open_shard(listed[1], Source(format="cc12m"), data)
    assert error.value.reason == "shard_missing"


def forbid(monkeypatch, folder):
    """As for somebody who may not read it; tests may run as root, who may read everything."""
    true_scandir = os.scandir

    def scandir(path="."):
        if os.path.abspath(path) == str(folder):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return true_scandir(path)

    monkeypatch.setattr(os, "scandir", scandir)


@pytest.mark.parametrize("pattern", ["data", "data/*.tar", "data/a-{0..1}*.tar", "data/**/*.tar"])
def test_a_folder_that_may_not_be_read_is_said_to_be_so(tmp_path, data, monkeypatch, pattern):
    touch(tmp_path, "data/a-0.tar")
    forbid(monkeypatch, tmp_path / "data")
    for tell in (
        lambda path: list_shards(path, "cc12m", data),
        lambda path: check_path(path, "data.sources[0].path"),
    ):
        with pytest.raises(ConfigError, match=f"permission denied: {tmp_path / 'data'}"):
            tell(str(tmp_path / pattern))


def test_a_folder_below_that_may_not_be_read_is_not_passed_over(tmp_path, data, monkeypatch):
    touch(tmp_path, "data/a/0.tar", "data/b/1.tar")
    forbid(monkeypatch, tmp_path / "data" / "b")
    with pytest.raises(
        ConfigError, match=f"{tmp_path / 'data'}: permission denied: {tmp_path / 'data' / 'b'}"
    ):
        list_shards(str(tmp_path / "data"), "cc12m", data)


@pytest.mark.parametrize(
    "path", ["hf://datasets/x/y", "hf://datasets/x/y/*.parquet", "hf://datasets/x/y/data/0.parquet"]
)
def test_a_hub_that_cannot_be_reached_is_one_line(data, monkeypatch, path):
    import huggingface_hub as hub

    system = hub.HfFileSystem(endpoint="http://127.0.0.1:1", skip_instance_cache=True)  # nobody listens there
    monkeypatch.setattr(shards, "file_system", lambda path: (system, path.removeprefix("hf://")))
    data.storage_timeout_s = 0
    with pytest.raises(StorageError) as error:
        list_shards(path, "obelics", data)
    message = str(error.value)
    assert "the Hugging Face hub could not be reached (" in message and "\n" not in message
    assert "HF_ENDPOINT" in message and "HF_TOKEN" in message


def test_a_folder_that_datasets_saved_has_no_shards_of_settings(tmp_path, data):
    touch(tmp_path, "saved/data-00000-of-00001.arrow", "saved/dataset_info.json", "saved/state.json")
    assert names(tmp_path, "saved", data, "llava") == ["saved/data-00000-of-00001.arrow"]


def test_beside_tars_other_files_are_notes_about_them(tmp_path, data):
    touch(
        tmp_path,
        "made/00000.tar",
        "made/report.json",
        "made/rejects/00000.jsonl",
        "made/.prepare/done/00000.json",
    )
    assert names(tmp_path, "made", data, "llava") == ["made/00000.tar"]
    touch(tmp_path, "plain/a.jsonl", "plain/.cache/b.jsonl", "plain/c.parquet")
    assert names(tmp_path, "plain", data, "obelics") == ["plain/a.jsonl", "plain/c.parquet"]


@pytest.mark.parametrize("pattern", ["nothing*.tar", "empty", "pipe.tar"])
def test_nothing_there_is_told_with_the_path(tmp_path, data, pattern):
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.tar")  # to open it would take for ever
    with pytest.raises(ConfigError, match=pattern.rstrip("*.tar")):
        list_shards(str(tmp_path / pattern), "cc12m", data)


def test_of_a_folder_of_another_format_the_one_that_would_fit_is_told(tmp_path, data):
    touch(tmp_path, "data/a.parquet", "data/b.parquet")
    with pytest.raises(
        ConfigError, match=r"but 2 files .parquet, which the formats llava, messages, finevision"
    ):
        list_shards(str(tmp_path / "data"), "cc12m", data)
    (tmp_path / "data" / "0.jsonl").write_text('{"text_list": ["A heron."], "image_info": []}')
    touch(tmp_path, "data/1.jsonl", "data/2.jsonl")
    with pytest.raises(ConfigError, match=r"but 3 files .jsonl: its records are of format mmc4, not cc12m"):
        list_shards(str(tmp_path / "data"), "cc12m", data)


def test_embedded_data_is_drawn_into_the_cache_folder(tmp_path, data, monkeypatch):
    touch(tmp_path, "drawn/0.tar")
    asked = []
    monkeypatch.setattr(
        shards, "ensure", lambda name, folder: asked.append((name, folder)) or tmp_path / "drawn"
    )
    assert list_shards("embedded:captions/train", "cc12m", data) == [str(tmp_path / "drawn/0.tar")]
    assert asked == [("captions/train", data.cache_folder)]


def lines(count):
    return "".join(
        json.dumps({"text": f"line {n} {os.urandom(20).hex()}"}) + "\n" for n in range(count)
    ).encode()


def zstd(content, tmp_path):
    with pa.CompressedOutputStream(str(tmp_path / "made.zst"), "zstd") as file:
        file.write(content)
    return (tmp_path / "made.zst").read_bytes()


@pytest.mark.parametrize("suffix", ["gz", "bz2", "zst"])
def test_a_cut_compressed_shard_gives_what_came_before(tmp_path, data, suffix):
    content = lines(20_000)
    compress = {"gz": gzip.compress, "bz2": bz2.compress, "zst": lambda content: zstd(content, tmp_path)}[
        suffix
    ]
    whole = compress(content)
    for name, size in (("whole", len(whole)), ("cut", len(whole) * 9 // 10)):
        (tmp_path / f"{name}.jsonl.{suffix}").write_bytes(whole[:size])
    shard = open_shard(str(tmp_path / f"whole.jsonl.{suffix}"), Source(format="text"), data)
    assert len(shard) == 20_000 and shard.read(19_999)[0].parts[0].text.startswith("line 19999")
    shard = open_shard(str(tmp_path / f"cut.jsonl.{suffix}"), Source(format="text"), data)
    assert 14_000 < len(shard) < 20_000  # bz2 works in blocks of 900 kB
    assert shard.read(13_999)[0].parts[0].text.startswith("line 13999")


def zipped(path, **files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in files.items():
            packed.writestr(f"{name}.jsonl", content)
    return path


def test_a_zip_of_one_file_is_that_file(tmp_path, data):
    (tmp_path / "in").mkdir()
    path = zipped(tmp_path / "in" / "docs_no_face_shard_0_v3.jsonl.zip", a=lines(3))
    (found,) = list_shards(str(path.parent), "text", data)
    assert len(open_shard(found, Source(format="text"), data)) == 3


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst", ".zip"])
def test_a_packed_file_without_bytes_is_no_shard_without_records(tmp_path, data, suffix):
    (tmp_path / f"x.jsonl{suffix}").touch()
    with pytest.raises(Rejected, match="it has no bytes"):
        open_shard(str(tmp_path / f"x.jsonl{suffix}"), Source(format="text"), data)


def test_a_zip_of_several_files_or_cut_short_is_told(tmp_path, data):
    paths = [zipped(tmp_path / "several.jsonl.zip", a=lines(1), b=lines(2)), tmp_path / "cut.jsonl.zip"]
    paths[1].write_bytes(paths[0].read_bytes()[:-30])
    for path, why in zip(paths, ("it holds 2 files, not one", "not a zip file"), strict=True):
        with pytest.raises(Rejected, match=why):
            open_shard(str(path), Source(format="text"), data)


def test_a_zip_with_a_damaged_byte_gives_what_came_before(tmp_path, data):
    path = zipped(tmp_path / "x.jsonl.zip", a=lines(50_000))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    shard = open_shard(str(path), Source(format="text"), data)
    assert len(shard) > 10_000 and shard.read(9_999)[0].parts[0].text.startswith("line 9999")
    assert "cannot be unpacked to its end" in shard.rejects[0].detail


def test_a_compressed_tar(tmp_path, data):
    tar = write_tar(tmp_path / "x.tar", [("0.jpg", jpeg()), ("0.txt", b"A cat.")])
    (tmp_path / "x.tgz").write_bytes(gzip.compress(tar.read_bytes()))
    shard = open_shard(str(tmp_path / "x.tgz"), Source(format="cc12m"), data)
    assert shard.load(shard.read(0)[0].parts[0]) == jpeg()


@pytest.mark.parametrize("name", ["x.tar", "x.tgz", "x.tar.gz", "x.tar.zst", "x.tar.bz2"])
@pytest.mark.parametrize("packing", ["plain", "gz", "zst", "bz2"])
@pytest.mark.parametrize("place", ["local", "remote"])
def test_what_a_tar_holds_counts_and_not_its_name(tmp_path, data, name, packing, place):
    whole = write_tar(tmp_path / "made.tar", [("0.jpg", jpeg()), ("0.txt", b"A cat.")]).read_bytes()
    pack = {
        "plain": bytes,
        "gz": gzip.compress,
        "bz2": bz2.compress,
        "zst": lambda content: zstd(content, tmp_path),
    }
    (tmp_path / name).write_bytes(pack[packing](whole))
    path = str(tmp_path / name)
    shard = open_shard(path if place == "local" else f"file://{path}", Source(format="cc12m"), data)
    assert shard.load(shard.read(0)[0].parts[0]) == jpeg() and shard.rejects == []


def test_records_that_are_not_packed_as_their_name_says_are_read(tmp_path, data):
    (tmp_path / "x.jsonl.gz").write_bytes(lines(3))
    assert len(open_shard(str(tmp_path / "x.jsonl.gz"), Source(format="text"), data)) == 3


def test_a_compressed_shard_that_changed_is_unpacked_anew(tmp_path, data):
    path = tmp_path / "x.jsonl.gz"
    for count in (3, 4):
        path.write_bytes(gzip.compress(lines(count)))
        assert len(open_shard(str(path), Source(format="text"), data)) == count


@pytest.fixture
def remote():
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def test_remote_shards_are_listed_and_copied_once(tmp_path, data, remote):
    for name in ("a/0.jsonl", "a/1.jsonl.gz", "a/note.md", "a/b/2.parquet"):
        remote.pipe(f"/{name}", gzip.compress(lines(3)) if name.endswith("gz") else lines(3))
    assert list_shards("memory://a", "text", data) == [
        "memory:///a/0.jsonl",
        "memory:///a/1.jsonl.gz",
        "memory:///a/b/2.parquet",
    ]
    assert list_shards("memory://a/*.jsonl", "text", data) == ["memory:///a/0.jsonl"]
    assert list_shards("memory://a/{0,7}.jsonl", "text", data) == ["memory://a/0.jsonl", "memory://a/7.jsonl"]
    for path in ("memory:///a/0.jsonl", "memory:///a/1.jsonl.gz"):
        assert len(open_shard(path, Source(format="text"), data)) == 3
    remote.store.clear()
    assert len(open_shard("memory:///a/0.jsonl", Source(format="text"), data)) == 3
    with pytest.raises(Rejected) as error:
        open_shard("memory:///a/7.jsonl", Source(format="text"), data)
    assert error.value.reason == "shard_missing"


def test_images_of_remote_records_lie_beside_them(tmp_path, data, remote):
    remote.pipe("/a/0.jsonl", json.dumps({"texts": [None, None], "images": ["i/1.jpg", "../2.jpg"]}).encode())
    remote.pipe("/a/i/1.jpg", jpeg())
    remote.pipe("/2.jpg", jpeg())
    shard = open_shard("memory://a/0.jsonl", Source(format="obelics"), data)
    document, lost = shard.read(0)
    assert shard.load(document.parts[0]) == jpeg()
    assert [reject.reason for reject in lost] == ["image_outside"]


@pytest.mark.parametrize("wrong", [-1, 1])
def test_a_copy_of_another_length_than_the_store_says_is_not_used(tmp_path, data, remote, monkeypatch, wrong):
    remote.pipe("/a.jsonl", lines(3))
    true_info = remote.info

    def info(path, **options):
        found = true_info(path, **options)
        return found | {"size": found["size"] + wrong}

    with monkeypatch.context() as patched:
        patched.setattr(type(remote), "info", lambda self, path, **options: info(path, **options))
        with pytest.raises(Away, match="bytes came"):
            open_shard("memory:///a.jsonl", Source(format="text"), data)
    assert len(open_shard("memory:///a.jsonl", Source(format="text"), data)) == 3


def test_a_full_disk_while_unpacking_is_no_cut_shard(tmp_path, data, monkeypatch):
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines(2000)))

    def write(self, block):
        if self.tell():
            raise OSError(errno.ENOSPC, "No space left on device")
        return io.FileIO.write(self, block)

    monkeypatch.setattr(file_cache._Growing, "write", write)
    with pytest.raises(OSError, match="No space left"):
        open_shard(str(tmp_path / "x.jsonl.gz"), Source(format="text"), data)


class Hub:
    """As much of a file system as listing needs."""

    def __init__(self, files):
        self.files = files

    def info(self, path):
        return {"type": "directory"}

    def find(self, path):
        return self.files

    def unstrip_protocol(self, path):
        return "hf://" + path


def test_of_a_data_set_of_the_hub_the_train_split_is_taken(data, monkeypatch):
    files = [f"datasets/M/D/data/{split}-0.parquet" for split in ("test", "train", "validation")]
    monkeypatch.setattr(shards, "file_system", lambda path: (Hub(files), path))
    assert list_shards("hf://datasets/M/D", "obelics", data) == ["hf://datasets/M/D/data/train-0.parquet"]
    assert len(list_shards("hf://datasets/M/D/data", "obelics", data)) == 3
    for others in (files[:1], ["datasets/M/D/animals/0.parquet", "datasets/M/D/constraints/0.parquet"]):
        monkeypatch.setattr(shards, "file_system", lambda path, others=others: (Hub(others), path))
        assert list_shards("hf://datasets/M/D", "obelics", data) == [f"hf://{file}" for file in others]


def test_text_is_not_a_place_for_images(tmp_path, data):
    (tmp_path / "x.jsonl").write_bytes(lines(1))
    (part,) = open_shard(str(tmp_path / "x.jsonl"), Source(format="text"), data).read(0)[0].parts
    assert isinstance(part, Text)
