"""Tars of samples: as Python's tarfile writes them, and as webdataset reads them."""

import io
import tarfile

import webdataset

from experiments.vlm.tar_file import write_samples

SAMPLES = [{"0.jpg": b"one", "0.txt": b"", "0.json": b"{}"}, {"a-1.json": b"x" * 700, "a-1.0.jpg": b"\xff"}]


def test_the_bytes_are_those_of_plain_tarfile_with_neither_owner_nor_time():
    ours, plain = io.BytesIO(), io.BytesIO()
    write_samples(ours, SAMPLES)
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in (member for sample in SAMPLES for member in sample.items()):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert ours.getvalue() == plain.getvalue()


def test_webdataset_reads_the_samples_back(tmp_path):
    with (tmp_path / "x.tar").open("wb") as file:
        write_samples(file, SAMPLES)
    read = list(webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False, empty_check=False))
    assert [
        {f"{sample['__key__']}.{name}": sample[name] for name in sample if name[0] != "_"} for sample in read
    ] == SAMPLES
