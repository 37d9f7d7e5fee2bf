"""The tar index against Python's tarfile: the same members, whatever wrote the tar, and all that is whole of
a broken one.
"""

import os
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.vlm.data.formats import tar_index
from experiments.vlm.data.formats.tar_index import TarIndex, open_index
from experiments.vlm.data.storage.file_cache import FileCache
from tests.samples import write_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def read(path) -> tuple[list[dict[str, bytes]], TarIndex]:
    """Each sample's members by extension."""
    file = os.open(path, os.O_RDONLY)
    index = TarIndex(file)
    samples = [
        {m.extension: os.pread(file, m.size, m.offset) for m in index.sample(number)}
        for number in range(len(index))
    ]
    keys = [index.key(number) for number in range(len(index))]
    os.close(file)
    return [{"key": key, **sample} for key, sample in zip(keys, samples, strict=True)], index


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    format=st.sampled_from(sorted(FORMATS)),
    folder=st.sampled_from(["", "a/b/", "ü/", "x" * 90 + "/", "long/" * 30]),
    sizes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 600)), max_size=8),
)
def test_members_are_those_of_tarfile(tmp_path, format, folder, sizes):
    members = []
    for number, (image, text) in enumerate(sizes):
        members += [
            (f"{folder}{number:05d}.JPG", os.urandom(image)),
            (f"{folder}{number:05d}.txt", b"t" * text),
        ]
    path = write_tar(tmp_path / "x.tar", members, FORMATS[format])
    with tarfile.open(path) as tar:
        expected = {member.name: tar.extractfile(member).read() for member in tar}
    samples, index = read(path)
    assert index.damage is None
    assert {f"{s['key']}.JPG": s["jpg"] for s in samples} | {
        f"{s['key']}.txt": s["txt"] for s in samples
    } == expected
    assert [s["key"] for s in samples] == [f"{folder}{number:05d}" for number in range(len(sizes))]


def test_keys_end_at_the_first_dot_of_the_name_and_not_of_a_folder(tmp_path):
    path = write_tar(
        tmp_path / "x.tar", [("v1.0/cat.seg.png", b"1"), ("v1.0/cat.jpg", b"2"), ("./dog.jpg", b"3")]
    )
    samples, _ = read(path)
    assert samples == [{"key": "v1.0/cat", "seg.png": b"1", "jpg": b"2"}, {"key": "dog", "jpg": b"3"}]


def test_members_of_a_sample_need_not_be_neighbours_but_a_name_that_returns_begins_a_new_one(tmp_path):
    path = write_tar(
        tmp_path / "x.tar",
        [
            ("a.jpg", b"1"),
            ("b.jpg", b"2"),
            ("a.txt", b"3"),
            ("b.txt", b"4"),
            ("a.jpg", b"5"),
            ("a.txt", b"6"),
        ],
    )
    samples, _ = read(path)
    assert samples == [
        {"key": "a", "jpg": b"1", "txt": b"3"},
        {"key": "b", "jpg": b"2", "txt": b"4"},
        {"key": "a", "jpg": b"5", "txt": b"6"},
    ]


def test_what_is_no_sample_is_passed_over(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in [
            ("folder", tarfile.DIRTYPE),
            ("link.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
            ("pipe.jpg", tarfile.FIFOTYPE),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "elsewhere.jpg"
            tar.addfile(info)
        for name in ("README", ".hidden.jpg", "a/.DS_Store", "a/good.txt"):
            tar.addfile(tarfile.TarInfo(name))
    assert read(path)[0] == [{"key": "a/good", "txt": b""}]


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_a_tar_cut_anywhere_gives_what_is_whole_and_says_so(tmp_path, format):
    members = [(f"{'deep/' * 25}{number}.txt", bytes([65 + number]) * 700) for number in range(4)]
    whole = write_tar(tmp_path / "whole.tar", members, FORMATS[format]).read_bytes()
    expected, index = read(tmp_path / "whole.tar")
    ends = [whole.index(content) + len(content) for _, content in members]
    for cut in range(100, ends[-1] + 1, 333):
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:cut])
        samples, index = read(path)
        assert samples == expected[: sum(end <= cut for end in ends)]
        assert index.damage.reason == "shard_truncated"


def test_garbage_is_never_taken_for_a_header(tmp_path):
    whole = bytearray(
        write_tar(tmp_path / "x.tar", [(f"{n}.txt", b"x" * 100) for n in range(4)]).read_bytes()
    )
    whole[2048 + 10] ^= 1  # a bit of the third name
    (tmp_path / "x.tar").write_bytes(whole)
    samples, index = read(tmp_path / "x.tar")
    assert [sample["key"] for sample in samples] == ["0", "1", "3"]
    assert index.damage.reason == "shard_damaged"
    assert index.damage.detail == "no tar header at byte 2048; 1,024 bytes are skipped"


def test_the_holes_of_a_download_are_told(tmp_path):
    whole = write_tar(tmp_path / "x.tar", [(f"{n}.txt", b"x" * 100) for n in range(4)]).read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[:2048] + bytes(2 << 20))
    samples, index = read(tmp_path / "x.tar")
    assert [sample["key"] for sample in samples] == ["0", "1"]
    assert "nothing but zeros from byte 2048" in index.damage.detail


