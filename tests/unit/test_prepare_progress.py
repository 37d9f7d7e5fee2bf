"""Progress for people and for files."""

import contextlib
import os
import sys

from experiments.vlm.prepare.progress import ConsoleProgress


def stages():
    progress = ConsoleProgress()
    progress.stage("images", 10)
    progress.advance(4, before=True)
    progress.advance(6, failed=2, size=3_000_000)
    progress.note("waiting for another run")
    progress.stage("records written", 0)
    progress.close()


def test_without_a_terminal_progress_is_plain_lines(capsys):
    stages()
    said = capsys.readouterr().err
    assert "\r" not in said
    first, note, last, empty = said.splitlines()
    assert first.startswith("images: 0 of 10, ") and note == "waiting for another run"
    assert last.startswith("images: 10 of 10, ") and "MB/s" in last and last.endswith("2 failed")
    assert empty.startswith("records written: 0 of 0, ")


def test_a_terminal_that_does_not_know_its_size_shows_a_bar(monkeypatch):
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        stages()
    shown = ""
    with os.fdopen(ours, "rb", buffering=0) as reader, contextlib.suppress(OSError):  # EIO: it was all
        while data := reader.read(1 << 16):
            shown += data.decode()
    bars = [text.strip() for text in shown.split("\r") if text.strip()]
    assert any(bar.startswith("images: 10 of 10, ") and bar.endswith("█]") for bar in bars)
    assert "waiting for another run" in bars


def test_what_was_done_before_is_not_in_the_rate(capsys):
    progress = ConsoleProgress()
    progress.stage("images", 10)
    progress.advance(10, before=True)
    progress.close()
    assert capsys.readouterr().err.splitlines()[-1].startswith("images: 10 of 10, ?/s, ")
