"""A log of industrial size, trained for some steps, embedded in part and indexed.

    python benchmarks/preparation.py --keep DIR        the log and the data set; 42 million events
    python benchmarks/industrial.py --keep DIR         hours on one core, 12 GB of disk
    python benchmarks/industrial.py --keep DIR --quick fewer steps and users

Every step runs in a fresh process, by the functions behind the command that is named beside it, and
leaves what it made in DIR: a step that was done is not done again, its figures are in DIR/*.json.

    texts    all item texts are tokenised, and the distinct ones read by the backbone, once for all
             runs (first thing of `l2rec train`)
    train    training and validation as in `l2rec train`, behavioural view, a sample of the catalog
             in every step, without the test and its floors
    vectors  of all items and of some users, as `l2rec embed` makes them
    index    `l2rec index`, each kind
    search   the ten best items of users, 32 at once
    free     updates of free item vectors r_i alone, of as many items as a step reads

Seconds are of the processor, which other processes disturb less than the clock. Peak is the largest
resident set of the whole process, interpreter, libraries and mapped files included.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from measure import arguments, median, report, resident_mb, write_json
from safetensors.torch import load_file

from l2rec.config import RunConfig, load_recipe
from l2rec.data.catalog import Catalog
from l2rec.data.dataset import open_dataset
from l2rec.data.synthetic import N_TEXTS
from l2rec.data.vectors import read_vectors, vectors_table
from l2rec.index import Index, build, build_folder
from l2rec.index import load as load_index
from l2rec.modules.item_side import RESIDUAL_DROPOUT
from l2rec.modules.text_table import TextTable
from l2rec.runs.launch import Silent
from l2rec.runs.predictor import backbone_of, build_model, load
from l2rec.runs.train import validate_run

OVERRIDES = (
    *("model.views=[behavioral]", "model.sampled_items=1024", "model.item_residual=false"),
    # The four words of a generated text that tell items apart: some twenty items share each.
    *("model.text_tokens=4", "model.item_tokens=4"),
    *("training.batch_users=128", "training.log_every=5", "training.checkpoint_minutes=1000"),
)
FREE, ROWS = 3, 9000
"""Updates of r_i alone, and the items that a step reads."""
RECIPE = "l2rec-plus"
KINDS = ("int8", "binary")
AT_ONCE, SEARCHED = 32, 96
"""Queries of one search, and of all."""
BLOCKS, TIMED = 20, 1 << 16
"""Blocks of users, and items, whose encoding is timed."""
Row = dict[str, Any]


class Clock(Silent):
    """Progress that keeps the processor's clock at every line."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, float]] = []
        self.ranked: list[tuple[int, float]] = []

    def training(self, epoch: float, step: int, total: int, text: str) -> None:
        self.steps.append((step, time.process_time()))
        print(text, file=sys.stderr, flush=True)

    def validating(self, done: int, total: int) -> None:
        self.ranked.append((done, time.process_time()))

    def line(self, text: str) -> None:
        print(
            f"{time.process_time():.0f} s, {resident_mb('VmRSS'):.0f} MB: {text}", file=sys.stderr
        )


def each(marks: Sequence[tuple[int, float]]) -> float | None:
    """Return the median seconds of one, from how many were done when; None if all were at once. A
    count that begins anew is left out.
    """
    pairs = [(a, b) for a, b in pairwise(marks) if b[0] > a[0]]
    return median((b[1] - a[1]) / (b[0] - a[0]) for a, b in pairs) if pairs else None


def config(steps: int, users: int, *more: str) -> RunConfig:
    limits = [f"training.max_steps={steps}", f"split.users={users}"]
    return load_recipe(RECIPE, [*OVERRIDES, *limits, *more])


def texts(folder: Path, steps: int, users: int) -> list[Row]:
    recipe, dataset = config(steps, users), open_dataset(folder / "data")
    backbone = backbone_of(recipe)
    started = time.process_time()
    build_model(recipe, Catalog(dataset.warm_catalog), backbone, dataset.path / "cache")
    seconds = time.process_time() - started
    rows = dataset.n_items
    return [{"step": "texts", "of": "items", "done": rows, "all": rows, "each": seconds / rows}]


