"""Make WebDataset shards, with the images inside, from records that name their images.

    torchtitan-vlm prepare --input cc12m.tsv --out shards/cc12m
    torchtitan-vlm prepare --input 'obelics/*.parquet' --out shards/obelics --max_side 1024 --encode jpeg
    torchtitan-vlm prepare --input llava.json --image_folder images --out shards/llava

Stopped or killed, the same command goes on and fetches nothing twice. docs/prepare_data.md tells more.
"""

import contextlib
import signal
from collections.abc import Sequence

import tyro

from experiments.vlm.prepare.local import Crashed
from experiments.vlm.prepare.options import Options
from experiments.vlm.prepare.progress import Shown
from experiments.vlm.prepare.start import prepare
from torchtitan.tools.told import INTERRUPTED, say, tell

PROG = "torchtitan-vlm prepare"


def main(argv: Sequence[str]) -> int:
    """The command. Raises ConfigError."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's end is a person's
    try:
        with contextlib.closing(Shown()) as progress:
            flat = (tyro.conf.OmitArgPrefixes,)
            options = tyro.cli(Options, args=argv, prog=PROG, description=__doc__, config=flat, use_underscores=True)
            report = prepare(options, progress)
    except Crashed as error:
        tell(error)
        return 1
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here")
        return INTERRUPTED
    show(options, report)
    return 0


def show(options: Options, report: dict) -> None:
    for what in ("records", "images"):
        counts = report[what]
        print(f"{what}: {counts['written']} of {counts['read']} written")
        for reason, count in sorted(counts["rejected"].items(), key=lambda item: -item[1]):
            print(f"  {count:>8} {reason}")
    print(f"{report['shards']} shards, {report['bytes'] / 1e6:.1f} MB in {options.out}; what was left out and why: report.json, rejects/")
    print(f'train on them:\n  [[data.sources]]\n  format = "webdataset"\n  path = "{options.out}"')
    if report["kind"] == "conversations":
        print('  chat_template = "chatml"  # or "llama3", or a Jinja file')
