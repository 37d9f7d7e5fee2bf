"""What preparation writes is whole, or comes back as far as it goes."""

import numpy as np
import pytest

from experiments.vlm.prepare.folder import appearing, read_array, write_array
from experiments.vlm.prepare.journal import Journal


def test_a_journal_survives_a_torn_line_and_lost_bytes(tmp_path):
    with Journal(tmp_path) as journal:
        journal.arrived("a", b"1" * 100)
        journal.failed("b", "http_404", "")
        journal.arrived("c", b"2" * 100)
    (lines,) = tmp_path.glob("*.jsonl")
    (data,) = tmp_path.glob("*.bin")
    with Journal(tmp_path) as journal:
        assert (journal.read("a"), journal.outcomes["b"].reason, journal.read("c")) == (
            b"1" * 100,
            "http_404",
            b"2" * 100,
        )
        journal.arrived("d", b"3")
        assert journal.read("d") == b"3"
    lines.write_bytes(lines.read_bytes()[:-5])
    with Journal(tmp_path) as journal:
        assert set(journal.outcomes) == {"a", "b", "d"}
    data.write_bytes(data.read_bytes()[:50])
    with Journal(tmp_path) as journal:
        assert set(journal.outcomes) == {"b", "d"}


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), appearing(tmp_path / "x") as file:
        file.write(b"half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "array", [np.arange(7, dtype=np.uint64) << 60, np.array([True, False, True]), np.zeros(0, np.uint64)]
)
def test_an_array_comes_back_as_it_was_written(tmp_path, array):
    write_array(tmp_path / "x.npy", array)
    read = read_array(tmp_path / "x.npy", array.dtype.type)
    assert np.array_equal(read, array) and read.dtype == array.dtype
    assert np.array_equal(np.load(tmp_path / "x.npy"), array), "any NumPy reads it"
