"""One training step of L2Rec and of HDRec on the same users: time, memory, products.

    python benchmarks/systems.py --data data/scientific
    python benchmarks/systems.py --data data/scientific --users 64 --dtypes bfloat16

A step is everything that one batch of users asks of a system, forward and backward, without the
optimiser: for HDRec with T = 2 one update of either side, which reads the texts twice and the ids
once, and its item alignment; for L2Rec both views of the users and, in the paper's form, their
target items and negatives; in the catalog form no item is read. All read the same newest items of
the same training sequences, cut at as many tokens, on the same frozen backbone, with adapters of
rank 8 on the same matrices. Seconds are medians of interleaved rounds, the ratio is taken within
rounds; memory is the peak above what was loaded, in a process of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measure import arguments, from_child, interleave, median, peak_mb, ratio, report
from torch.utils.flop_counter import FlopCounterMode

from l2rec.config import load_recipe
from l2rec.data.catalog import Catalog
from l2rec.data.dataset import Dataset, open_dataset
from l2rec.data.splits import leave_one_out
from l2rec.modules.backbone import load_backbone
from l2rec.protocols import updates
from l2rec.runs.predictor import build_model

PEER = "L2Rec, the paper's form"
SYSTEMS = {
    PEER: ("scientific/l2rec", []),
    "L2Rec, the whole catalog": (
        "scientific/l2rec-plus",
        ["model.view_experts=8", "model.item_layers=0"],
    ),
    "HDRec, alternating": ("scientific/hdrec", []),
    "HDRec, both sides at once": ("scientific/hdrec", ["model.alternate=false"]),
    "HDRec, text alone": ("scientific/hdrec", ["model.design=text"]),
}
SAME = {"max_items": 18, "item_tokens": 24, "max_tokens": 512, "matrices": "[q,k,v,o]", "rank": 8}


class Step:
    """A system with its batch: called, it does the work of one training step."""

    def __init__(self, name: str, dataset: Dataset, users: int, dtype: str) -> None:
        recipe, own = SYSTEMS[name]
        same = [f"model.{key}={value}" for key, value in SAME.items()]
        config = load_recipe(recipe, [f"backbone.dtype={dtype}", *same, *own])
        torch.manual_seed(0)
        backbone = load_backbone(config.backbone)
        self.model = build_model(config, Catalog(dataset.catalog), backbone, None).train()
        self.stage = self.model.stages(config.training.lr, 0.0)[-1]
        self.trained = [p for group in self.stage.groups for p in group.parameters]
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for parameter in self.trained:
            parameter.requires_grad_(True)
        train = leave_one_out(dataset.sequences).train
        whole = train.take(torch.arange(min(users, len(train))).numpy())
        (self.batch,) = self.stage.batches(
            whole, seed=0, epoch=0, batch_users=users, batch_tokens=10**9
        ).iterate()
        self.tokens = self.updates = 0

    def __call__(self) -> None:
        for parameter in self.trained:
            parameter.grad = None
        self.tokens = self.updates = 0
        for losses in updates(self.stage.loss(self.batch)):
            losses.total.backward()
            self.tokens += losses.tokens
            self.updates += 1


def memory(name: str, data: Path, users: int, dtype: str) -> float | None:
    options = ["--data", str(data), "--users", str(users), "--dtypes", dtype, "--child", name]
    return from_child(__file__, *options, "--threads", str(torch.get_num_threads()))


def main(argv: Sequence[str] | None = None) -> None:
    p = arguments(__file__, __doc__)
    p.add_argument("--data", type=Path, required=True, metavar="DIR", help="a prepared data set")
    p.add_argument("--users", type=int, default=32, help="of a batch (default %(default)s)")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--dtypes", default="float32,bfloat16")
    p.add_argument("--child", choices=SYSTEMS, help="only the peak memory of one system, in MB")
    args = p.parse_args(list(sys.argv[1:] if argv is None else argv))
    if args.threads:
        torch.set_num_threads(args.threads)
    dataset = open_dataset(args.data)
    if args.child:
        step = Step(args.child, dataset, args.users, args.dtypes)
        print(peak_mb(lambda: (step(), step())))
        return
    rounds, users = (1, 4) if args.quick else (args.rounds, args.users)
    rows: list[dict[str, Any]] = []
    for dtype in args.dtypes.split(","):
        steps = {name: Step(name, dataset, users, dtype) for name in SYSTEMS}
        wall, cpu = interleave(list(steps.values()), rounds, warmup=1)
        peer = list(steps).index(PEER)
        for number, (name, step) in enumerate(steps.items()):
            with FlopCounterMode(display=False) as counter:
                step()
            rows.append(
                {
                    "dtype": dtype,
                    "system": name,
                    "updates": step.updates,
                    "tokens": step.tokens,
                    "trained": sum(q.numel() for q in step.trained),
                    "seconds": median(wall[number]),
                    "ratio": ratio(wall[number], wall[peer]),
                    "cpu": ratio(cpu[number], cpu[peer]),
                    "gflop": counter.get_total_flops() / 1e9,
                    "memory": None if args.quick else memory(name, args.data, users, dtype),
                }
            )
    report(
        "systems",
        args.json,
        goal="what a step of HDRec costs beside one of L2Rec, on the same users",
        columns=[
            ("dtype", "dtype"),
            ("system", "system"),
            ("updates", "updates"),
            ("tokens", "tokens read"),
            ("trained", "trained parameters"),
            ("seconds", "step, s"),
            ("ratio", f"by {PEER}"),
            ("cpu", "CPU by it"),
            ("gflop", "GFLOP"),
            ("memory", "memory, MB"),
        ],
        rows=rows,
        notes=[
            f"Data {dataset.name}, fingerprint {dataset.fingerprint}, {users} users, their newest "
            f"{SAME['max_items']} items of at most {SAME['item_tokens']} tokens."
        ],
        summary=[],
    )


if __name__ == "__main__":
    main()
