"""Make WebDataset shards, with the images inside, from records that name their images.

    python scripts/prepare_data.py --input cc12m.tsv --out shards/cc12m
    python scripts/prepare_data.py --input 'obelics/*.parquet' --out shards/obelics --max_side 1024 --encode jpeg
    python scripts/prepare_data.py --input llava.json --image_folder images --out shards/llava

Stopped or killed, the same command goes on and fetches nothing twice. docs/prepare_data.md tells more.
"""

import signal
import sys
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.vlm.prepare.local import Crashed  # noqa: E402
from experiments.vlm.prepare.options import Options  # noqa: E402
from experiments.vlm.prepare.progress import Shown  # noqa: E402
from experiments.vlm.prepare.start import prepare  # noqa: E402
from torchtitan.config.errors import ConfigError  # noqa: E402


def main() -> int:
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # a scheduler's end is a person's
    progress = Shown()
    try:
        options = tyro.cli(Options, description=__doc__, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True)
        report = prepare(options, progress)
    except (ConfigError, Crashed) as error:
        progress.close()
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        progress.close()
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    progress.close()
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


if __name__ == "__main__":
    sys.exit(main())
