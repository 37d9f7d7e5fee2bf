"""Files of folders and globs: those of Python's glob, but that an error is none of its silences."""

import errno
import glob
import os
import random

import pytest

from experiments.vlm.config import Data
from experiments.vlm.data.sources.shards import list_shards
from experiments.vlm.data.sources.walk import local_files, local_glob
from experiments.vlm.data.storage.outages import Retry
from tests.faults.flaky_store import FlakyFileSystem, Store
from torchtitan.config.errors import ConfigError, StorageError


@pytest.fixture
def tree(tmp_path):
    draw = random.Random(0)
    for _ in range(60):
        depth = draw.randrange(1, 4)
        parts = [draw.choice(["a", "b", "ab", ".h", "c[1]", "d.tar"]) for _ in range(depth)]
        folder = tmp_path.joinpath(*parts)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / draw.choice(["1.tar", "2.tar", ".3.tar", "x.txt"])).write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "broken.tar").symlink_to(tmp_path / "nowhere")
    return tmp_path


PATTERNS = [
    "*", "*/*.tar", "**/*.tar", "a/**", "**", "a/**/b/*.tar", "?/*", "[ab]*/[12].tar", ".h/*", "*/.h/*",
    "**/.*", "a*/**/*", "*.tar/*", "nothing/*", "a/1.tar/*", "link/**/*.tar", "./*/*.tar", "*//*.tar",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("absolute", [True, False])
def test_files_of_a_glob_are_those_that_glob_finds(tree, monkeypatch, pattern, absolute):
    """Of ** those behind links once: there glob finds what a link leads to and the link."""
    monkeypatch.chdir(tree)
    pattern = os.path.join(tree, pattern) if absolute else pattern
    name = os.path.realpath if "**" in pattern else os.path.normpath
    expected = {name(file) for file in glob.glob(pattern, recursive=True) if os.path.isfile(file)}
    assert sorted(map(name, local_glob(pattern))) == sorted(expected)


def test_local_files_of_a_folder_are_those_of_a_walk(tree):
    expected = {os.path.join(place, name) for place, _, names in os.walk(tree) for name in names}
    true_paths = [os.path.realpath(file) for file in local_files(str(tree))]
    assert sorted(true_paths) == sorted(expected - {str(tree / "a" / "broken.tar")})


@pytest.mark.parametrize("pattern", ["", "**/*.tar", "**/d/*.tar"])
def test_links_to_folders_are_followed_but_in_no_circle(tmp_path, pattern):
    """Each circle once more would double what is found, and two without end."""
    for name in ("d", "elsewhere"):
        (tmp_path / name / "d").mkdir(parents=True)
        (tmp_path / name / "d" / "1.tar").write_bytes(b"x")
    (tmp_path / "d" / "d" / "linked").symlink_to(tmp_path / "elsewhere")
    for name in ("up", "up again"):
        (tmp_path / "d" / "d" / name).symlink_to(tmp_path / "d")
    found = list_shards(os.path.join(tmp_path / "d", pattern), "cc12m", Data(cache_folder=str(tmp_path)))
    assert found == [str(tmp_path / "d" / place / "1.tar") for place in ("d", "d/linked/d")]


def failing(monkeypatch, name, times, error):
    """os.NAME raises so often, and as if for chance later than at once."""
    calls, true_function = [], getattr(os, name)

    def function(*arguments, **options):
        calls.append(arguments)
        if 2 <= len(calls) < 2 + times:
            raise error
        return true_function(*arguments, **options)

    monkeypatch.setattr(os, name, function)


@pytest.mark.parametrize("name", ["scandir", "stat"])
@pytest.mark.parametrize("pattern", ["", "**/*.tar", "*/*.tar"])
def test_a_folder_that_does_not_answer_is_asked_again(tree, tmp_path, monkeypatch, name, pattern):
    data, path = Data(cache_folder=str(tmp_path / "cache")), os.path.join(tree, pattern)
    expected = list_shards(path, "cc12m", data)
    rests = []
    monkeypatch.setattr(Retry, "rest", lambda _, seconds: rests.append(seconds))
    with monkeypatch.context() as patched:
        failing(patched, name, 3, OSError(errno.EIO, "Input/output error"))
        assert list_shards(path, "cc12m", data) == expected and len(rests) == 3
    data.storage_timeout_s = 0
    failing(monkeypatch, name, 10**6, OSError(errno.ESTALE, "Stale file handle"))
    with pytest.raises(StorageError, match="Stale file handle"):
        list_shards(path, "cc12m", data)


@pytest.mark.parametrize(
    "call, path",
    [("ls", "flaky://a"), ("ls", "flaky://a/**/*.tar"), ("ls", "flaky://a/*/*.tar"), ("info", "flaky://a")],
)
def test_a_remote_folder_that_does_not_answer_is_asked_again(tmp_path, monkeypatch, call, path):
    for name in ("b/1.tar", "b/2.tar", "c/3.tar", "d/4.tar"):
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).write_bytes(b"x")
    data, failed, true_call = Data(cache_folder=str(tmp_path)), [], getattr(FlakyFileSystem, call)
    with Store(tmp_path, (), 0).serving(monkeypatch) as store:
        expected = list_shards(path, "cc12m", data)
        assert len(expected) == 4
        calls = store.operations

        def away_once_each(self, path, *arguments, **options):
            if path not in failed:
                failed.append(path)
                raise OSError(errno.EIO, "Input/output error")
            return true_call(self, path, *arguments, **options)

        monkeypatch.setattr(FlakyFileSystem, call, away_once_each)
        assert list_shards(path, "cc12m", data) == expected
    assert failed and store.operations > calls


@pytest.mark.parametrize("path", ["memory://nothing/*.tar", "memory://nothing/**", "unheard-of://x/*.tar"])
def test_a_wrong_path_is_said_at_once(tmp_path, monkeypatch, path):
    monkeypatch.setattr(Retry, "rest", lambda *_: pytest.fail("nobody waits for that"))
    with pytest.raises(ConfigError):
        list_shards(path, "cc12m", Data(cache_folder=str(tmp_path)))
