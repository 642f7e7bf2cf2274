"""A training step and the encoding of items, here and in an earlier build, on the same users.

    git worktree add ../earlier 114fdeb
    python benchmarks/earlier.py --data data/scientific --earlier ../earlier
    python benchmarks/earlier.py --data data/scientific --earlier ../earlier --only minilm,qwen3
    python benchmarks/earlier.py --quick --earlier ../earlier       generated chains, one round

A step is the loss of one batch of users of both views, its backward and the optimiser's update. The
earlier build runs all layers of the backbone on every token; this one does (K = 0), or reads items
once and runs the layers from K on. Each is a process of its own, and they take their steps in turn
(A B C A B C ...), so that a machine that gets slower affects all of them; what is compared is
processor seconds, within rounds. All steps of a round have the same users and targets.

    minilm          recipe scientific/l2rec as it is: 24 tokens of an item
    paper           the same, texts up to 128 tokens, T = 512
    mpnet           all-mpnet-base-v2, from a folder (--mpnet), 16 tokens of an item, every position
                    against the whole catalog, against K = 0: builds before 2026-11-28 cannot run it
    qwen3           the shapes of Qwen3-0.6B, random weights, the paper's form, T = 512
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import arguments, median, ratio, report

from l2rec.config import load_recipe
from l2rec.data.catalog import Catalog
from l2rec.data.dataset import open_dataset
from l2rec.data.splits import leave_one_out
from l2rec.data.synthetic import chain_dataset

SHORT = ["model.item_tokens=16", "model.max_tokens=400"]
PAPER = ["model.item_tokens=128", "model.max_tokens=512", "model.negatives=1"]
CATALOG_RECIPE, PAPER_RECIPE = "scientific/l2rec-plus", "scientific/l2rec"
BEFORE = "earlier build"
ITEMS = 64
"""Items that are encoded in a round."""


@dataclass(frozen=True)
class Work:
    """Recipe and options, users of a batch, the K to compare, how many times faster they are to be,
    and whether the earlier build can run it.
    """

    recipe: str
    options: Sequence[str]
    users: int
    layers: Sequence[int]
    goal: float
    before: bool = True


WORK = {
    "minilm": Work(PAPER_RECIPE, [], 64, (0, 3, 4, 5), 2.5),
    "paper": Work(PAPER_RECIPE, PAPER, 32, (0, 3, 4, 5), 3),
    "mpnet": Work(CATALOG_RECIPE, SHORT, 16, (0, 6, 8, 10), 3, before=False),
    "qwen3": Work(PAPER_RECIPE, PAPER, 4, (0, 14, 21, 24), 4),
}


# -- a process that takes steps when it is told to -----------------------------------------------


def child(recipe: str, data: Path, users: int, overrides: Sequence[str]) -> None:
    """Answer every line of standard input with one of JSON: what a step, or encoding, took."""
    try:
        from l2rec.runs.predictor import backbone_of, build_model
    except ImportError:  # an earlier build has them elsewhere
        from l2rec.runs import backbone_of, build_model  # type: ignore[no-redef,attr-defined]

    config, dataset = load_recipe(recipe, overrides), open_dataset(data)
    torch.manual_seed(0)
    model = build_model(config, Catalog(dataset.catalog), backbone_of(config), data / "cache")
    stage = model.stages(config.training.lr, config.training.weight_decay)[-1]
    trained = [p for group in stage.groups for p in group.parameters]
    optimizer = torch.optim.AdamW(trained, lr=config.training.lr)
    train = leave_one_out(dataset.sequences).train
    able = np.flatnonzero(train.lengths > 1)
    first = steps = 0
    for line in sys.stdin:
        if line.strip() == "encode":
            items = np.arange(first, first + ITEMS, dtype=np.int32) % model.n_items
            first += ITEMS
            model.eval()
            began = time.process_time()
            model.encode_items(items)
            found = {"seconds": time.process_time() - began}
        else:
            # Not batches of the whole log: these are drawn up by what items cost, which K changes.
            some = np.arange(steps * users, (steps + 1) * users) % len(able)
            steps += 1
            (batch,) = stage.batches(
                train.take(able[some]), seed=0, epoch=0, batch_users=1 << 20, batch_tokens=1 << 40
            ).iterate()
            model.train()
            began = time.process_time()
            losses = stage.loss(batch)
            optimizer.zero_grad(set_to_none=True)
            losses.total.backward()
            optimizer.step()
            found = {
                "seconds": time.process_time() - began,
                "targets": int(batch.targets.size),
                "met": int(batch.histories.values.sum()),
                "tokens": int(losses.tokens),
            }
        print(json.dumps(found), flush=True)


class Contender:
    """A process that takes steps, and what they took."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.steps: list[dict[str, Any]] = []
        self.encoded: list[float] = []

    def ask(self, what: str) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


