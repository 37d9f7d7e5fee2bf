import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from experiments.vlm.cache_folder import cache_folder
from experiments.vlm.world import cache, ensure
from experiments.vlm.world.caption import describe, varied_caption
from experiments.vlm.world.document import draw_document
from experiments.vlm.world.render import render
from experiments.vlm.world.scene import GRIDS, Scene, sees_scene, varied_scene
from experiments.vlm.world.shards import WORLDS, write_shard
from experiments.vlm.world.strips import draw_strip, random_document
from torchtitan.config.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def members(shard: Path) -> dict[str, dict[str, bytes]]:
    """key -> suffix -> content, in the file's order."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            key, suffix = member.name.split(".")
            samples.setdefault(key, {})[suffix] = tar.extractfile(member).read()
    return samples


def run(code: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-c", code]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_captions_are_tar_files_as_cc12m_has_them(drawn):
    [shard] = ensure("captions/heldout", drawn).iterdir()
    samples = members(shard)
    assert len(samples) == WORLDS["captions"].samples["heldout"]
    for key, sample in samples.items():
        image = Image.open(io.BytesIO(sample["jpg"]))
        record = json.loads(sample["json"])
        assert image.format == "JPEG"
        assert (record["key"], record["width"], record["height"]) == (key, image.width, image.height)
        assert record["caption"] == sample["txt"].decode()
        image.load()


def test_captions_come_in_many_sizes_and_all_proportions(drawn):
    [shard] = ensure("captions/heldout", drawn).iterdir()
    sizes = [Image.open(io.BytesIO(sample["jpg"])).size for sample in members(shard).values()]
    ratios = [width / height for width, height in sizes]
    assert min(ratios) < 1 / 5.5
    assert max(ratios) > 5.5
    assert min(min(size) for size in sizes) < 40
    assert 480 < max(max(size) for size in sizes) < 560


def test_sees_keeps_its_pictures_lossless_and_small(drawn):
    [shard] = ensure("sees/heldout", drawn).iterdir()
    samples = members(shard)
    assert len(samples) == WORLDS["sees"].samples["heldout"]
    assert {tuple(sample) for sample in samples.values()} == {("png", "txt")}
    sizes = [Image.open(io.BytesIO(sample["png"])).size for sample in samples.values()]
    assert {(round(height / 32), round(width / 32)) for width, height in sizes} == set(GRIDS)
    assert shard.stat().st_size / len(samples) < 3000


def test_webdataset_reads_the_tar_files(drawn):
    [shard] = ensure("captions/heldout", drawn).iterdir()
    read = list(
        webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False)
        .decode("rgb8")
        .to_tuple("jpg", "txt", "json")
    )
    assert len(read) == WORLDS["captions"].samples["heldout"]
    for pixels, text, record in read:
        assert pixels.shape == (record["height"], record["width"], 3)
        assert text == record["caption"]


def test_interleaved_is_parquet_as_obelics_has_it(drawn):
    [shard] = ensure("interleaved/heldout", drawn).iterdir()
    documents = pq.read_table(shard).to_pylist()
    assert len(documents) == WORLDS["interleaved"].samples["heldout"]
    for document in documents:
        texts, images, metadata = document["texts"], document["images"], json.loads(document["metadata"])
        assert len(texts) == len(images) == len(metadata)
        assert json.loads(document["general_metadata"])["url"].startswith("embedded:")
        for text, image, record in zip(texts, images, metadata, strict=True):
            assert (text is None) == (image is not None) == (record is not None)
            if image is not None:
                picture = Image.open(io.BytesIO(image["bytes"]))
                assert picture.format == {".jpg": "JPEG", ".png": "PNG"}[Path(image["path"]).suffix]
                assert picture.size == (record["original_width"], record["original_height"])


def test_some_documents_hold_many_pictures_some_none(drawn):
    documents = pq.read_table(next(ensure("interleaved/heldout", drawn).iterdir())).to_pylist()
    pictures = [sum(image is not None for image in document["images"]) for document in documents]
    assert min(pictures) == 0
    assert max(pictures) > 8
    assert sum(number == 0 for number in pictures) > 0.1 * len(pictures)


def test_a_shard_is_a_function_of_seed_and_number(tmp_path):
    code = "import pathlib; from experiments.vlm.world.shards import write_shard\n"
    code += "write_shard('captions/heldout', 7, pathlib.Path({!r}), 0)"
    for hash_seed in ("1", "2"):
        (tmp_path / hash_seed).mkdir()
        assert run(code.format(str(tmp_path / hash_seed)), PYTHONHASHSEED=hash_seed).wait() == 0
    write_shard("captions/heldout", 8, tmp_path, 0)
    digests = [
        hashlib.sha256(path.read_bytes()).digest() for path in sorted(tmp_path.rglob("heldout-00000.tar"))
    ]
    assert len(digests) == 3
    assert len(set(digests)) == 2


def test_one_process_draws_and_the_others_wait(tmp_path):
    code = "from torchtitan.tools.logging import init_logger; init_logger()\n"
    code += "from experiments.vlm.world import ensure\n"
    code += "print(ensure('sees/heldout', {!r}))"
    processes = [run(code.format(str(tmp_path))) for _ in range(3)]
    outputs = [process.communicate()[0] for process in processes]
    folder = outputs[0].splitlines()[-1]
    assert [output.splitlines()[-1] for output in outputs] == [folder] * 3
    assert sum("drawing embedded:sees/heldout" in output for output in outputs) == 1
    assert [path.name for path in Path(folder).iterdir()] == ["heldout-00000.tar"]


def test_a_second_call_draws_nothing(drawn):
    first = ensure("sees/heldout", drawn)
    before = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    assert ensure("sees/heldout", drawn) == first
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == before


def test_what_a_killed_run_left_is_not_taken_for_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "run_workers", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ensure("sees/heldout", str(tmp_path))
    [left_over] = tmp_path.glob("embedded/*/sees/.unfinished-heldout-*")
    monkeypatch.undo()
    folder = ensure("sees/heldout", str(tmp_path))
    assert len(list(folder.iterdir())) == 1
    assert not left_over.exists()


def test_a_worker_that_fails_is_told_with_its_reason(tmp_path):
    with pytest.raises(RuntimeError, match="drawing sees/heldout failed:(.|\n)*IndexError"):
        cache.run_workers(["sees/heldout", "0", str(tmp_path)], 2, tmp_path)  # there is only one shard


def test_another_seed_draws_beside_the_old_data(drawn):
    assert ensure("sees/heldout", drawn, seed=1).parts[-3] == f"{cache.VERSION}-seed1"
    assert ensure("sees/heldout", drawn, seed=0).parts[-3] == f"{cache.VERSION}-seed0"


def test_another_drawing_has_another_version():
    """Otherwise those who have drawn before would go on with the old data."""
    rng, drawn = random.Random(0), []
    for _ in range(50):
        scenes = [sees_scene(rng, False), varied_scene(rng, True, longest=512)]
        drawn += [*scenes, describe(scenes[0]), varied_caption(scenes[1], rng), *draw_document(rng, False)]
    digest = hashlib.sha256("".join(map(repr, drawn)).encode()).hexdigest()[:12]
    pixels = [np.asarray(render(scene)).mean() for scene in drawn if isinstance(scene, Scene)]
    strips = [random_document(rng, bool(i % 2)) for i in range(50)]
    digest += hashlib.sha256(repr(strips).encode()).hexdigest()[:4]
    grey = [np.asarray(draw_strip(pictures[asked], rng, True)).mean() for pictures, asked in strips]
    version = cache.VERSION, digest, round(float(np.mean(pixels)), 1), round(float(np.mean(grey)), 1)
    assert version == ("5b20e8f41c", "c097340e2d6d9442", 32.7, 186.7), (
        "data is drawn differently: give it another VERSION, and state all four here"
    )


def test_the_default_cache_honours_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("") == tmp_path / "torchtitan-vlm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("") == Path.home() / ".cache/torchtitan-vlm"
    assert cache_folder("~/here") == Path.home() / "here"


@pytest.mark.parametrize("name", ["sees", "sees/test", "dreams/train", ""])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ConfigError, match=f"embedded:{name} does not exist; there are captions/train, "):
        ensure(name)


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="data.cache_folder"):
        ensure("sees/heldout", str(tmp_path / "file"))


def test_workers_import_no_torch():
    process = run("import sys, experiments.vlm.world.__main__; print('torch' in sys.modules)")
    assert process.communicate()[0] == "False\n"


def test_a_disk_that_is_full_while_a_world_is_drawn_is_told_in_one_line(monkeypatch, tmp_path):
    fail = [sys.executable, "-S", "-c", "raise OSError(28, 'No space left on device')"]
    start = subprocess.Popen
    monkeypatch.setattr(cache.subprocess, "Popen", lambda command, **options: start(fail, **options))
    with pytest.raises(
        ConfigError, match=r"cannot draw embedded:captions/heldout .*No space left.*cache_folder$"
    ):
        ensure("captions/heldout", str(tmp_path))
