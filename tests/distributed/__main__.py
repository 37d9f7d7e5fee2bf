"""Train every layout a few steps on gloo ranks of this machine, and print how far each is from one process.

    python -m tests.distributed                     all of them: 61 took 23 minutes on 2 shared cores
    python -m tests.distributed --ranks 2           those on 2 ranks
    python -m tests.distributed --only tp2 cp4      those whose name contains one of these

Columns are the largest differences: relative ones over the steps (loss, gradient norm, held-out figures) and
over the parameters (the first gradient of each), and that of any weight after the last step. It ends with an
error if one exceeds its bound.
"""

import argparse
import os
import sys
import tempfile
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="*", help="layouts on so many ranks")
    parser.add_argument("--only", nargs="*", help="layouts whose name contains one of these")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    from tests.distributed.table import HEADING, LAYOUTS, Comparison

    chosen = [each for each in LAYOUTS.values() if not options.ranks or each.ranks in options.ranks]
    chosen = [each for each in chosen if not options.only or any(part in each.name for part in options.only)]
    comparison, unequal = Comparison(options.steps, timeout_s=1200), []
    print(HEADING)
    started = time.perf_counter()
    for row in comparison.rows(chosen):
        print(row, flush=True)
        if not row.equal:
            unequal.append(row)
    for row in unequal:
        print(f"\n{row.layout.name}: {row.layout.changes}\n{row.error}")
    print(
        f"{len(chosen) - len(unequal)} of {len(chosen)} layouts equal one process; "
        f"{time.perf_counter() - started:.0f} s"
    )
    return 1 if unequal else 0


if __name__ == "__main__":
    # A cache of compiled kernels shared with other runs has given wrong gradients: this one has its own.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        sys.exit(main())
