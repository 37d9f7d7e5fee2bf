"""Damaged tars lose only what is damaged: see tests/reference/damaged_tars.py for the table."""

import warnings

import pytest

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
