"""Growth of DPMoE's time and memory with experts, rank, batch, history and catalog: is it linear?

    python benchmarks/growth.py                 all curves, some minutes
    python benchmarks/growth.py --quick         fewer points, fewer rounds
    python benchmarks/growth.py --device cuda

Steps are forward and backward through all-MiniLM-L6-v2 in the fastest native dtype, as `step.py`
makes them; histories go through the real model, both views, in its loss. All points of a curve
take turns in every round; a point is the median of its rounds. Exact ranking is the evaluator over
random vectors, for a fixed number of users. Memory is the peak of a step in a fresh process, less
what was there before.

The slope is that of a straight line through the last points of a curve, both axes logarithmic: 1
is linear, 2 quadratic. A curve is linear or better if its slope is at most 1.1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from measure import arguments, from_child, interleave, median, peak_mb, report, synchronize
from step import OURS, Contender, Workload, dpmoe, loader, two_steps

from l2rec.data.batches import Batch
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.data.synthetic import simple_text
from l2rec.evaluation.ranking import evaluate
from l2rec.methods.l2rec import L2Rec, L2RecConfig
from l2rec.modules.backbone import fast_bfloat16
from l2rec.protocols import Scorer

LAST = 3
"""Points that the slope is fitted to."""
LINEAR = 1.1


@dataclass(frozen=True)
class Curve:
    name: str
    x_label: str
    y_label: str
    x: list[int]
    y: list[float]

    @property
    def slope(self) -> float:
        return slope(self.x, self.y)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Fit the exponent of growth to the last points: y ~ x ** slope."""
    return float(np.polyfit(np.log(x[-LAST:]), np.log(y[-LAST:]), 1)[0])


def timed(
    name: str, x_label: str, x: list[int], rivals: Sequence[Callable[[], object]], rounds: int
) -> Curve:
    wall, _ = interleave(rivals, rounds, warmup=1)
    return Curve(name, x_label, "seconds", x, [median(seconds) for seconds in wall])


# -- what is measured ----------------------------------------------------------------------------


def fastest_dtype() -> str:
    return "bfloat16" if fast_bfloat16() else "float32"


def one_step(work: Workload, device: str) -> Contender:
    return dpmoe(OURS, loader("minilm", fastest_dtype(), device), work, views=1)


def history_step(model: L2Rec, users: int, items: int, device: str) -> Callable[[], object]:
    """Build forward and backward of the model's own loss, for histories of one length."""
    rng = np.random.default_rng(0)

    def some(*shape: int) -> np.ndarray:
        return rng.integers(model.n_items, size=shape, dtype=np.int32)

    histories = Ragged(some(users * items), np.arange(users + 1) * items)
    batch = Batch(np.arange(users), histories, some(users), some(users, 1))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model.loss(batch).total.backward()
        synchronize(device)

    return step


@dataclass(frozen=True)
class RandomVectors:
    """A recommender with random user and item vectors."""

    users: torch.Tensor
    items: torch.Tensor

    @property
    def n_items(self) -> int:
        return len(self.items)

    def scorer(self) -> Scorer:
        return lambda histories: self.users[: len(histories)] @ self.items.T


def ranking(items: int, users: int, dim: int = 64) -> Callable[[], object]:
    rng = np.random.default_rng(0)
    recommender = RandomVectors(torch.randn(users, dim), torch.randn(items, dim))
    histories = Ragged(
        rng.integers(items, size=users * 10, dtype=np.int32), np.arange(users + 1) * 10
    )
    return partial(evaluate, recommender, histories, rng.integers(items, size=users))


