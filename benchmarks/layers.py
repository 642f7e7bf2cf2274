"""Quality by K of ``item_layers``: how much does L2Rec lose, or win, if items are read once?

    python benchmarks/layers.py --data data/scientific
    python benchmarks/layers.py --data data/scientific --users 1000 --layers 0 6 8 10 \\
        --set backbone.name=FOLDER
    python benchmarks/layers.py --quick           a moment, on generated chains

Every K trains the recipe twice, with the same seed: on as many targets as K = 0 (``--epochs`` of
the recipe), and for as many minutes as these took at K = 0; the learning rate falls to zero at the
end of either. What is compared is validation NDCG@10 over the whole catalog; the test split is not
looked at. With ``--out`` the runs are kept, and a study that was killed goes on from there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import arguments, report
from sasrec import sample

from l2rec.config import load_recipe
from l2rec.console import Console
from l2rec.data.dataset import open_dataset
from l2rec.data.synthetic import chain_dataset
from l2rec.runs.loop import TrainingResult
from l2rec.runs.train import validate_run

RECIPE = "scientific/l2rec-plus"
SHORT = ["model.item_tokens=16", "model.max_tokens=400"]
"""With K = 0 a row must fit into the positions of a BERT."""
LAYERS = (0, 2, 3, 4, 5)
LOST = 0.02
"""Share of NDCG@10 that may be lost at equal targets."""
LONG = 1000
"""Epochs that no study reaches."""
EQUAL = {"targets": "as many targets", "minutes": "as many minutes"}


def trained(
    data: Path, out: Path, recipe: str, overrides: Sequence[str], minutes: float | None, epochs: int
) -> TrainingResult:
    """Train to the end of the epochs, or of the minutes if they are given, and validate there."""
    limit = [f"training.epochs={epochs}", "training.max_minutes=null"]
    if minutes is not None:
        limit = [f"training.epochs={LONG}", f"training.max_minutes={minutes}"]
    config = load_recipe(recipe, [*overrides, *limit, f"training.eval_every={LONG}"])
    return validate_run(config, data, out, progress=Console(), resume=True)


def measured(
    data: Path, runs: Path, recipe: str, layers: Sequence[int], settings: Sequence[str], epochs: int
) -> Iterator[dict[str, Any]]:
    """Train every K under both limits, K = 0 first: it says how many minutes there are."""
    base: TrainingResult | None = None
    for k in layers:
        overrides = [*settings, f"model.item_layers={k}"]
        for equal in EQUAL:
            if k == 0 and base is not None:
                break  # the same run
            minutes = None
            if base is not None and equal == "minutes":
                minutes = max(0.001, round(base.seconds / 60, 3))
            found = trained(data, runs / f"k{k}-{equal}", recipe, overrides, minutes, epochs)
            base = base or found
            valid = found.valid
            yield {
                "k": k,
                "equal": EQUAL[equal] if k else "",
                "untrained": found.untrained["ndcg@10"],
                "steps": found.steps,
                "minutes": found.seconds / 60,
                "ndcg@10": valid["ndcg@10"],
                "masked": valid["ndcg@10_masked"],
                "by_base": valid["ndcg@10"] / base.valid["ndcg@10"] - 1,
                "masked_by_base": valid["ndcg@10_masked"] / base.valid["ndcg@10_masked"] - 1,
                "faster": base.seconds / found.seconds if equal == "targets" else None,
            }


def goals(rows: Sequence[dict[str, Any]], name: str) -> Iterator[dict[str, Any]]:
    for row in rows:
        if not row["k"]:
            continue
        equal = row["equal"] == EQUAL["targets"]
        least = -LOST if equal else 0.0
        yield {
            "path": f"{name}: K = {row['k']}, {row['equal']}",
            "goal": f"at most {LOST:.0%} below K = 0" if equal else "above K = 0",
            "measured": f"ndcg@10 {row['by_base']:+.1%}, masked {row['masked_by_base']:+.1%}",
            "reached": row["by_base"] >= least,
        }


def main(argv: Sequence[str] | None = None) -> None:
    p = arguments(__file__, __doc__)
    p.add_argument("--data", type=Path, metavar="DIR", help="a prepared data set")
    p.add_argument("--users", type=int, help="some of its users, with their items (default: all)")
    p.add_argument("--recipe", default=RECIPE, help="of L2Rec (default %(default)s)")
    p.add_argument("--layers", type=int, nargs="+", default=LAYERS, metavar="K", help="0 first")
    p.add_argument("--epochs", type=int, default=1, help="of K = 0 (default %(default)s)")
    p.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="more of the recipe")
    p.add_argument(
        "--out", type=Path, metavar="DIR", help="keep the runs here, and go on from them"
    )
    p.add_argument("--name", help="of the table (default: of the data)")
    args = p.parse_args(argv)
    if args.layers[0] != 0:
        p.error("--layers begins with 0, which the others are compared with")
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        runs = args.out or Path(folder)
        settings = [*SHORT, *args.set]
        if args.quick or args.data is None:
            data = chain_dataset(Path(folder) / "chains", 100, 60, 10, seed=0).path
            settings += ["model.semantic_items=5", "training.user_share=0.5"]
        elif args.users:
            data = runs / "data"
            if not (data / "dataset.json").is_file():
                sample(open_dataset(args.data), args.users, 0, data)
        else:
            data = args.data
        users = open_dataset(data).n_users
        rows = list(measured(data, runs, args.recipe, args.layers, settings, args.epochs))
    name = args.name or (args.data.name if args.data else "chains")
    report(
        f"layers-{name}",
        args.json,
        goal="Items that are read once cost at most 2% at equal targets and win at equal minutes",
        columns=[
            ("k", "K"),
            ("equal", "trained on"),
            ("steps", "steps"),
            ("minutes", "minutes"),
            ("faster", "times faster"),
            ("untrained", "ndcg@10 untrained"),
            ("ndcg@10", "ndcg@10"),
            ("by_base", "by K = 0"),
            ("masked", "ndcg@10 masked"),
            ("masked_by_base", "by K = 0, masked"),
        ],
        rows=rows,
        notes=[
            f"{name}: {users:,} users, all of them ranked; validation; recipe {args.recipe}, seed "
            f"{load_recipe(args.recipe, settings).seed}. Changes by K = 0 are shares."
        ],
        summary=list(goals(rows, name)),
    )


if __name__ == "__main__":
    main()
