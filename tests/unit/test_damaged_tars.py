"""Damaged tars lose only what is damaged: see tests/reference/damaged_tars.py for the table."""

import io
import random
import tarfile
import warnings

import pytest

from experiments.vlm.data.formats.tar_index import TarIndex
from tests.reference import damaged_tars as reference

CASES = [(damage, packing) for damage in reference.DAMAGES for packing in ("", ".gz")]
CASES += [(damage, packing) for damage in reference.PACKED for packing in (".gz", ".zst")]
UNHARMED = ("none", "joined", "duplicate keys")
UNSEEN = [("packed: a byte", ".zst")]  # pyarrow writes no checksum: a byte of an image is another one


@pytest.mark.parametrize("damage, packing", CASES)
def test_no_sample_is_lost_that_another_reader_delivers_and_what_is_lost_is_told(tmp_path, damage, packing):
    path = reference.write(tmp_path, damage, packing)
    found, told = reference.ours(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        others = [reference.unharmed(read(path)) for read in (reference.of_tarfile, reference.of_webdataset)]
    assert reference.unharmed(found) >= max(others)
    assert reference.crossed(found) == 0, "no image gets the text of another sample"
    assert bool(told) == (damage not in UNHARMED) or (damage, packing) in UNSEEN


@pytest.mark.parametrize(
    "damage, lost",
    [
        ("header: a byte of the size", 1),
        ("junk between members, 1,000 bytes", 0),
        ("junk inside an image, 333 bytes", 1),
        ("zeros between members", 0),
        ("bytes missing: 700 of an image", 1),
        ("joined without zeros between", 0),
        ("header: five of them", 5),
    ],
)
def test_only_what_is_damaged_is_lost(tmp_path, damage, lost):
    found, _ = reference.ours(reference.write(tmp_path, damage, ""))
    samples = 2 * reference.SAMPLES if "joined" in damage else reference.SAMPLES
    assert reference.unharmed(found) == samples - lost


def damaged(data: bytes, chance: random.Random) -> bytes:
    """With one damage of any kind, anywhere."""
    place, size = chance.randrange(len(data)), chance.choice([1, 100, 512, 700, 1024, 4096])
    junk = chance.choice([chance.randbytes(size), bytes(size)])
    return chance.choice(
        [
            reference.flipped(data, place),
            reference.overwritten(data, place, junk)[: len(data)],
            reference.overwritten(data, place // 512 * 512, junk)[: len(data)],
            data[:place] + junk + data[place:],
            reference.without(data, place, size),
            data[: max(1, place)],
            data[:place] + data[max(0, place - size) :],
        ]
    )


def drawn(chance: random.Random) -> tuple[bytes, list[reference.Pair]]:
    """A tar of small samples, in which names may come again, and long ones."""
    texts = [f"{number} {chance.random()} ".encode() for number in range(chance.randrange(2, 12))]
    pairs = [
        (text + bytes(chance.choice([0, 480, 600, 3000])), text * chance.choice([1, 30])) for text in texts
    ]
    names, folder = chance.choice([3, 99]), "d" * chance.choice([1, 120])
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=chance.choice([0, 1, 2])) as tar:
        for number, pair in enumerate(pairs):
            for kind, content in zip(("jpg", "txt"), pair, strict=True):
                info = tarfile.TarInfo(f"{folder}/{number % names}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return file.getvalue(), pairs


@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_damage_tarfile_delivers_no_more_and_nothing_goes_without_a_word(tmp_path, seed):
    chance, path = random.Random(seed), tmp_path / "x.tar"
    for _ in range(60):
        parts = [drawn(chance) for _ in range(chance.choice([1, 1, 2]))]
        data, written = b"".join(part for part, _ in parts), [pair for _, of in parts for pair in of]
        for _ in range(chance.choice([1, 1, 3])):
            data = damaged(data, chance)
        path.write_bytes(data)
        with path.open("rb") as file:
            index = TarIndex(file.fileno())
            found = [
                {member.extension: data[member.offset :][: member.size] for member in index.sample(number)}
                for number in range(len(index))
            ]
        pairs = [(sample["jpg"], sample["txt"]) for sample in found if len(sample) == 2]
        assert set(written) & set(pairs) >= set(written) & set(reference.of_tarfile(path))
        assert index.damage or len(pairs) < len(found) or len(pairs) == len(written), "what is lost is told"
        images, texts = map(set, zip(*written, strict=True))
        assert not [(a, b) for a, b in set(pairs) - set(written) if a in images and b in texts]
