"""Preparing a log of industrial size: time, memory, and how soon the data set can be read.

    python benchmarks/preparation.py               42 million events; some minutes, 3 GB of disk
    python benchmarks/preparation.py --quick       a hundredth of it
    python benchmarks/preparation.py --keep DIR    leave log and data set there

The log is generated first (`l2rec.data.synthetic.industrial_log`: exposures, clicks and replies of
a month in Parquet files, items with ten text attributes); that is not counted. Preparing and
opening each run in a fresh process. Peak is the largest resident set of the whole process,
interpreter, libraries and mapped files included. Opening is `open_dataset`, one history and one
item text; the files are in the system's cache. Own is the largest part of the resident set that is
no file's, looked at every 20 ms: what a machine has to have. Mapped files give way to others.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from measure import arguments, report, resident_mb

from l2rec.data.dataset import open_dataset
from l2rec.data.prepare import PrepareConfig, prepare
from l2rec.data.synthetic import industrial_log

EVENTS, USERS, ITEMS = 42_000_000, 1_500_000, 611_000
SECONDS, PEAK_MB, OPEN_SECONDS = 180, 6000, 1.0


def prepared(log: Path, out: Path) -> dict[str, Any]:
    started, own = time.perf_counter(), [resident_mb("RssAnon")]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            own[0] = max(own[0], resident_mb("RssAnon"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    dataset = prepare(log, out, PrepareConfig(event_type="event_type"), progress=False)
    done.set()
    watcher.join()
    return {
        "seconds": time.perf_counter() - started,
        "peak_mb": resident_mb("VmHWM"),
        "own_mb": own[0],
        "users": dataset.n_users,
        "items": dataset.n_items,
        "events": dataset.n_events,
        "disk_mb": sum(file.stat().st_size for file in out.rglob("*")) / 2**20,
    }


def opened(out: Path) -> dict[str, Any]:
    started = time.perf_counter()
    dataset = open_dataset(out)
    first = int(dataset.sequences[0][0])
    text = dataset.catalog["text"][first].as_py()
    seconds = time.perf_counter() - started
    assert text
    return {"seconds": seconds, "peak_mb": resident_mb("VmHWM")}


STEPS = {"prepare": lambda folder: prepared(folder / "log", folder / "data")}
STEPS["open"] = lambda folder: opened(folder / "data")


def in_child(step: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--step", step, "--keep", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return {"step": step, **found}


def main(argv: Sequence[str] | None = None) -> None:
    p = arguments(__file__, __doc__)
    p.add_argument("--events", type=int, default=EVENTS, help="default %(default)s")
    p.add_argument("--users", type=int, default=USERS, help="default %(default)s")
    p.add_argument("--items", type=int, default=ITEMS, help="default %(default)s")
    p.add_argument("--keep", type=Path, metavar="DIR", help="write here and leave it")
    p.add_argument("--step", choices=STEPS, help="only this, as JSON: of a log that was kept")
    args = p.parse_args(argv)
    if args.step:
        print(json.dumps(STEPS[args.step](args.keep)))
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    sizes = [args.events, args.users, args.items]
    if args.quick:
        sizes = [size // 100 for size in sizes]
    with ExitStack() as stack:
        folder = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        industrial_log(folder / "log", *sizes, seed=0)
        log_mb = sum(file.stat().st_size for file in (folder / "log").iterdir()) / 2**20
        making, opening = (in_child(step, folder) for step in STEPS)
    report(
        "preparation",
        args.json,
        goal=f"{EVENTS:,} events are prepared in {SECONDS // 60} minutes and {PEAK_MB:,} MB, and "
        f"read within {OPEN_SECONDS:g} s",
        columns=[
            ("step", "step"),
            ("seconds", "seconds"),
            ("peak_mb", "peak MB"),
            ("own_mb", "own MB"),
            ("events", "events"),
            ("users", "users"),
            ("items", "items"),
            ("disk_mb", "disk MB"),
        ],
        rows=[making, opening],
        notes=[f"The log: {log_mb:,.0f} MB of compressed Parquet."],
        summary=[
            {
                "path": f"preparing {making['events']:,} events",
                "goal": f"less than {SECONDS} s",
                "measured": f"{making['seconds']:.1f} s",
                "reached": making["seconds"] < SECONDS,
            },
            {
                "path": f"preparing {making['events']:,} events: memory",
                "goal": f"less than {PEAK_MB:,} MB",
                "measured": f"{making['peak_mb']:,.0f} MB",
                "reached": making["peak_mb"] < PEAK_MB,
            },
            {
                "path": "opening the data set, first history and text",
                "goal": f"less than {OPEN_SECONDS:g} s",
                "measured": f"{opening['seconds']:.2f} s",
                "reached": opening["seconds"] < OPEN_SECONDS,
            },
        ],
    )


if __name__ == "__main__":
    main()