def curves(args: argparse.Namespace) -> list[Curve]:
    device, quick = args.device, args.quick
    rounds = 2 if quick else 5

    def some(*x: int) -> list[int]:
        return list(x[:LAST] if quick else x)

    work = Workload(rows=2 if quick else 8)

    def steps(name: str, x_label: str, x: list[int], works: Sequence[Workload]) -> Curve:
        rivals = [one_step(work, device).step for work in works]
        return timed(name, x_label, x, rivals, rounds)

    experts, ranks, rows = (
        some(1, 2, 4, 8, 16, 32),
        some(2, 4, 8, 16, 32, 64),
        some(2, 8, 16, 32, 64),
    )
    tokens = [n * work.tokens for n in rows]
    lengths, catalogs = some(5, 10, 20, 30, 40, 50), some(2_000, 8_000, 16_000, 32_000, 64_000)
    config = L2RecConfig(
        views=("semantic", "behavioral"), max_tokens=512, negatives=1, share_negatives=True
    )
    texts = [simple_text(7 * code) for code in range(500 if quick else 2_000)]
    backbone = loader("minilm", fastest_dtype(), device)()
    model = L2Rec(config, Catalog.of_texts(texts), backbone).to(device).train()
    users, ranked = 2 if quick else 8, 64 if quick else 512
    found = [
        steps("routed experts", "experts", experts, [replace(work, experts=n) for n in experts]),
        steps("rank", "rank of each expert", ranks, [replace(work, rank=n) for n in ranks]),
        steps("batch", "tokens in a batch", tokens, [replace(work, rows=n) for n in rows]),
        timed(
            "history",
            "items of each user, both views",
            lengths,
            [history_step(model, users, n, device) for n in lengths],
            rounds,
        ),
        timed(
            "exact ranking",
            "items in the catalog",
            catalogs,
            [ranking(n, ranked) for n in catalogs],
            rounds,
        ),
    ]
    peaks = [peak_of(n, args) for n in rows]
    if all(peaks):
        found.append(Curve("memory", "tokens in a batch", "MB", tokens, [p or 0.0 for p in peaks]))
    return found


def peak_of(rows: int, args: argparse.Namespace) -> float | None:
    """Measure the MB that a step of ``rows`` rows needs; None where the system cannot tell."""
    options = (f"--memory-of={rows}", f"--device={args.device}", f"--threads={args.threads}")
    return from_child(__file__, *options)


# -- the report ----------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    p = arguments(__file__, __doc__)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)  # what a child is asked
    return p


def main(argv: Sequence[str] | None = None) -> None:
    p = parser()
    args = p.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error(
            "--device cuda: this PyTorch sees no CUDA device; install its CUDA build, or omit it"
        )
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        step = partial(two_steps, one_step(Workload(rows=args.memory_of), args.device))
        print(peak_mb(step, args.device))
        return
    found = curves(args)
    report(
        "growth" if args.device == "cpu" else f"growth-{args.device}",
        args.json,
        goal=f"time and memory grow linearly or better: slope at most {LINEAR}",
        columns=[
            ("curve", "growth with"),
            ("x", "from - to"),
            ("y", "takes"),
            ("slope", f"slope of the last {LAST}"),
        ],
        rows=[
            {
                "curve": f"{curve.name}: {curve.x_label}",
                "x": f"{curve.x[0]:,} - {curve.x[-1]:,}",
                "y": f"{curve.y[0]:.3g} - {curve.y[-1]:.3g} {curve.y_label}",
                "slope": curve.slope,
            }
            for curve in found
        ],
        notes=[
            "Slope: of a line through the last points, both axes logarithmic; 1 is linear. "
            f"In a plot, the dashed line is. MiniLM in {fastest_dtype()}, rows of "
            f"{Workload().tokens} tokens."
        ],
        summary=[
            {
                "path": f"growth with {curve.name}: {curve.x_label}, {curve.y_label}",
                "goal": f"slope at most {LINEAR}",
                "measured": f"{curve.slope:.2f}",
                "reached": curve.slope <= LINEAR,
            }
            for curve in found
        ],
        curves=[{**vars(curve), "slope": curve.slope, "fitted": LAST} for curve in found],
    )


if __name__ == "__main__":
    main()
