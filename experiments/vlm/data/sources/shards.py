"""Which shards a source has, and how one is opened.

    data/cc12m-0001.tar                 a file
    data/cc12m-{0000..0012}.tar         a range; {a,b} too
    data/**/*.parquet                   a glob
    data/cc12m                          a folder: the files below it whose suffix the format knows; where
                                        Megatron Energon has prepared it, those of the split (energon.py)
    s3://bucket/cc12m/*.tar             any of these where fsspec reaches it: s3, gs, http(s) ...
    hf://datasets/ORG/NAME              a data set of the Hugging Face hub: its train split
    embedded:captions/train             drawn on first use, see experiments/vlm/world

Remote and compressed shards (.gz, .tgz, .zst, .bz2, .zip) are copied into the cache folder, so that every
shard can seek.
"""

import glob
import os
import re
import shutil
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from braceexpand import braceexpand

from experiments.vlm.config import Data, Source
from experiments.vlm.data.formats import FORMATS, RECORD_FORMATS
from experiments.vlm.data.formats.hint import hint as hint_of
from experiments.vlm.data.formats.shard import Shard, ShardFile, first_records
from experiments.vlm.data.formats.shard import open_shard as open_file
from experiments.vlm.data.formats.tar_shard import TarShard
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.sources.energon import Split, excluded_keys, of_split, of_split_above
from experiments.vlm.data.sources.walk import (
    FILE,
    FOLDER,
    Local,
    Remote,
    local_files,
    local_glob,
    remote_files,
    remote_glob,
)
from experiments.vlm.data.storage.file_cache import FileCache, Held, file_cache, origin_of
from experiments.vlm.data.storage.outages import Away, Retry, is_away, remote
from experiments.vlm.data.storage.remote import file_system, is_http
from experiments.vlm.data.storage.remote import open_file as open_remote
from experiments.vlm.data.storage.unpack import (
    damage_of,
    is_packed,
    note_damage,
    packing_of,
    plain_name,
    unpack,
)
from experiments.vlm.world import ensure
from torchtitan.config.errors import ConfigError

HUB = "hf://datasets/"
TRAIN = re.compile("(?<![a-z])train(ing)?(?![a-z])")  # as `datasets` knows the split by names of its files
# that a wrong path leads to, or a client that is not installed; all else the storage may mend
MISTAKES = (FileNotFoundError, NotADirectoryError, ImportError, ValueError, TypeError, NotImplementedError)
EMBEDDED = "embedded:"
CHUNK_BYTES = 1 << 20
# what `datasets` writes next to its data
NOT_RECORDS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def list_shards(path: str, format: str, data: Data, split: Split = "train") -> list[str]:
    """The shards of a source, sorted. A shard that a range names may be missing: opening it fails.

    Raises ConfigError where there is none, StorageError where the storage stays away.
    """
    suffixes, place = FORMATS[format].suffixes, _resolve(path, data)
    found = Retry(data.storage_timeout_s).call(path, lambda: match_files(place, suffixes, split))
    if not found:
        raise ConfigError(
            f"{path}: no shard of format {format} ({', '.join(suffixes)}) there"
            f"{_others(path, format, data)}; looked from {os.getcwd()}"
        )
    if not any("://" in file or os.path.isfile(file) for file in found):
        raise ConfigError(f"{path}: none of these {len(found):,} shards is there; looked from {os.getcwd()}")
    return sorted(set(found))


def _others(path: str, format: str, data: Data) -> str:
    """Which files of other formats are there, and of which: for people."""
    suffixes = {suffix for format in FORMATS.values() for suffix in format.suffixes}
    found = match_files(_resolve(path, data), tuple(suffixes))
    if not found:
        return ""
    suffix, count = Counter(map(suffix_of, found)).most_common(1)[0]
    first = min(file for file in found if suffix_of(file) == suffix)
    if "://" not in first and (hint := format_hint(first, Source(format=format), data)):
        return f", but {count:,} files {suffix}: {hint}"
    formats = [name for name, row in RECORD_FORMATS.items() if suffix in row.suffixes]
    return f", but {count:,} files {suffix}, which the formats {', '.join(formats)} read"


def match_files(path: str, suffixes: tuple[str, ...], split: Split | None = None) -> list[str]:
    """The files that a path with braces and globs means; of folders those of the split with such suffixes."""
    return [file for pattern in _expand(path) for file in _match(pattern, suffixes, split)]


