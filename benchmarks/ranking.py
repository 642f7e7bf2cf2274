"""Full ranking of every user over the whole catalog, against a bare matrix product and top-k.

    python benchmarks/ranking.py --data data/games
    python benchmarks/ranking.py                   as many users and items, all of them random
    python benchmarks/ranking.py --quick           a tenth of both

`l2rec.evaluation.ranking.evaluate` finds each target's exact rank, with the history in the ranking
and with it masked, and each user's 20 best items. The peer computes the same scores in the same
blocks of users and asks torch for the 20 best: no ranks, no masks, no ties, no check for NaN.
Histories and targets are those of the test split; vectors are random, [users, 384] and [items, 384]
float32.

Seconds are the median over rounds, contenders in turn. Memory is the peak of one evaluation in a
fresh process, above that process with vectors and histories loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import arguments, from_child, interleave, median, peak_mb, ratio, report
from torch import Tensor

from l2rec.data.dataset import open_dataset
from l2rec.data.ragged import IntArray, Ragged
from l2rec.data.splits import leave_one_out
from l2rec.evaluation.ranking import evaluate
from l2rec.protocols import Scorer

DIM, TOP = 384, 20
USERS, ITEMS, MEAN_HISTORY = 50_546, 16_859, 8  # of Amazon Games
BLOCKS = (256,)  # about what `evaluate` takes by default for a catalog of this size
GOAL, MEMORY_MB = 1.2, 1000


@dataclass(frozen=True)
class Task:
    name: str
    histories: Ragged
    targets: IntArray
    n_items: int


class Vectors:
    """A recommender with given vectors, so that only scoring and ranking are measured."""

    def __init__(self, n_users: int, n_items: int) -> None:
        made = torch.Generator().manual_seed(0)
        self.users = torch.randn(n_users, DIM, generator=made)
        self.items = torch.randn(n_items, DIM, generator=made)

    @property
    def n_items(self) -> int:
        return len(self.items)

    def scorer(self) -> Scorer:
        done = 0

        def score(histories: Ragged) -> Tensor:
            nonlocal done  # users come in order, once
            block = self.users[done : done + len(histories)]
            done += len(histories)
            return block @ self.items.T

        return score


def random_task(n_users: int, n_items: int) -> Task:
    rng = np.random.default_rng(0)
    lengths = 1 + rng.geometric(1 / MEAN_HISTORY, size=n_users)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    values = rng.integers(n_items, size=offsets[-1], dtype=np.int32)
    return Task("random", Ragged(values, offsets), rng.integers(n_items, size=n_users), n_items)


def largest_task(paths: Sequence[Path]) -> Task:
    """Open the test split of the data set with the most users."""
    dataset = max(map(open_dataset, paths), key=lambda dataset: dataset.n_users)
    split = leave_one_out(dataset.sequences)
    return Task(dataset.name, split.test.histories, split.test.targets.values, dataset.n_items)


def bare(vectors: Vectors, block: int) -> Tensor:
    """Find the [users, 20] best items as the peer does."""
    with torch.inference_mode():
        best = [(users @ vectors.items.T).topk(TOP).indices for users in vectors.users.split(block)]
        return torch.cat(best)


def contenders(task: Task, block: int) -> dict[str, Callable[[], object]]:
    vectors = Vectors(len(task.targets), task.n_items)
    return {
        "matmul and top-k": partial(bare, vectors, block),
        "l2rec": partial(evaluate, vectors, task.histories, task.targets, batch_size=block),
    }


def measure(
    task: Task, block: int, rounds: int, memory: Callable[[str], float | None]
) -> list[dict[str, Any]]:
    rivals = contenders(task, block)
    wall, cpu = interleave(list(rivals.values()), rounds, 1)
    return [
        {
            "contender": name,
            "block": block,
            "seconds": median(seconds),
            "cpu_seconds": median(busy),
            "rate": len(task.targets) / median(seconds),
            "ratio": ratio(seconds, wall[0]),
            "memory_mb": memory(name),
        }
        for name, seconds, busy in zip(rivals, wall, cpu, strict=True)
    ]


def goals(row: dict[str, Any]) -> list[dict[str, Any]]:
    path = f"full ranking, blocks of {row['block']:,} users"
    found = [
        {
            "path": path,
            "goal": f"at most {GOAL} x matmul and top-k",
            "measured": f"{row['ratio']:.2f} x ({row['seconds']:.1f} s)",
            "reached": row["ratio"] <= GOAL,
        }
    ]
    if row["memory_mb"] is not None:
        found.append(
            {
                "path": f"{path}: memory",
                "goal": f"less than {MEMORY_MB:,} MB",
                "measured": f"{row['memory_mb']:,.0f} MB",
                "reached": row["memory_mb"] < MEMORY_MB,
            }
        )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    options = list(sys.argv[1:] if argv is None else argv)
    p = arguments(__file__, __doc__)
    p.add_argument(
        "--data", type=Path, nargs="+", metavar="DIR", help="the one with most users is ranked"
    )
    p.add_argument("--users", type=int, default=USERS, help="without data (default %(default)s)")
    p.add_argument("--items", type=int, default=ITEMS, help="without data (default %(default)s)")
    p.add_argument("--rounds", type=int, default=5, help="timed rounds (default %(default)s)")
    p.add_argument("--memory-of", metavar="NAME", help="only this, as a number of MB")
    p.add_argument("--block", type=int, default=BLOCKS[0], help="with --memory-of")
    args = p.parse_args(options)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.quick:
        args.users, args.items, args.rounds = args.users // 10, args.items // 10, 2
    task = largest_task(args.data) if args.data else random_task(args.users, args.items)
    if args.memory_of:
        print(peak_mb(contenders(task, args.block)[args.memory_of]))
        return

    def memory(block: int, name: str) -> float | None:
        return from_child(__file__, *options, "--memory-of", name, "--block", str(block))

    rows = [
        row for block in BLOCKS for row in measure(task, block, args.rounds, partial(memory, block))
    ]
    report(
        "ranking",
        args.json,
        goal=f"exact ranks of all users cost at most {GOAL} times a matrix product and top-k",
        columns=[
            ("contender", "contender"),
            ("block", "users at once"),
            ("seconds", "seconds"),
            ("cpu_seconds", "CPU s"),
            ("rate", "users/s"),
            ("ratio", "ratio"),
            ("memory_mb", "memory MB"),
        ],
        rows=rows,
        notes=[
            f"{task.name}: {len(task.targets):,} users, {task.n_items:,} items, histories of "
            f"{task.histories.lengths.mean():.1f} items on average. {args.rounds} rounds after 1."
        ],
        summary=[goal for row in rows if row["contender"] == "l2rec" for goal in goals(row)],
    )


if __name__ == "__main__":
    main()
