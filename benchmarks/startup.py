"""Time a command takes to start and to answer: imports, the model, and then the answer.

    python benchmarks/startup.py
    python benchmarks/startup.py --quick           3 rounds

    l2rec --help        the command line alone
    l2rec recommend     a history in, ten items out: the whole command, on a run that was made here
                        (recipe scientific/l2rec-plus, one step of training, generated chains)
    bare transformers   the peer: import torch and transformers, load the same backbone, no more
    python              an interpreter that does nothing: a scale

Each runs in a process of its own, in turn; seconds are the median over rounds. Below stand parts of
`l2rec recommend`: imports by package as `python -X importtime` counts them (a package's own time,
without what it imports), which is a little slower than without counting; loading and answering in a
process that has imported everything, by its second time.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import arguments, interleave, median, ratio, report

import l2rec
from l2rec.config import load_recipe
from l2rec.data.dataset import open_dataset
from l2rec.data.synthetic import chain_dataset
from l2rec.modules.backbone import minilm_source
from l2rec.runs.train import train_run

RECIPE = "scientific/l2rec-plus"
HELP_SECONDS, GOAL = 0.3, 1.5
COMMAND = "from l2rec.cli import main; main()"  # what the installed script does
PEER = """
import sys, torch, transformers
transformers.AutoModel.from_pretrained(sys.argv[1])
"""
NAMED = 5  # packages with a row of their own


class Silent:
    """Progress that is not shown."""

    def training(self, epoch: float, step: int, total: int, text: str) -> None: ...
    def validating(self, done: int, total: int) -> None: ...
    def line(self, text: str) -> None: ...


def small_run(folder: Path, *overrides: str, users: int = 100, items: int = 60) -> Path:
    """Train a run for a moment on generated chains and return its folder."""
    data = chain_dataset(folder / "chains", users, items, length=10, seed=0)
    config = load_recipe(RECIPE, overrides)
    train_run(config, data.path, folder / "run", progress=Silent(), recipe=RECIPE)
    return folder / "run"


def python(code: str, *options: str, flags: Sequence[str] = ()) -> str:
    """Run ``code`` in a new interpreter and return its standard error."""
    command = [sys.executable, *flags, "-c", code, *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def import_seconds(importtime: str) -> dict[str, float]:
    """Sum the seconds that ``-X importtime`` wrote by package; l2rec and the slowest by name."""
    found: Counter[str] = Counter()
    for line in importtime.splitlines():
        if match := re.match(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\w+)", line):
            found[match[2]] += int(match[1]) / 1e6
    named = {name: found[name] for name in ("l2rec", *dict(found.most_common(NAMED)))}
    return named | {"everything else": sum(found.values()) - sum(named.values())}


def warm_seconds(run: Path, history: Sequence[str]) -> dict[str, float]:
    """Measure loading a run and one answer, with everything imported."""
    for _ in range(2):
        started = time.perf_counter()
        model = l2rec.load(run)
        loaded = time.perf_counter()
        model.recommend(history)
        answered = time.perf_counter()
    return {"loading the run": loaded - started, "answering": answered - loaded}


def warm_in_child(run: Path, history: str) -> dict[str, float]:
    options = ["--warm", str(run), "--history", history]
    done = subprocess.run(
        [sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def measure(folder: Path, rounds: int) -> list[dict[str, Any]]:
    run = small_run(folder, "training.max_steps=1")
    history = ",".join(open_dataset(folder / "chains").item_ids[:5].to_pylist())
    recommend = ["recommend", str(run), "--history", history]
    commands = {
        "python": partial(python, "pass"),
        "l2rec --help": partial(python, COMMAND, "--help"),
        "bare transformers": partial(python, PEER, minilm_source()),
        "l2rec recommend": partial(python, COMMAND, *recommend),
    }
    wall, _ = interleave(list(commands.values()), rounds, 1)
    seconds = dict(zip(commands, wall, strict=True))
    whole = median(seconds["l2rec recommend"])
    counted = python(COMMAND, *recommend, flags=["-X", "importtime"])
    parts = {f"importing {name}": spent for name, spent in import_seconds(counted).items()}
    parts |= warm_in_child(run, history)
    return [
        {
            "what": name,
            "seconds": median(times),
            "ratio": ratio(times, seconds["bare transformers"]),
        }
        for name, times in seconds.items()
    ] + [
        {"what": f"- {name}", "seconds": spent, "share": spent / whole}
        for name, spent in sorted(parts.items(), key=lambda part: -part[1])
    ]


def main(argv: Sequence[str] | None = None) -> None:
    p = arguments(__file__, __doc__)
    p.add_argument("--rounds", type=int, default=7, help="timed rounds (default %(default)s)")
    p.add_argument("--warm", type=Path, metavar="RUN", help="only this, as JSON")
    p.add_argument("--history", help="with --warm: item ids")
    args = p.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the commands that are measured
    if args.warm:
        print(json.dumps(warm_seconds(args.warm, args.history.split(","))))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), 3 if args.quick else args.rounds)
    found = {row["what"]: row for row in rows}
    shown, answer = found["l2rec --help"], found["l2rec recommend"]
    report(
        "startup",
        args.json,
        goal=f"help is there within {HELP_SECONDS:g} s; an answer of a run takes at most {GOAL:g} "
        "times what importing torch and transformers and loading the backbone takes",
        columns=[
            ("what", "what"),
            ("seconds", "seconds"),
            ("ratio", "ratio"),
            ("share", "share of recommend"),
        ],
        rows=rows,
        notes=["Lines with a dash are parts of `l2rec recommend`."],
        summary=[
            {
                "path": "l2rec --help",
                "goal": f"less than {HELP_SECONDS:g} s",
                "measured": f"{shown['seconds']:.2f} s",
                "reached": shown["seconds"] < HELP_SECONDS,
            },
            {
                "path": "l2rec recommend, the whole command",
                "goal": f"at most {GOAL:g} x importing transformers and loading the backbone",
                "measured": f"{answer['ratio']:.2f} x ({answer['seconds']:.1f} s)",
                "reached": answer["ratio"] <= GOAL,
            },
        ],
    )


if __name__ == "__main__":
    main()
