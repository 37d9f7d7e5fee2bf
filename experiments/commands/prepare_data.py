"""Make WebDataset shards, with the images inside, from records that name their images.

    torchtitan-vlm prepare --input cc12m.tsv --out shards/cc12m
    torchtitan-vlm prepare --input 'obelics/*.parquet' --out shards/obelics --max_side 1024 --encode jpeg
    torchtitan-vlm prepare --input llava.json --image_folder images --out shards/llava

Stopped or killed, the same command goes on and fetches nothing twice. docs/prepare_data.md says more.
"""

import contextlib
from collections.abc import Sequence

from experiments.vlm.prepare.options import Options
from experiments.vlm.prepare.progress import ConsoleProgress
from experiments.vlm.prepare.start import Crashed, prepare
from torchtitan.config.parse import run_tyro
from torchtitan.tools.error_line import report_error
from torchtitan.tools.signals import resumable

PROG = "torchtitan-vlm prepare"


def main(argv: Sequence[str]) -> int:
    """The command. Raises ConfigError."""
    try:
        with contextlib.closing(ConsoleProgress()) as progress, resumable():
            options = run_tyro(Options, argv, None, PROG, __doc__)
            report = prepare(options, progress)
    except Crashed as error:
        report_error(error)
        return 1
    _show(options, report)
    return 0


def _show(options: Options, report: dict) -> None:
    (source,) = report["sources"].values()
    for what in ("samples", "images"):
        rejected = {reason: entry["count"] for reason, entry in source["rejected"].get(what, {}).items()}
        print(f"{what}: {source['counts'].get(what, 0)} written, {sum(rejected.values())} left out")
        for reason, count in sorted(rejected.items(), key=lambda item: -item[1]):
            print(f"  {count:>8} {reason}")
    size = f"{source['counts'].get('bytes', 0) / 1e6:.1f} MB"
    print(
        f"{report['shards']} shards, {size} in {options.out}; what was left out and why: report.json, "
        "rejects/"
    )
    format = "text" if report["format"] == "text" else "webdataset"
    print(f'train on them:\n  [[data.sources]]\n  format = "{format}"\n  path = "{options.out}"')
    if report["format"] in ("llava", "messages"):
        print('  chat_template = "chatml"  # or "llama3", or a Jinja file')
