"""What is left of damaged tars: samples that this loader, Python's tarfile and webdataset deliver unharmed.

    python -m tests.reference.damaged_tars      prints the table

Every damage is done to a tar of 40 captioned images, which then lies there as it is, as .tar.gz and as
.tar.zst; "packed" damages are done to the packed file, of two such tars. A sample counts where its image and
its text are those that were written, both of the same sample. tarfile reads with `ignore_zeros`, the most
that it can do: it then passes over what is no header, 512 bytes at a time. webdataset is told to go on after
errors.
"""

import gzip
import io
import tarfile
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
from webdataset.tariterators import group_by_keys, tar_file_expander

from experiments.vlm.config import Data, Source
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.sources.shards import open_shard
from tests.samples import jpeg, write_tar

Pair = tuple[bytes, bytes]  # image, text
SAMPLES = 40
PACKINGS = ("", ".gz", ".zst")


@cache
def pairs(seed: int = 0) -> tuple[Pair, ...]:
    random = np.random.default_rng(seed)
    return tuple(
        (
            jpeg(*(int(side) for side in random.integers(30, 90, 2)), seed=seed * 1000 + number),
            f"sample {number} of {seed}, {'x' * int(random.integers(0, 900))}".encode(),
        )
        for number in range(SAMPLES)
    )


def members(seed: int = 0) -> list[tuple[str, bytes]]:
    return [
        (f"folder/{number:04d}.{kind}", data)
        for number, pair in enumerate(pairs(seed))
        for kind, data in zip(("jpg", "txt"), pair, strict=True)
    ]


@cache
def tar(seed: int = 0, format: int = tarfile.GNU_FORMAT) -> bytes:
    with tempfile.NamedTemporaryFile() as file:
        write_tar(file.name, members(seed), format)
        return Path(file.name).read_bytes()


def header(number: int, kind: str = "jpg", data: bytes = b"") -> int:
    """Where the header of a member begins."""
    return (data or tar()).index(f"folder/{number:04d}.{kind}\0".encode())


def overwritten(data: bytes, start: int, new: bytes) -> bytes:
    return data[:start] + new + data[start + len(new) :]


def junk(count: int, seed: int = 7) -> bytes:
    return np.random.default_rng(seed).bytes(count)


def old(data: bytes) -> bytes:
    """As tars were before 1988: no "ustar"."""
    blocks = bytearray(data)
    for place in range(0, len(data), 512):
        if blocks[place + 257 : place + 262] == b"ustar":
            blocks[place + 257 : place + 512] = bytes(255)
            blocks[place + 148 : place + 156] = b" " * 8
            blocks[place + 148 : place + 156] = b"%06o\0 " % sum(blocks[place : place + 512])
    return bytes(blocks)


def without(data: bytes, start: int, count: int) -> bytes:
    return data[:start] + data[start + count :]


def twice_in_one() -> bytes:
    with tempfile.NamedTemporaryFile() as file:
        write_tar(file.name, members(0) + members(1))
        return Path(file.name).read_bytes()


def flipped(data: bytes, *places: int) -> bytes:
    for place in places:
        data = overwritten(data, place, bytes([data[place] ^ 0x55]))
    return data