def open_shard(path: str, source: Source, data: Data) -> Shard:
    """A shard, for random access. Raises Rejected, ConfigError, and OSError where the storage is away."""
    try:
        shard = open_copied(path, data, lambda file: open_file(file, source, data))
        if isinstance(shard, TarShard):
            shard.excluded = excluded_keys(path, _folders_of(source))
        return shard
    except ConfigError:
        raise  # a chat template that is not there, say
    except FileNotFoundError as error:
        if _is_unmounted(path):
            raise Away(f"nothing is left in {os.path.dirname(path)}: unmounted, or moved away?") from error
        raise Rejected("shard_missing", str(error)) from error
    except (OSError, ValueError, RuntimeError, pa.ArrowException) as error:
        if is_away(error):
            raise
        raise Rejected("shard_unreadable", f"{type(error).__name__}: {error}") from error


def open_copied(path: str, data: Data, open_local: Callable[[ShardFile], Shard]) -> Shard:
    """What `open_local` makes of a file, or of its copy in the cache, which is held while the shard lives.

    Raises OSError, and what `open_local` raises.
    """
    cache = file_cache(data)
    copy = hold_copy(path, cache)
    if copy is None:
        return open_local(ShardFile(path, path))
    try:
        shard = open_local(ShardFile(path, str(copy.path)))
    except FileNotFoundError as error:
        raise Away(f"its copy {copy.path} is gone") from error
    weakref.finalize(shard, copy.close)
    if damage := damage_of(path, cache):
        shard.rejects = [_joined(shard.rejects, damage)]
    return shard


def format_hint(path: str, source: Source, data: Data) -> str:
    """What a source should say for a shard's records to fit (hint.py); empty where that cannot be said."""
    if suffix_of(path) == ".csv":
        return "CSV is not read, since a text may run over lines there: save it as parquet, JSONL or TSV"
    copy: Held | None = None
    try:
        copy = hold_copy(path, file_cache(data))
        records = first_records(ShardFile(path, str(copy.path) if copy else path), data)
    except (Rejected, OSError, ValueError, RuntimeError, pa.ArrowException):
        return ""
    finally:
        if copy:
            copy.close()
    return hint_of(records, source)


def _joined(rejects: list[Rejected], damage: str) -> Rejected:
    """What is wrong with a packed shard, in one: its packing, and what that did to its records."""
    reason = rejects[0].reason if rejects else "shard_damaged"
    return Rejected(reason, "; ".join([damage, *(reject.detail for reject in rejects)]))


def _folders_of(source: Source) -> list[str]:
    """The remote folders that a source may name."""
    return [pattern for pattern in _expand(source.path) if "://" in pattern and not glob.has_magic(pattern)]


def _is_unmounted(path: str) -> bool:
    """Whether all of a local file's folder is gone: not deleted by name then, but away."""
    if "://" in path:
        return False
    try:
        with os.scandir(os.path.dirname(path) or ".") as entries:
            return next(entries, None) is None
    except FileNotFoundError:
        return True


def _resolve(path: str, data: Data) -> str:
    if path.startswith(EMBEDDED):
        return str(ensure(path.removeprefix(EMBEDDED), data.cache_folder))
    return path if "://" in path else os.path.expanduser(path)


def _expand(path: str) -> list[str]:
    """Brace ranges and lists: {0000..0012} counts and keeps the zeros in front, {a,b} names.

    As webdataset's `expand_urls`, but for "::", which that takes for a list and fsspec for a chain of file
    systems.
    """
    try:
        return list(braceexpand(path, escape=False))
    except ValueError:
        return [path]  # a brace that belongs to a name


def _match(pattern: str, suffixes: tuple[str, ...], split: Split | None) -> list[str]:
    if "://" in pattern:
        return _match_remote(pattern, suffixes, split)
    try:
        kind = Local().kind(pattern)
        if kind == FOLDER:
            found = _of_folder(local_files(pattern), pattern, suffixes, split)
            return of_split_above(pattern, found, split) if split else found
        return local_glob(pattern) if glob.has_magic(pattern) and kind != FILE else [pattern]
    except PermissionError as error:  # that waiting for does not mend
        raise ConfigError(f"{pattern}: permission denied: {error.filename}") from error


