"""Memory and processor time of a training, of requests and of encoding: do they stay flat?

    python benchmarks/memory.py --data data/scientific
    python benchmarks/memory.py --data data/scientific data/ml-100k \
        --recipe scientific/l2rec-plus movielens-100k/l2rec-plus
    python benchmarks/memory.py --quick           few steps, on generated chains

Everything is the product's own code, in a process of its own for each line, in bfloat16 where the
machine multiplies it natively. *l2rec* is as it comes; *unbounded* has no ladder of shapes, both
caches of compiled shapes as PyTorch and oneDNN have them, and no room given back
(`l2rec.modules.memory`).

    training   steps of the recipe, batches as they come
    requests   histories of ever-new lengths, encoded one at a time, as a quiet server does
    encoding   texts of the whole catalog, then users, in batches
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import arguments, report, resident_mb
from startup import Silent

from l2rec.config import RunConfig, load_recipe
from l2rec.data.batches import Batch
from l2rec.data.catalog import Catalog
from l2rec.data.dataset import Dataset, open_dataset
from l2rec.data.ragged import Ragged
from l2rec.data.splits import leave_one_out
from l2rec.data.synthetic import chain_dataset
from l2rec.methods.l2rec import L2Rec
from l2rec.modules import memory
from l2rec.protocols import Stage
from l2rec.runs.loop import try_steps
from l2rec.runs.predictor import backbone_of, build_model

GOAL_MB, GROWTH = 1400, 1.1
SETTLED = 0.25
"""Share of the work after which memory is to grow no more."""
RECIPE = "scientific/l2rec-plus"
CONTENDERS = ("l2rec", "unbounded")


# -- the work, a generator that yields after each piece of it --------------------------------------


def training(model: L2Rec, dataset: Dataset, config: RunConfig, count: int) -> Iterator[object]:
    split, options = leave_one_out(dataset.sequences), config.training
    stage: Stage = model.stages(options.lr, options.weight_decay)[-1]

    def batches() -> Iterator[Batch]:
        for epoch in itertools.count():
            yield from stage.batches(
                split.train,
                seed=config.seed,
                epoch=epoch,
                batch_users=options.batch_users,
                batch_tokens=options.batch_tokens,
            ).iterate()

    some = itertools.islice(batches(), count)
    return try_steps(model, split, options, stage, some, progress=Silent())


def requests(model: L2Rec, dataset: Dataset, config: RunConfig, count: int) -> Iterator[object]:
    rng = np.random.default_rng(config.seed)
    model.freeze()
    for _ in range(count):
        length = int(rng.integers(1, model.config.max_items + 1))
        items = rng.integers(model.n_items, size=length, dtype=np.int32)
        yield model.encode_users(Ragged(items, np.array([0, length])))


def encoding(model: L2Rec, dataset: Dataset, config: RunConfig, count: int) -> Iterator[object]:
    yield build_model(config, Catalog(dataset.catalog), model.backbone, None)  # texts, no cache
    users = np.flatnonzero(dataset.sequences.lengths)
    for some in np.array_split(users[: 64 * count], count):
        yield model.encode_users(dataset.sequences.take(some))


WORK: dict[str, Callable[[L2Rec, Dataset, RunConfig, int], Iterator[object]]] = {
    "training": training,
    "requests": requests,
    "encoding": encoding,
}


# -- measuring -------------------------------------------------------------------------------------


def unbound() -> None:
    """Undo what `l2rec.modules.memory` does, in this process."""
    os.environ.update(dict.fromkeys(memory.CACHES, "1024"))
    memory.PASSES = sys.maxsize
    memory.rungs = lambda tokens, x: 1


def measured(
    work: str, data: Path, recipe: str, count: int, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Do one kind of work in this process; return what it took."""
    config, dataset = load_recipe(recipe, overrides), open_dataset(data)
    torch.manual_seed(config.seed)
    backbone = backbone_of(config)
    model = build_model(config, Catalog(dataset.catalog), backbone, data / "cache")
    assert isinstance(model, L2Rec)
    resident, started = [], time.process_time()
    for _ in WORK[work](model, dataset, config, count):
        resident.append(resident_mb("VmRSS"))
    seconds = time.process_time() - started
    settled = max(1, round(SETTLED * len(resident)))
    return {
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "cpu_ms": 1000 * seconds / count,
        "settled_mb": max(resident[:settled]),
        "later_mb": max(resident[settled:], default=max(resident)),
        "peak_mb": resident_mb("VmHWM"),
        "resident_mb": [round(x) for x in resident],
    }


