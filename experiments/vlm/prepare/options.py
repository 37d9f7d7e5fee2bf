"""The options of `torchtitan-vlm prepare`. The comment after a field is its --help text. Imports no torch."""

import dataclasses
import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torchtitan.config.errors import ConfigError

# What may change between a run and the run that goes on with it: how the work is done, not what comes out.
FREE = (
    "input",  # its files are compared
    "out",
    "concurrency",
    "max_per_host",
    "host_delay_s",
    "timeout_s",
    "read_timeout_s",
    "retries",
    "max_retry_after_s",
    "user_agent",
    "allow_private",
    "allow_networks",
    "threads",
    "ray_address",
)


@dataclass(frozen=True)
class Options:
    """Where records come from, what is made of them, and how politely images are fetched."""

    # records: a file, glob or folder of .parquet, .arrow, .tsv, .jsonl, .json or .txt, also packed as .gz,
    # .bz2, .zst or .zip
    input: str
    out: str  # folder of the shards; on a cluster one that all nodes share
    # what a record is; auto: by its columns
    format: Literal["auto", "captions", "obelics", "mmc4", "llava", "messages", "finevision", "text"] = "auto"
    # captions: column of the image (URL, path or bytes); empty: found by its usual names
    image_column: str = ""
    text_column: str = ""  # captions: column of the text; empty: found by its usual names
    image_folder: str = ""  # where the paths of images begin; empty: at the folder of the record file
    records_per_shard: int = 5000  # records of the input that make one shard
    max_side: int = 0  # shrink images whose longer side has more pixels than this; 0: never
    # format of the images; keep: their own. Bytes change only where they must
    encode: Literal["keep", "jpeg", "png", "webp"] = "keep"
    quality: int = 92  # of images that are encoded as JPEG or WebP
    # each image once, by URL and by content; auto: not for conversations
    dedup: Literal["auto", "on", "off"] = "auto"
    concurrency: int = 64  # answers that are on their way at one time
    max_per_host: int = 8  # of these, from one host
    host_delay_s: float = 0.0  # seconds between two requests to one host
    timeout_s: float = 30.0  # for a whole answer
    read_timeout_s: float = 10.0  # for silence, while connecting and while reading
    max_bytes: int = 32 << 20  # larger images are not fetched
    retries: int = 3  # further tries after 429, 5xx, a timeout or a broken connection
    max_retry_after_s: float = 120.0  # a host that asks for a longer rest (Retry-After) is given up
    # how hosts see the run; name yourself and where to complain
    user_agent: str = "torchtitan-vlm/0.1 (training data)"
    allow_private: bool = False  # fetch from private, loopback and link-local addresses too
    allow_networks: tuple[str, ...] = ()  # fetch from these of them only, such as 10.1.0.0/16
    threads: int = 0  # that check, shrink and encode images; 0: one for each core
    # run on this Ray cluster (auto, local, or HOST:PORT); empty: on this machine, with nothing to start
    ray_address: str = ""

    def __post_init__(self) -> None:
        for name in (
            "records_per_shard",
            "concurrency",
            "max_per_host",
            "timeout_s",
            "read_timeout_s",
            "max_bytes",
        ):
            if getattr(self, name) <= 0:
                raise ConfigError(f"--{name} {getattr(self, name)} must be above 0")
        for name in ("max_side", "host_delay_s", "retries", "max_retry_after_s", "threads"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name} {getattr(self, name)} must not be below 0")
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"--quality {self.quality} is not in 1 ... 100")
        if self.image_folder and not Path(self.image_folder).is_dir():
            raise ConfigError(f"--image_folder {self.image_folder} is not a folder")
        for network in self.allow_networks:
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                raise ConfigError(
                    f"--allow_networks: {error}; write a network such as 10.1.0.0/16"
                ) from error

    def outcome(self) -> dict:
        """The options that decide what comes out."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in FREE}