def train(folder: Path, steps: int, users: int) -> list[Row]:
    recipe, dataset, clock = config(steps, users), open_dataset(folder / "data"), Clock()
    found = validate_run(recipe, dataset.path, folder / "run", progress=clock, resume=True)
    # Rows of at most max_items positions: no batch of so few users reaches batch_tokens.
    inputs = np.maximum(dataset.sequences.lengths - 3, 0)
    windows = int((-(-inputs // recipe.model.max_items)).sum())
    return [
        {
            "step": "train",
            "of": "steps",
            "done": found.steps,
            "all": -(-windows // recipe.training.batch_users),
            "each": each(clock.steps),
            "ranked_each": each(clock.ranked),
            "disk_mb": size_mb(folder / "run"),
        }
    ]


def vectors(folder: Path, steps: int, users: int) -> list[Row]:
    dataset, run = open_dataset(folder / "data"), folder / "run"
    # What was read of the texts, as `l2rec train` leaves it in a finished run.
    shutil.copytree(dataset.path / "cache", run / "cache", copy_function=os.link)
    predictor, started = load(run), time.process_time()
    predictor.model.encode_items(np.arange(TIMED, dtype=np.int32) % dataset.n_items)
    of_items = (time.process_time() - started) / TIMED
    some = np.unique(np.linspace(0, dataset.n_users - 1, users * BLOCKS).astype(np.int64))
    parts, marks = [], []
    for start in range(0, len(some), users):
        histories = dataset.sequences.take(some[start : start + users])
        parts.append(predictor.model.encode_users(histories).cpu())
        marks.append((start + len(histories), time.process_time()))
    ids = dataset.user_ids.take(some).to_pylist()
    out = folder / "vectors"
    out.mkdir(exist_ok=True)
    for name, named, each_of in (
        ("items", predictor.ids, predictor.vectors),
        ("users", ids, torch.cat(parts)),
    ):
        table = vectors_table(named, each_of.float().numpy(), predictor.version)
        pq.write_table(table, out / f"{name}.parquet")
    return [
        {
            "step": "items",
            "of": "items",
            "done": TIMED,
            "all": dataset.n_items,
            "each": of_items,
            "disk_mb": size_mb(out / "items.parquet"),
        },
        {
            "step": "users",
            "of": "users",
            "done": len(some),
            "all": dataset.n_users,
            "each": each(marks),
            "disk_mb": size_mb(out / "users.parquet"),
        },
    ]


def free(folder: Path, steps: int, users: int) -> list[Row]:
    dataset = open_dataset(folder / "data")
    (path,) = (dataset.path / "cache").glob("text-*.safetensors")
    table = TextTable(load_file(path)["vectors"], RESIDUAL_DROPOUT, 0.4, linear=False)
    optimizer = torch.optim.AdamW(table.parameters(), lr=1e-3)
    marks = [(0, time.process_time())]
    for number in range(FREE):
        read = torch.randint(dataset.n_items, (ROWS,))
        optimizer.zero_grad(set_to_none=True)
        table(read).sum().backward()
        torch.nn.utils.clip_grad_norm_(table.parameters(), 1.0)
        optimizer.step()
        marks.append((number + 1, time.process_time()))
    return [{"step": "free", "of": "steps", "done": FREE, "all": None, "each": each(marks[1:])}]


def indexed(folder: Path, steps: int, users: int, *, kind: str) -> list[Row]:
    given, started = folder / "vectors", time.process_time()
    out, queries = folder / f"index-{kind}", given / "users.parquet"
    facts = build_folder(given / "items.parquet", out, kind=kind, queries=queries)
    seconds, rows = time.process_time() - started, facts["rows"]
    return [
        {
            "step": f"index {kind}",
            "of": "items",
            "done": rows,
            "all": rows,
            "each": seconds / rows,
            "disk_mb": facts["megabytes"] * 1e6 / 2**20,
            "recall": facts["recall@10"],
        }
    ]


def search(folder: Path, steps: int, users: int) -> list[Row]:
    given = folder / "vectors"
    queries = read_vectors(given / "users.parquet").vectors
    found = []
    for kind in ("exact", *KINDS):
        if kind == "exact":
            index: Index = build(read_vectors(given / "items.parquet").vectors, kind)
        else:
            index, _, _ = load_index(folder / f"index-{kind}")
        index.search(queries[:AT_ONCE], 10)
        marks = [(0, time.process_time())]
        for start in range(0, SEARCHED, AT_ONCE):
            index.search(queries.take(np.arange(start, start + AT_ONCE), axis=0, mode="wrap"), 10)
            marks.append((start + AT_ONCE, time.process_time()))
        done = {"step": f"search {kind}", "of": "queries", "done": SEARCHED, "all": None}
        found.append(done | {"each": each(marks)})
    return found


STEPS: dict[str, Callable[[Path, int, int], list[Row]]] = {
    "texts": texts,
    "train": train,
    "vectors": vectors,
    **{f"index-{kind}": partial(indexed, kind=kind) for kind in KINDS},
    "search": search,
    "free": free,
}


def size_mb(path: Path) -> float:
    """Return the size of a file, or of all files of a folder, in 2^20 bytes, as of memory."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / 2**20


def in_child(step: str, options: Any) -> list[Row]:
    """Run a step in a fresh process, unless it was done; return its rows."""
    file = options.keep / f"{step}.json"
    if not file.is_file():
        command = [sys.executable, __file__, "--step", step, "--keep", str(options.keep)]
        command += ["--steps", str(options.steps), "--users", str(options.users)]
        command += ["--threads", str(options.threads)]
        subprocess.run(command, check=True)
    rows: list[Row] = json.loads(file.read_text())["rows"]
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    p = arguments(__file__, __doc__)
    p.add_argument("--keep", type=Path, metavar="DIR", required=True, help="of preparation.py")
    p.add_argument("--steps", type=int, default=100, help="of training (default %(default)s)")
    p.add_argument(
        "--users", type=int, default=100, help="validated; 20 times as many are embedded"
    )
    p.add_argument("--step", choices=STEPS, help="this alone")
    args = p.parse_args(argv)
    if args.quick:
        args.steps, args.users = 10, 50
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.step:
        rows = STEPS[args.step](args.keep, args.steps, args.users)
        for row in rows:
            row["peak_mb"] = resident_mb("VmHWM")
            row["whole_hours"] = row["all"] and row["each"] * row["all"] / 3600
        write_json(args.keep / f"{args.step}.json", {"rows": rows})
        return
    rows = [row for step in STEPS for row in in_child(step, args)]
    dataset = open_dataset(args.keep / "data")
    report(
        "industrial",
        args.json,
        goal="a log of industrial size is trained, embedded and indexed on one core",
        columns=[
            ("step", "step"),
            ("of", "of"),
            ("done", "done"),
            ("all", "all"),
            ("each", "CPU s each"),
            ("whole_hours", "hours of all"),
            ("peak_mb", "peak MB"),
            ("disk_mb", "disk MB"),
            ("recall", "recall@10"),
        ],
        rows=rows,
        notes=[
            f"{dataset.n_users:,} users, {dataset.n_items:,} items, {dataset.n_events:,} events, "
            "drawn at random: there is nothing to learn, and scores stay at chance. "
            f"{N_TEXTS:,} texts are distinct, so some twenty items share a vector, and recall, "
            "where ties count, is the easiest there is. All steps are one epoch. Items and users "
            "were encoded in one process, whose peak stands at both.",
            f"{RECIPE} {' '.join(OVERRIDES)}. Other processes used the machine too.",
        ],
    )


if __name__ == "__main__":
    main()