DAMAGES: dict[str, Callable[[], bytes]] = {
    "none": tar,
    "header: a byte of the name": lambda: flipped(tar(), header(20) + 3),
    "header: a byte of the size": lambda: flipped(tar(), header(20) + 130),
    "header: a byte of the checksum": lambda: flipped(tar(), header(20, "txt") + 149),
    "header: the first one": lambda: flipped(tar(), 5),
    "header: five of them": lambda: flipped(tar(), *(header(number) + 9 for number in range(3, 40, 8))),
    "header: the last one": lambda: flipped(tar(), header(39, "txt") + 9),
    "header: of an old tar": lambda: flipped(old(tar()), header(20) + 3),
    "header: of a pax tar": lambda: flipped(tar(0, tarfile.PAX_FORMAT), header(20) + 3),
    "junk over 3,000 bytes": lambda: overwritten(tar(), header(20) + 100, junk(3000)),
    "junk over the beginning": lambda: overwritten(tar(), 0, junk(5000)),
    "junk between members, 1,024 bytes": lambda: tar()[: header(20)] + junk(1024) + tar()[header(20) :],
    "junk between members, 1,000 bytes": lambda: tar()[: header(20)] + junk(1000) + tar()[header(20) :],
    "junk inside an image, 333 bytes": lambda: (
        tar()[: header(20) + 900] + junk(333) + tar()[header(20) + 900 :]
    ),
    "junk at the end": lambda: tar() + junk(700),
    "zeros over 4,096 bytes": lambda: overwritten(tar(), header(20) - 700, bytes(4096)),
    "zeros over whole members": lambda: overwritten(tar(), header(20), bytes(header(23) - header(20))),
    "zeros over the beginning": lambda: overwritten(tar(), 0, bytes(4096)),
    "zeros over the end": lambda: overwritten(tar(), header(30), bytes(len(tar()) - header(30))),
    "zeros in two places": lambda: overwritten(
        overwritten(tar(), header(10) + 50, bytes(2000)), header(30) + 50, bytes(2000)
    ),
    "zeros between members": lambda: tar()[: header(20)] + bytes(1536) + tar()[header(20) :],
    "cut in an image": lambda: tar()[: header(20) + 800],
    "cut in a header": lambda: tar()[: header(20) + 200],
    "cut between members": lambda: tar()[: header(20)],
    "bytes missing: 700 of an image": lambda: without(tar(), header(20) + 600, 700),
    "bytes missing: 512 of an image": lambda: without(tar(), header(20) + 600, 512),
    "bytes missing: at the end": lambda: without(tar(), header(38, "txt") + 512, 200),
    "joined": lambda: tar() + tar(1),
    "joined, the first one cut": lambda: tar()[: header(20) + 800] + tar(1),
    "joined, the first one damaged": lambda: flipped(tar(), header(20) + 3) + tar(1),
    "joined without zeros between": lambda: tar().rstrip(b"\0") + tar(1),
    "duplicate keys": twice_in_one,
    "duplicate keys, a header damaged": lambda: flipped(twice_in_one(), header(20, "txt") + 3),
    "duplicate keys, another damaged": lambda: flipped(twice_in_one(), header(20) + 3),
}
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "packed: a byte": lambda data: flipped(data, len(data) // 2),
    "packed: zeros over 4,096 bytes": lambda data: overwritten(data, len(data) // 2, bytes(4096)),
    "packed: cut": lambda data: data[: len(data) * 2 // 3],
    "packed: junk at the end": lambda data: data + junk(100),
    "packed: joined, the first one cut": lambda data: data[: len(data) // 2] + data,
    "packed: joined, the second one cut": lambda data: data + data[: len(data) // 2],
    "packed: joined, the second one damaged": lambda data: (
        data + overwritten(data, len(data) // 2, bytes(999)) + data
    ),
}


def pack(data: bytes, packing: str) -> bytes:
    if packing == ".gz":
        return gzip.compress(data, 1)
    if packing == ".zst":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as file:
            file.write(data)
        return sink.getvalue().to_pybytes()
    return data


def write(folder: Path, damage: str, packing: str) -> Path:
    data = DAMAGES[damage]() if damage in DAMAGES else PACKED[damage](pack(tar() + tar(1), packing))
    path = folder / f"x.tar{packing}"
    path.write_bytes(data if damage in PACKED else pack(data, packing))
    return path


def ours(path: Path) -> tuple[list[Pair], list[str]]:
    """What is delivered, and what is told: of the shard, and of its samples."""
    try:
        shard = open_shard(str(path), Source(format="cc12m"), Data(cache_folder=str(path.parent / "cache")))
    except Rejected as rejected:
        return [], [rejected.reason]
    found, told = [], [reject.reason for reject in shard.rejects]
    for record in range(len(shard)):
        try:
            image, text = shard.read(record)[0].parts
            found.append((shard.load(image), text.text.encode()))
        except Rejected as rejected:
            told.append(rejected.reason)
    shard.close()
    return found, told


def stream(path: Path) -> io.BufferedIOBase:
    """A file of zstd as pyarrow unpacks it, since Python 3.11 does not."""
    if path.suffix != ".zst":
        return path.open("rb")
    return io.BufferedReader(pa.CompressedInputStream(str(path), "zstd"), 512)


def of_tarfile(path: Path) -> list[Pair]:
    found: list[tuple[str, bytes]] = []
    mode = "r|" if path.suffix == ".zst" else "r:gz" if path.suffix == ".gz" else "r:"
    try:
        with stream(path) as source, tarfile.open(fileobj=source, mode=mode, ignore_zeros=True) as file:
            for info in file:
                if info.isreg():
                    found.append((info.name, file.extractfile(info).read()))
    except Exception:
        pass
    return list(grouped({"fname": name, "data": data, "__url__": ""} for name, data in found))


def of_webdataset(path: Path) -> list[Pair]:
    with stream(path) as source:
        opened = [{"url": str(path), "stream": source}]
        return list(grouped(tar_file_expander(opened, handler=lambda error: True)))


def grouped(files: Iterator[dict]) -> Iterator[Pair]:
    for sample in group_by_keys(files, handler=lambda error: True):
        if {"jpg", "txt"} <= sample.keys():
            yield sample["jpg"], sample["txt"]


def unharmed(found: list[Pair]) -> int:
    """Samples as they were written; what was written three times may come three times."""
    return sum(pair in pairs(0) + pairs(1) for pair in found)


def crossed(found: list[Pair]) -> int:
    """Images with the text of another sample."""
    images = {image for image, _ in pairs(0) + pairs(1)}
    texts = {text for _, text in pairs(0) + pairs(1)}
    wrong = set(found) - set(pairs(0) + pairs(1))
    return sum(image in images and text in texts for image, text in wrong)


def table(folder: Path) -> Iterator[tuple[str, int, int, int, list[str]]]:
    """(what, delivered by ours, by tarfile, by webdataset, what is told) of every damage."""
    for damage in (*DAMAGES, *PACKED):
        for packing in PACKINGS[1:] if damage in PACKED else PACKINGS:
            place = Path(tempfile.mkdtemp(dir=folder))
            path = write(place, damage, packing)
            found, told = ours(path)
            counts = (unharmed(found), unharmed(of_tarfile(path)), unharmed(of_webdataset(path)))
            yield f"{damage} ({packing or 'plain'})", *counts, told


def main() -> None:
    warnings.simplefilter("ignore")
    print(f"{'damage':50} {'ours':>5} {'tarfile':>8} {'webdataset':>11}  told")
    with tempfile.TemporaryDirectory() as folder:
        for what, ours_, tarfile_, webdataset_, told in table(Path(folder)):
            counted = ", ".join(f"{reason} {count}" for reason, count in Counter(told).items())
            print(f"{what:50} {ours_:5} {tarfile_:8} {webdataset_:11}  {counted}")


if __name__ == "__main__":
    main()