@contextmanager
def started(
    work: Work, data: Path, overrides: Sequence[str], checkout: Path | None
) -> Iterator[Contender]:
    """Start a process of this build, or of a checkout of an earlier one."""
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    source = Path(__file__).parents[1] if checkout is None else checkout
    environment["PYTHONPATH"] = str(source / "src")
    command = [sys.executable, __file__, "--child", work.recipe, str(data), str(work.users)]
    with subprocess.Popen(
        [*command, *overrides],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Contender(process)
        finally:
            process.kill()


def qwen3_folder(folder: Path) -> Path:
    """Write a configuration with the shapes of Qwen3-0.6B and a tokenizer, without weights."""
    from transformers import AutoTokenizer, Qwen3Config

    from l2rec.modules.backbone import minilm_source

    tokenizer = AutoTokenizer.from_pretrained(minilm_source())
    tokenizer.save_pretrained(folder)
    Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
    ).save_pretrained(folder)
    return folder


def measured(
    name: str, work: Work, data: Path, options: Sequence[str], earlier: Path, rounds: int
) -> Iterator[dict[str, Any]]:
    """Take steps in turn; yield a row for the earlier build, the base of the others, and each K."""
    overrides = [*work.options, *options]
    with ExitStack() as stack:
        rivals = {}
        if work.before:
            rivals[BEFORE] = stack.enter_context(started(work, data, overrides, earlier))
        for k in work.layers:
            own = [*overrides, f"model.item_layers={k}"]
            rivals[f"K = {k}"] = stack.enter_context(started(work, data, own, None))
        for number in range(1 + rounds):
            for rival in rivals.values():
                step, encoded = rival.ask("step"), rival.ask("encode")["seconds"]
                if number:
                    rival.steps.append(step)
                    rival.encoded.append(encoded)
        base = next(iter(rivals.values()))
        same = [[(s["targets"], s["met"]) for s in rival.steps] for rival in rivals.values()]
        assert all(one == same[0] for one in same), "steps of other histories"
        for rival, contender in rivals.items():
            seconds = [s["seconds"] for s in contender.steps]
            row = {
                "work": name,
                "contender": rival,
                "users": work.users,
                "targets": median([s["targets"] for s in contender.steps]),
                "tokens": median([s["tokens"] for s in contender.steps]),
                "seconds": median(seconds),
                "faster": ratio([s["seconds"] for s in base.steps], seconds),
                "items": ITEMS / median(contender.encoded),
                "items_faster": ratio(base.encoded, contender.encoded),
            }
            print(row, file=sys.stderr, flush=True)
            yield row


def main(argv: Sequence[str] | None = None) -> None:
    p = arguments(__file__, __doc__)
    p.add_argument("--data", type=Path, metavar="DIR", help="a prepared data set")
    p.add_argument("--earlier", type=Path, required=True, help="checkout of an earlier build")
    p.add_argument("--mpnet", type=Path, metavar="DIR", help="all-mpnet-base-v2")
    p.add_argument("--only", default=",".join(WORK), help="some of %(default)s")
    p.add_argument("--rounds", type=int, default=7, help="(default %(default)s)")
    args = p.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    names = args.only.split(",")
    if unknown := set(names) - WORK.keys():
        p.error(f"--only {', '.join(sorted(unknown))}: choose from {', '.join(WORK)}")
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or chain_dataset(Path(folder) / "chains", 200, 100, 12, seed=0).path
        more = {"qwen3": [f"backbone.name={qwen3_folder(Path(folder) / 'qwen3')}"]}
        more["qwen3"] += ["backbone.random_weights=true"]
        if args.mpnet is not None:
            more["mpnet"] = [f"backbone.name={args.mpnet}"]
        elif "mpnet" in names:
            names.remove("mpnet")
        rounds = 1 if args.quick else args.rounds
        rows = [
            row
            for name in names
            for row in measured(
                name, WORK[name], data, more.get(name, []), args.earlier.resolve(), rounds
            )
        ]
    report(
        "earlier",
        args.json,
        goal="A step takes a fraction of what it took when every layer read every item again",
        columns=[
            ("work", "work"),
            ("contender", "contender"),
            ("users", "users"),
            ("targets", "targets"),
            ("tokens", "tokens"),
            ("seconds", "CPU s of a step"),
            ("faster", "times faster"),
            ("items", "items/s encoded"),
            ("items_faster", "times faster, items"),
        ],
        rows=rows,
        notes=[f"{rounds} rounds after 1. {ITEMS} items are encoded after each step."],
        summary=[
            {
                "path": f"step: {row['work']}, {row['contender']}",
                "goal": f"at least {WORK[row['work']].goal:g} times the targets/s of "
                + ("the earlier build" if WORK[row["work"]].before else "K = 0"),
                "measured": f"{row['faster']:.2f} x",
                "reached": row["faster"] >= WORK[row["work"]].goal,
            }
            for row in rows
            if row["contender"] not in (BEFORE, "K = 0")
        ],
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        recipe, data, users, *overrides = sys.argv[2:]
        child(recipe, Path(data), int(users), overrides)
    else:
        main()
