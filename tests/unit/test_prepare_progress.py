"""Progress for people and for files."""

from experiments.vlm.prepare.progress import Shown


def test_without_a_terminal_progress_is_plain_lines(capsys):
    shown = Shown()
    shown.stage("images", 10)
    shown.advance(4, before=True)
    shown.advance(6, failed=2, size=3_000_000)
    shown.close()
    said = capsys.readouterr().err
    assert (
        said.startswith("images: 10 of 10, ") and "2 failed" in said and "MB/s" in said and "\r" not in said
    )