def in_child(work: str, contender: str, data: Path, recipe: str, count: int, threads: int) -> Any:
    command = [sys.executable, __file__, "--child", work, contender, str(count)]
    options = ["--data", str(data), "--recipe", recipe, "--threads", str(threads)]
    done = subprocess.run(command + options, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def rows(
    given: Sequence[tuple[Path, str]], counts: dict[str, int], threads: int
) -> list[dict[str, Any]]:
    """Measure every kind of work on each data set with its recipe."""
    found: list[dict[str, Any]] = []
    for (data, recipe), (work, count) in itertools.product(given, counts.items()):
        ours, theirs = (
            {
                "data": data.name,
                "recipe": recipe,
                "work": work,
                "contender": contender,
                "pieces": count,
            }
            | in_child(work, contender, data, recipe, count, threads)
            for contender in CONTENDERS
        )
        found += [ours | {"ratio": ours["cpu_ms"] / theirs["cpu_ms"]}, theirs]
    return found


def main(argv: Sequence[str] | None = None) -> None:
    p = arguments(__file__, __doc__)
    p.add_argument("--data", type=Path, nargs="+", metavar="DIR", help="prepared data sets")
    p.add_argument(
        "--recipe",
        nargs="+",
        default=[RECIPE],
        help=f"of L2Rec, for all data sets or for each of them (default {RECIPE})",
    )
    p.add_argument("--steps", type=int, default=200, help="of training (default %(default)s)")
    p.add_argument("--child", nargs=3, help="one line alone, in this process")
    args = p.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.child:
        work, contender, count = args.child
        if contender == "unbounded":
            unbound()
        print(json.dumps(measured(work, args.data[0], args.recipe[0], int(count))))
        return
    counts = {"training": args.steps, "requests": 500, "encoding": 50}
    if args.quick:
        counts = dict.fromkeys(counts, 4)
    with tempfile.TemporaryDirectory() as folder:
        datasets = args.data or [chain_dataset(Path(folder) / "chains", 200, 100, 12, seed=0).path]
        if len(args.recipe) not in (1, len(datasets)):
            p.error("--recipe: one for all data sets, or one for each of them")
        recipes = args.recipe * (len(datasets) // len(args.recipe))
        lines = rows(list(zip(datasets, recipes, strict=True)), counts, args.threads)
    report(
        "memory",
        args.json,
        goal=f"a training takes at most {GOAL_MB:,} MB, and nothing grows once it has settled",
        columns=[
            ("data", "data"),
            ("recipe", "recipe"),
            ("work", "work"),
            ("contender", "contender"),
            ("dtype", "dtype"),
            ("pieces", "pieces"),
            ("settled_mb", "MB, first quarter"),
            ("later_mb", "MB, later"),
            ("peak_mb", "peak MB"),
            ("cpu_ms", "CPU ms of one"),
            ("ratio", "by unbounded"),
        ],
        rows=lines,
        notes=[
            "A piece is a step, a request, or a batch of at most 64 users (the first of all: the "
            "catalog's texts). Memory is the largest resident set after a piece, in the first "
            "quarter and later; the peak is that of the whole process."
        ],
        summary=[
            {
                "path": f"memory: {line['work']} ({line['data']}, {line['recipe']})",
                "goal": f"peak at most {GOAL_MB:,} MB; later at most {GROWTH} times as at first",
                "measured": f"peak {line['peak_mb']:,.0f} MB; {line['settled_mb']:,.0f} -> "
                f"{line['later_mb']:,.0f} MB; CPU {line['ratio']:.2f} of unbounded",
                "reached": line["peak_mb"] <= GOAL_MB
                and line["later_mb"] <= GROWTH * line["settled_mb"],
            }
            for line in lines[::2]
        ],
    )


if __name__ == "__main__":
    main()
