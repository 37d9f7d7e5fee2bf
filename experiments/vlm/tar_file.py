"""Tars of samples in the WebDataset convention, the same bytes on every machine and day."""

from collections.abc import Iterable, Mapping
from typing import IO


def write_samples(file: IO[bytes], samples: Iterable[Mapping[str, bytes]]) -> None:
    """A sample is its members, name -> content, in order; a name is the key, a dot and an extension."""
    from webdataset import TarWriter  # imports torch, which takes seconds: not before the first tar

    with TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as tar:
        for members in samples:
            for name, content in members.items():
                key, _, extension = name.partition(".")
                # one by one, since TarWriter sorts what it gets
                tar.write({"__key__": key, extension: content})
