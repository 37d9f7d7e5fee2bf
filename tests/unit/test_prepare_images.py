"""Images on their way into a shard: cut ones are told, sides never vanish."""

import pytest

from experiments.vlm.data.rejects import Rejected
from experiments.vlm.prepare.images import finish_image, looks_whole, shrunk
from experiments.vlm.prepare.options import Options
from tests.faults.hostile_server import image


def test_pictures_cut_anywhere_are_told(tmp_path):
    options = Options("x.jsonl", "out")
    for form in ("JPEG", "PNG", "WEBP", "AVIF", "JPEG2000"):
        data = image(1, form)
        assert looks_whole(data) and finish_image(data, options).data == data
        for end in (len(data) // 2, len(data) * 9 // 10):
            assert not looks_whole(data[:end])
            with pytest.raises(Rejected):
                finish_image(data[:end], options)
    assert looks_whole(b"<html>")
    assert not looks_whole(b"")


def test_a_side_never_vanishes():
    assert shrunk(1, 20000, 100) == (1, 100)
    assert shrunk(50, 100, 200) == (50, 100)
    thin = finish_image(image(0, "PNG"), Options("x.jsonl", "out", max_side=1))
    assert (thin.height, thin.width) == (1, 1)