@pytest.mark.parametrize(
    "between, told",
    [(0, ""), (10_240, "zeros"), (1000, "zeros"), (1 << 19, "zeros"), (5 << 20, "zeros")],
)
def test_tars_that_were_joined_are_read_to_the_end(tmp_path, between, told):
    parts = [
        write_tar(tmp_path / f"{n}.tar", [(f"{n}.jpg", b"image"), (f"{n}.txt", b"text")]).read_bytes()
        for n in (1, 2)
    ]
    (tmp_path / "x.tar").write_bytes(parts[0] + bytes(between) + parts[1])
    samples, index = read(tmp_path / "x.tar")
    assert [sample["key"] for sample in samples] == ["1", "2"]
    assert (index.damage is not None) == bool(told), "more zeros than a tar ends with are told"
    assert index.damage is None or told in index.damage.detail


@pytest.mark.parametrize("note", [b"a note behind it all", b"and a longer one " * 100])
def test_what_is_left_behind_the_end_is_told(tmp_path, note):
    whole = write_tar(tmp_path / "x.tar", [("1.jpg", b"image"), ("1.txt", b"text")]).read_bytes()
    (tmp_path / "x.tar").write_bytes(whole + note)
    samples, index = read(tmp_path / "x.tar")
    assert [sample["key"] for sample in samples] == ["1"]
    assert f"no tar header at byte {len(whole)}; {len(note):,} bytes are skipped" in str(index.damage)


def big_tar(tmp_path, cut=0):
    members = [(f"{n:04}.{kind}", os.urandom(900)) for n in range(1000) for kind in ("jpg", "txt")]
    path = write_tar(tmp_path / "x.tar", members)
    os.truncate(path, os.path.getsize(path) - cut)
    return path


def count_reads(monkeypatch) -> list[int]:
    reads, true_pread = [], os.pread

    def pread(file, size, offset):
        reads.append(size)
        return true_pread(file, size, offset)

    monkeypatch.setattr(tar_index.os, "pread", pread)
    return reads


def test_headers_are_searched_in_blocks_of_a_megabyte(tmp_path, monkeypatch):
    path = big_tar(tmp_path)
    file = os.open(path, os.O_RDONLY)
    reads = count_reads(monkeypatch)
    assert len(TarIndex(file)) == 1000
    assert len(reads) <= os.path.getsize(path) / 2**20 + 3, "2,000 headers"
    os.close(file)


@pytest.mark.parametrize("cut", [0, 60_000])
def test_the_index_of_a_tar_is_kept_until_the_tar_changes(tmp_path, monkeypatch, cut):
    path = big_tar(tmp_path, cut)
    cache = FileCache(tmp_path / "cache", 1 << 30)

    def facts():
        file = os.open(path, os.O_RDONLY)
        try:
            index = open_index(file, str(path), cache)
            return [index.sample(number) for number in range(len(index))], str(index.damage)
        finally:
            os.close(file)

    searched, true_search = [], tar_index.find_samples
    monkeypatch.setattr(tar_index, "find_samples", lambda file: searched.append(file) or true_search(file))
    first = facts()
    assert facts() == first and len(searched) == 1 and (first[1] == "None") == (cut == 0)
    os.truncate(path, os.path.getsize(path) - 200_000)
    assert len(facts()[0]) < len(first[0]) and len(searched) == 2


def test_a_tar_is_read_without_a_cache_where_that_cannot_be_written(tmp_path):
    path = big_tar(tmp_path)
    (tmp_path / "cache").write_text("a file where the folder should be")
    file = os.open(path, os.O_RDONLY)
    assert len(open_index(file, str(path), FileCache(tmp_path / "cache", 1 << 30))) == 1000
    os.close(file)
