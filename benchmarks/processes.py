"""Throughput of several processes on as many cores against one process on one core.

    python benchmarks/processes.py --data data/ml-100k
    python benchmarks/processes.py --data data/ml-100k --recipe sasrec --cores 2 3 4 5

Whole trainings of one recipe with one batch size, one thread to each process: with the first core
alone, then with all cores and as many processes, in turn. Tokens a second are those of the steps
(validations excluded), so batches mean the same work for all. Validation time is listed beside it.
Linux: processes are bound to their cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from measure import arguments, median, ratio, report

GOAL_SHARE = 0.85
"""Share of the ideal, the number of processes, that is to be reached: 1.7 of 2."""


def train(options: Any, cores: Sequence[int], steps: int, out: Path) -> dict[str, Any]:
    """Train with a process on each core; return the report."""
    command = [sys.executable, "-m"]
    if len(cores) > 1:
        command += ["torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={len(cores)}", "-m"]
    command += ["l2rec", "train", options.recipe, "--data", str(options.data), "--out", str(out)]
    command += [f"training.max_steps={steps}", "training.eval_every=1000", *options.override]
    subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=partial(os.sched_setaffinity, 0, cores),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    assert found["processes"] == len(cores), found["processes"]
    return found


def main(argv: Sequence[str] | None = None) -> None:
    p = arguments(__file__, __doc__)
    p.add_argument("--data", type=Path, required=True, help="data set folder")
    p.add_argument("--recipe", default="l2rec", help="recipe (default %(default)s)")
    p.add_argument("--override", nargs="*", default=[], metavar="KEY=VALUE", help="of the recipe")
    p.add_argument("--cores", nargs="+", type=int, default=[0, 1], help="(default %(default)s)")
    p.add_argument("--steps", type=int, default=40, help="of each training (default %(default)s)")
    p.add_argument("--rounds", type=int, default=3, help="timed rounds (default %(default)s)")
    args = p.parse_args(sys.argv[1:] if argv is None else argv)
    if len(set(args.cores)) < len(args.cores):
        p.error(f"--cores {args.cores}: name each core once")
    steps, rounds = (5, 1) if args.quick else (args.steps, args.rounds)
    contenders = {1: args.cores[:1], len(args.cores): args.cores}
    rates: dict[int, list[float]] = {count: [] for count in contenders}
    seconds: dict[int, list[float]] = {count: [] for count in contenders}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for count, cores in contenders.items():
                found = train(args, cores, steps, Path(folder) / f"{count}-{number}")
                rates[count].append(found["tokens_seen"] / found["training_seconds"])
                seconds[count].append(found["validation_seconds"])
    most = len(args.cores)
    gained = ratio(rates[most], rates[1])
    report(
        "processes",
        args.json,
        goal=f"{most} processes train {GOAL_SHARE:.0%} of {most} times as fast as one",
        columns=[
            ("processes", "processes"),
            ("rate", "tokens/s"),
            ("ratio", "by one"),
            ("validation", "validations s"),
        ],
        rows=[
            {
                "processes": count,
                "rate": median(rates[count]),
                "ratio": ratio(rates[count], rates[1]),
                "validation": median(seconds[count]),
            }
            for count in contenders
        ],
        notes=[f"{args.recipe}, {steps} steps, {rounds} rounds, cores {args.cores}."],
        summary=[
            {
                "path": f"training by {most} processes, {args.recipe}",
                "goal": f"{GOAL_SHARE * most:.2g} times the throughput of one",
                "measured": f"{gained:.2f}",
                "reached": gained >= GOAL_SHARE * most,
            }
        ],
    )


if __name__ == "__main__":
    main()
