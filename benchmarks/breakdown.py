"""Time of one training step by part: batch, forward, backward and optimiser of the real model.

    python benchmarks/breakdown.py                          chains of a synthetic catalog
    python benchmarks/breakdown.py --data data/scientific   a prepared data set
    python benchmarks/breakdown.py --recipe scientific/l2rec-plus

Some rounds run the step as training does and take the processor time of the thread for each of its
stretches. Others take it around every single operation and give it to the part of the model that
called it; an operation of the backward belongs to the part whose forward it differentiates, which
autograd's sequence numbers tell. What is left of a stretch is Python and autograd between the
operations. The two kinds of round alternate; all figures are medians, on one thread: a thread's own
clock does not see others.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from measure import arguments, median, report
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import l2rec.modules.experts
from l2rec.config import RunConfig, load_recipe
from l2rec.data.batches import TrainingBatches
from l2rec.data.catalog import Catalog
from l2rec.data.dataset import Dataset, open_dataset
from l2rec.data.splits import leave_one_out
from l2rec.data.synthetic import chain_dataset
from l2rec.methods.l2rec import L2Rec
from l2rec.modules.backbone import load_backbone

FROZEN = "frozen backbone: matrix products"
ATTENTION = "frozen backbone: attention"
ACTIVATION = "frozen backbone: GELU or its like"
NORMS = "frozen backbone: norms"
RESIDUALS = "frozen backbone: residuals, packing"
EXPERTS = "experts: matrix products"
SCALING = "experts: scaling, casts, sums"
ROUTERS = "routers, gates, load balance"
FUSION = "pooling and fusion"
LOSSES = "losses"
INPUTS = "inputs of both views"
BATCH = "batch: users, items, negatives"
OPTIMIZER = "optimiser, with clipping"
SUMS = "sums of gradients"
BETWEEN = "Python and autograd in between"

BESIDE = (BATCH, OPTIMIZER, INPUTS, BETWEEN)
"""What a step does beside the operations of model and loss."""
BESIDE_GOAL = 0.10

PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.addmm_.default,
    torch.ops.aten.bmm.default,
}
ADDITIONS = {torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor}
FORWARD, BACKWARD = "forward", "backward"
Key = tuple[str, str]
"""A part, and where in the step."""


class PartClock(TorchDispatchMode):
    """Processor seconds of each operation, by the part of the model that it belongs to."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.frozen = {parameter.data_ptr() for parameter in backbone.parameters()}
        self.seconds: dict[Key, float] = defaultdict(float)
        self.scopes = [LOSSES]
        self.stretch = FORWARD
        self.part_of: dict[int, str] = {}  # autograd's sequence number -> part

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        part = self.forward_part() if self.stretch == FORWARD else self.backward_part(func)
        if func in PRODUCTS and part in (FROZEN, SCALING):
            # An adapted matrix and its experts are one function: the operands tell them apart.
            pointers = {arg.data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
            part = FROZEN if pointers & self.frozen else EXPERTS
        started = time.thread_time()
        result = func(*args, **(kwargs or {}))
        self.seconds[part, self.stretch] += time.thread_time() - started
        return result

    def forward_part(self) -> str:
        part = self.scopes[-1]
        # An operation's node is made just before the operation runs, so the first one to run under
        # a number is the one that made it.
        self.part_of.setdefault(torch._C._autograd._get_sequence_nr() - 1, part)
        return part

    def backward_part(self, func: Any) -> str:
        node = torch._C._current_autograd_node()
        # No part's backward adds anything; autograd does, where a tensor was used more than once.
        if node is None or func in ADDITIONS:
            return SUMS
        return self.part_of.get(node._sequence_nr(), SUMS)

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        self.scopes.append(part)
        try:
            yield
        finally:
            self.scopes.pop()

    def scoped(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def inside(*args: Any, **kwargs: Any) -> Any:
            with self.within(part):
                return function(*args, **kwargs)

        return inside

    @contextmanager
    def watching(self, model: L2Rec) -> Iterator[None]:
        """Let the model's modules and methods open scopes of their own."""
        calls = [
            (model, "_input", INPUTS),
            (model, "_transform", RESIDUALS),
            (model, "_read", FUSION),
            (model.items, "place", FUSION),
            (model.fusion, "forward", FUSION),
            (model.experts, "adapted", SCALING),
            (model.experts, "_from_user", ROUTERS),
            (model.experts, "_fused_scores", ROUTERS),
            (l2rec.modules.experts, "top_n", ROUTERS),
            (l2rec.modules.experts, "load_balance", ROUTERS),
        ]
        with ExitStack() as stack:
            for owner, name, part in calls:
                wrapped = self.scoped(getattr(owner, name), part)
                stack.enter_context(patch.object(owner, name, wrapped))
            for module in model.backbone.model.modules():
                if inside := part_of_module(module):
                    before = module.register_forward_pre_hook(
                        lambda *_, inside=inside: self.scopes.append(inside)
                    )
                    after = module.register_forward_hook(lambda *_: void(self.scopes.pop()))
                    stack.callback(before.remove)
                    stack.callback(after.remove)
            yield


def void(_: object) -> None:
    """Drop a value, because a hook must return nothing."""


def part_of_module(module: nn.Module) -> str | None:
    """Name the part of a backbone module; None for one that counts to the part around it."""
    kind = type(module).__name__
    if isinstance(module, nn.Linear):
        return FROZEN
    if hasattr(module, "is_causal"):  # what Hugging Face's attention modules have in common
        return ATTENTION
    if kind.endswith("Norm"):
        return NORMS
    if kind.endswith("Activation") or isinstance(module, nn.GELU | nn.SiLU):
        return ACTIVATION
    return None


class Step:
    """One training step of a recipe, on one batch of a data set."""

    def __init__(self, config: RunConfig, dataset: Dataset) -> None:
        self.config = config
        torch.manual_seed(config.seed)
        backbone = load_backbone(config.backbone)
        self.model = L2Rec(config.model, Catalog(dataset.catalog), backbone).train()
        stages = self.model.stages(config.training.lr, config.training.weight_decay)
        groups = [group for stage in stages for group in stage.groups]
        self.parameters = [p for group in groups for p in group.parameters]
        self.optimizer = torch.optim.AdamW(
            [{"params": g.parameters, "lr": g.lr, "weight_decay": g.weight_decay} for g in groups]
        )
        self.batches: TrainingBatches = self.model.batches(
            leave_one_out(dataset.sequences).train,
            seed=config.seed,
            epoch=0,
            batch_users=config.training.batch_users,
            batch_tokens=config.training.batch_tokens,
        )
        self.number = len(self.batches) // 2  # batches are in random order
        self.tokens = 0

    def plain(self) -> dict[Key, float]:
        """Measure processor seconds of each stretch, the inputs apart from the forward."""
        seconds: dict[Key, float] = defaultdict(float)

        @contextmanager
        def taking(part: str, stretch: str) -> Iterator[None]:
            started = time.thread_time()
            yield
            seconds[part, stretch] += time.thread_time() - started

        make_input = self.model._input

        def timed_input(*args: Any) -> Any:
            with taking(INPUTS, FORWARD):
                return make_input(*args)

        with taking(BATCH, FORWARD):
            batch = self.batches[self.number]
        with taking(OPTIMIZER, BACKWARD):
            self.optimizer.zero_grad(set_to_none=True)
        with patch.object(self.model, "_input", timed_input), taking(BETWEEN, FORWARD):
            losses = self.model.loss(batch)
        with taking(BETWEEN, BACKWARD):
            losses.total.backward()
        with taking(OPTIMIZER, BACKWARD):
            nn.utils.clip_grad_norm_(self.parameters, self.config.training.clip)
            self.optimizer.step()
        self.tokens = losses.tokens
        seconds[BETWEEN, FORWARD] -= seconds[INPUTS, FORWARD]
        return seconds

    def watched(self) -> dict[Key, float]:
        """Measure processor seconds of each part's operations, forward and backward."""
        batch = self.batches[self.number]
        self.optimizer.zero_grad(set_to_none=True)
        clock = PartClock(self.model.backbone)
        with clock.watching(self.model), clock:
            losses = self.model.loss(batch)
            clock.stretch = BACKWARD
            losses.total.backward()
        clock.seconds.pop((INPUTS, FORWARD), None)  # which `plain` takes as a whole
        return clock.seconds


def measured(step: Step, rounds: int) -> dict[Key, float]:
    """Measure median seconds of each part; what lies between its operations counts as Python."""
    step.plain()
    plain, watched = [], []
    for _ in range(rounds):
        plain.append(step.plain())
        watched.append(step.watched())
    stretches, operations = medians(plain), medians(watched)
    for stretch in (FORWARD, BACKWARD):
        inside = sum(seconds for (_, where), seconds in operations.items() if where == stretch)
        stretches[BETWEEN, stretch] = max(0.0, stretches[BETWEEN, stretch] - inside)
    return {**operations, **stretches}


def medians(rounds: Sequence[dict[Key, float]]) -> dict[Key, float]:
    keys = {key for seconds in rounds for key in seconds}
    return {key: median(seconds.get(key, 0.0) for seconds in rounds) for key in keys}


def rows(seconds: dict[Key, float]) -> list[dict[str, Any]]:
    """List parts, the largest first; shares add up to 100%."""
    total = sum(seconds.values())
    table = []
    for part in {part for part, _ in seconds}:
        forward, backward = (seconds.get((part, where), 0.0) for where in (FORWARD, BACKWARD))
        table.append(
            {
                "part": part,
                "forward": 1e3 * forward,
                "backward": 1e3 * backward,
                "share": (forward + backward) / total,
                "percent": f"{(forward + backward) / total:.1%}",
            }
        )
    return sorted(table, key=lambda row: -row["share"])


def main(argv: Sequence[str] | None = None) -> None:
    p = arguments(__file__, __doc__)
    p.add_argument("--data", type=Path, metavar="DIR", help="a prepared data set")
    p.add_argument("--recipe", default="scientific/l2rec", help="default %(default)s")
    p.add_argument("--rounds", type=int, default=5, help="of each kind (default %(default)s)")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    config = load_recipe(args.recipe, ["training.batch_users=8"] if args.quick else [])
    with tempfile.TemporaryDirectory() as folder:
        dataset = (
            open_dataset(args.data)
            if args.data
            else chain_dataset(folder, n_users=256, n_items=500, length=30, seed=0)
        )
        step = Step(config, dataset)
        seconds = measured(step, 2 if args.quick else args.rounds)
    table = rows(seconds)
    beside = sum(row["share"] for row in table if row["part"] in BESIDE)
    total, what = sum(seconds.values()), args.data.name if args.data else "chains"
    report(
        "breakdown",
        args.json,
        goal="a step spends its time in the model: at most "
        f"{BESIDE_GOAL:.0%} in batches, inputs, optimiser and Python",
        columns=[
            ("part", f"{args.recipe} on {what}"),
            ("forward", "forward, ms"),
            ("backward", "backward or after, ms"),
            ("percent", "of the step"),
        ],
        rows=table,
        notes=[
            f"One step of {step.tokens:,} tokens, {total:.2f} s of one thread. Medians of thread "
            "time around every operation; a backward operation counts for the part whose forward "
            "it differentiates."
        ],
        summary=[
            {
                "path": f"training step beside the model ({args.recipe} on {what})",
                "goal": f"at most {BESIDE_GOAL:.0%}",
                "measured": f"{beside:.1%}",
                "reached": beside <= BESIDE_GOAL,
            }
        ],
    )


if __name__ == "__main__":
    main()
