"""What a sweep starts in place of a trainer: it takes steps, saves, goes on and stops, and learns nothing.

    python tests/stand_in_trainer.py JOB.toml

The loss of a step follows from the learning rate and the seed. A run fails where the weight decay is 13, and
waits after its first new step for as long as there is a file called `wait` next to its folder.
"""

import json
import os
import signal
import sys
import time
import tomllib
from pathlib import Path

LATE_S = 60.0  # a test that hangs leaves nothing behind


def main(path: str) -> int:
    job = tomllib.loads(Path(path).read_text())
    folder, steps = Path(job["job"]["dump_folder"]), job["training"]["steps"]
    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: asked.append(number))
    (folder / "config.toml").write_text(Path(path).read_text())
    started = {name: os.environ.get(name) for name in ("NGPU", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
    started |= {name: os.environ.get(name) for name in ("WANDB_NAME", "WANDB_RUN_GROUP", "DRY_RUN")}
    saved = [int(step.name.removeprefix("step-")) for step in (folder / "checkpoint").glob("step-*")]
    first = max(saved, default=0)
    with (folder / "started.jsonl").open("a") as file:
        file.write(json.dumps(started | {"pid": os.getpid(), "first": first}) + "\n")
    if job["optimizer"]["weight_decay"] == 13:
        print("error: it does not like 13", file=sys.stderr)
        return 3
    for step in range(first + 1, steps + 1):
        loss = abs(job["optimizer"]["lr"] - 2) + job["debug"]["seed"] / 10 + 1 / step
        records = [{"step": step, "loss": loss, "tokens_seen": 100 * step, "wall_s": 36.0 * step}]
        # In the middle of the run the held-out figure is better than at its end.
        records += [{"step": step, "validate/loss": loss + (0.5 if step == steps else 0)}]
        with (folder / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        late = time.monotonic() + LATE_S
        while (folder.parent / "wait").exists() and not asked and time.monotonic() < late:
            time.sleep(0.01)
        checkpoint = folder / "checkpoint" / f"step-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "train_state.json").write_text(json.dumps({"step": step, "global_batch_size": 2}))
        if asked:
            return 128 + asked[0]
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
