"""The softmax over the whole catalog, forward and backward, against torch's cross-entropy.

    python benchmarks/loss.py
    python benchmarks/loss.py --quick          a tenth of the users and items

`l2rec.modules.objectives.fused_catalog_loss` computes scores for some users at a time, and their
gradients while the scores are in memory. The peer multiplies, converts to float32 and calls
`torch.nn.functional.cross_entropy`. Both get the same random users, items and positives, [P, 384]
and [N, 384] float32, and multiply in the dtype of the row.

Seconds are the median over rounds, contenders in turn. Memory is the peak of one forward and
backward in a fresh process, above that process with its input.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from measure import arguments, from_child, interleave, median, peak_mb, ratio, report
from torch import Tensor
from torch.nn import functional as F

from l2rec.modules.objectives import fused_catalog_loss

DIM, TEMPERATURE = 384, 0.07
SIZES = ((430, 4_385), (860, 16_859), (860, 100_000))
"""Supervised positions of a batch and items: those of Scientific, Games, and a larger catalog."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GOAL = 1.0


def whole(users: Tensor, items: Tensor, positive: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Compute the loss as the peer does."""
    scores = users.to(dtype) @ items.to(dtype).T
    return F.cross_entropy(scores.float(), positive)


CONTENDERS: dict[str, Callable[..., Tensor]] = {
    "torch cross-entropy": whole,
    "l2rec": fused_catalog_loss,
}


def step(loss: Callable[..., Tensor], users: int, items: int, dtype: str) -> Callable[[], object]:
    """Build forward and backward on random input."""
    made = torch.Generator().manual_seed(0)
    u = F.normalize(torch.randn(users, DIM, generator=made), dim=-1) / TEMPERATURE
    t = F.normalize(torch.randn(items, DIM, generator=made), dim=-1)
    leaves = [u.requires_grad_(), t.requires_grad_()]
    positive = torch.randint(items, (users,), generator=made)
    return lambda: torch.autograd.grad(loss(*leaves, positive, dtype=DTYPES[dtype]), leaves)


def measure(
    users: int, items: int, dtype: str, rounds: int, memory: Callable[[str], float | None]
) -> list[dict[str, Any]]:
    rivals = [step(loss, users, items, dtype) for loss in CONTENDERS.values()]
    wall, cpu = interleave(rivals, rounds, 1)
    return [
        {
            "size": f"{users:,} x {items:,}, {dtype}",
            "contender": name,
            "seconds": median(seconds),
            "cpu_seconds": median(busy),
            "ratio": ratio(busy, cpu[0]),
            "memory_mb": memory(name),
        }
        for name, seconds, busy in zip(CONTENDERS, wall, cpu, strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    options = list(sys.argv[1:] if argv is None else argv)
    p = arguments(__file__, __doc__)
    p.add_argument("--rounds", type=int, default=7, help="timed rounds (default %(default)s)")
    p.add_argument("--memory-of", nargs=4, metavar=("NAME", "P", "N", "DTYPE"), help="only this")
    args = p.parse_args(options)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        name, users, items, dtype = args.memory_of
        print(peak_mb(step(CONTENDERS[name], int(users), int(items), dtype)))
        return
    sizes = [(p // 10, n // 10) for p, n in SIZES] if args.quick else SIZES
    rounds = 2 if args.quick else args.rounds

    def memory(users: int, items: int, dtype: str, name: str) -> float | None:
        return from_child(__file__, *options, "--memory-of", name, str(users), str(items), dtype)

    rows = [
        row
        for users, items in sizes
        for dtype in DTYPES
        for row in measure(users, items, dtype, rounds, partial(memory, users, items, dtype))
    ]
    report(
        "loss",
        args.json,
        goal="the full softmax costs less than torch's cross-entropy of the whole product",
        columns=[
            ("size", "users x items, dtype"),
            ("contender", "contender"),
            ("seconds", "seconds"),
            ("cpu_seconds", "CPU s"),
            ("ratio", "CPU by peer"),
            ("memory_mb", "memory MB"),
        ],
        rows=rows,
        notes=[f"Vectors of {DIM} numbers. {rounds} rounds after 1."],
        summary=[
            {
                "path": f"full softmax, {row['size']}",
                "goal": f"less than {GOAL} x torch cross-entropy",
                "measured": f"{row['ratio']:.2f} x ({row['seconds']:.3f} s)",
                "reached": row["ratio"] < GOAL,
            }
            for row in rows
            if row["contender"] == "l2rec"
        ],
    )


if __name__ == "__main__":
    main()
