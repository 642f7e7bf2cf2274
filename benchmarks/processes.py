"""Throughput of several processes on as many cores against one process on one core.

    python benchmarks/processes.py --data data/ml-100k
    python benchmarks/processes.py --data data/ml-100k --recipe sasrec --cores 2 3 4 5

Whole trainings of one recipe with one batch size, one thread to each process (or ``--threads``):
with the first core alone, with all cores and as many processes, and, for what the machine itself
allows, as many trainings at once that know nothing of each other; in turn. Tokens a second are
those of the steps (validations excluded), so batches mean the same work for all. Validation time is
listed beside it.
Linux: processes are bound to their cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import arguments, median, ratio, report

GOAL_SHARE = 0.85
"""Share of the ideal, the number of processes, that is to be reached: 1.7 of 2."""


@dataclass(frozen=True)
class Measured:
    """Tokens a second of all steps, and the seconds of validation."""

    rate: float
    validation: float


def train(options: Any, cores: Sequence[int], steps: int, out: Path) -> subprocess.Popen[bytes]:
    """Begin a training with a process on each core."""
    command = [sys.executable, "-m"]
    if len(cores) > 1:
        command += ["torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={len(cores)}", "-m"]
    command += ["l2rec", "train", options.recipe, "--data", str(options.data), "--out", str(out)]
    command += [f"training.max_steps={steps}", "training.eval_every=1000", *options.override]
    return subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": str(options.threads or 1)},
        preexec_fn=partial(os.sched_setaffinity, 0, cores),
        stdout=subprocess.DEVNULL,
    )


def measured(options: Any, at_once: Sequence[Sequence[int]], steps: int, out: Path) -> Measured:
    """Run trainings at once, each with a process on each of its cores."""
    running = [train(options, c, steps, out / str(n)) for n, c in enumerate(at_once)]
    assert [process.wait() for process in running] == [0] * len(running)
    found = [json.loads((out / str(n) / "report.json").read_text()) for n in range(len(running))]
    for answer, cores in zip(found, at_once, strict=True):
        assert answer["processes"] == len(cores), answer["processes"]
    rate = sum(one["tokens_seen"] / one["training_seconds"] for one in found)
    return Measured(rate, max(one["validation_seconds"] for one in found))


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
    torch.set_num_threads(args.threads or 1)  # of each process, and as it is reported
    steps, rounds = (5, 1) if args.quick else (args.steps, args.rounds)
    most = len(args.cores)
    one, together, apart = "1 process", f"{most} processes", f"{most} trainings apart"
    contenders = {one: [args.cores[:1]], together: [args.cores], apart: [[c] for c in args.cores]}
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for name, at_once in contenders.items():
                out = Path(folder) / f"{name}-{number}".replace(" ", "-")
                found = measured(args, at_once, steps, out)
                rates[name].append(found.rate)
                seconds[name].append(found.validation)
    gained = ratio(rates[together], rates[one])
    report(
        "processes",
        args.json,
        goal=f"{most} processes train {GOAL_SHARE:.0%} of {most} times as fast as one",
        columns=[
            ("contender", "contender"),
            ("rate", "tokens/s"),
            ("ratio", "by one"),
            ("validation", "validations s"),
        ],
        rows=[
            {
                "contender": name,
                "rate": median(rates[name]),
                "ratio": ratio(rates[name], rates[one]),
                "validation": median(seconds[name]),
            }
            for name in contenders
        ],
        notes=[
            f"{' '.join([args.recipe, *args.override])}, {steps} steps, {rounds} rounds, cores "
            f"{args.cores}. Trainings apart: what the machine has for this load on all cores."
        ],
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