def _match_remote(pattern: str, suffixes: tuple[str, ...], split: Split | None) -> list[str]:
    try:
        system, path = file_system(pattern)
        if glob.has_magic(path.replace("?", "") if is_http(path) else path):
            return [system.unstrip_protocol(file) for file in remote_glob(system, path)]
        if not (path.endswith("/") if is_http(path) else Remote(system).kind(path) == FOLDER):
            return [pattern]
        files = _of_folder(
            [system.unstrip_protocol(file) for file in remote_files(system, path)],
            system.unstrip_protocol(path),
            suffixes,
            split,
        )
    except ConfigError:
        raise
    except MISTAKES as error:
        raise ConfigError(f"{pattern}: {_unlisted(pattern, error)}") from error
    except Exception as error:  # clients of remote systems raise kinds of their own
        raise Away(_unlisted(pattern, error)) from error
    is_whole_data_set = pattern.startswith(HUB) and pattern.removeprefix(HUB).count("/") == 1
    of_train = [file for file in files if TRAIN.search(file.removeprefix(pattern).lower())]
    return of_train if is_whole_data_set and of_train else files


def _unlisted(pattern: str, error: Exception) -> str:
    """In a line, why it cannot be listed and what to do."""
    why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if isinstance(error, PermissionError):
        return f"permission denied ({why})"
    if not pattern.startswith("hf://"):
        return f"cannot be listed ({why})"
    if isinstance(error, (FileNotFoundError, ImportError, ValueError)):
        return f"cannot be listed ({why}); a private or gated data set needs HF_TOKEN"
    return (
        f"the Hugging Face hub could not be reached ({why}): check the network, HF_ENDPOINT, and HF_TOKEN "
        "for a private or gated data set; or download it first (hf download NAME --repo-type dataset), and "
        "give the folder"
    )


def _of_folder(files: list[str], folder: str, suffixes: tuple[str, ...], split: Split | None) -> list[str]:
    """The files that are shards. Next to tars, other files are notes about them; hidden ones do not count."""
    visible = [file for file in files if "/." not in file.removeprefix(folder.rstrip("/"))]
    found = {
        file: suffix
        for file in visible
        if (suffix := suffix_of(file)) in suffixes and os.path.basename(file) not in NOT_RECORDS
    }
    shards = [file for file, suffix in found.items() if suffix == ".tar"] or list(found)
    return of_split(files, shards, split) if split else shards


def suffix_of(file: str) -> str:
    """What is left when it is unpacked: ".tar" of x.tgz and x.tar.gz."""
    path = plain_name(file)
    if path.suffix == ".tgz":
        return ".tar"
    return path.with_suffix("").suffix if is_packed(file) else path.suffix


def needs_copy(path: str) -> bool:
    """Whether by its name it is remote or packed, and read from a copy in the cache."""
    return "://" in path or is_packed(path)


def hold_copy(path: str, cache: FileCache) -> Held | None:
    """The copy of a file in the cache; None where the file itself is read. Raises OSError."""
    if not (needs_copy(path) or _is_packed_tar(path, path)):
        return None
    return cache.hold(origin_of(path), lambda copy: _copy(path, copy, cache), suffix_of(path))


def _is_packed_tar(name: str, file: str) -> bool:
    """Whether a file of this name is a packed tar all the same, which other readers take as it is."""
    return plain_name(name).suffix == ".tar" and packing_of(file) is not None


def _copy(path: str, copy: Path, cache: FileCache) -> None:
    packed = copy.with_name(copy.name + ".packed") if "://" in path else Path(path)
    try:
        if "://" in path and is_packed(path):
            _download(path, packed, cache)
        elif "://" in path:
            _download(path, copy, cache)
            if not _is_packed_tar(path, str(copy)):
                return
            cache.make_room(copy.stat().st_size)
            shutil.copyfile(copy, packed)
        with cache.growing(copy) as target:
            damage = unpack(str(packed), target, plain_name(path).suffix)
        if damage:
            note_damage(path, damage, cache)
    finally:
        if "://" in path:
            packed.unlink(missing_ok=True)


def _download(path: str, copy: Path, cache: FileCache) -> None:
    """Raises FileNotFoundError, and Away for all else that the storage does, a file of another length too."""
    with remote():
        opened = open_remote(path)
        announced = opened.fs.info(opened.path).get("size")
        with opened as source:
            cache.make_room(announced or 0, copy)
            with open(copy, "r+b") as target:
                shutil.copyfileobj(source, target, CHUNK_BYTES)
                came = target.tell()
                target.truncate()
        # Listings are kept by the client, and what it took for the length is what it asked for.
        opened.fs.invalidate_cache()
        size = opened.fs.info(opened.path).get("size")
        if size is not None and came != size:
            raise Away(f"{came} of {size} bytes came")
