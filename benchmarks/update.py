"""Bringing a run up to date against training it anew, on the last tenth of a log by time.

    python benchmarks/update.py --data data/games-days --recipe games/l2rec-plus
    python benchmarks/update.py --data data/ml-100k --recipe sasrec

The log is cut at a moment, --share of its events before it. A run is trained on the part before;
then `l2rec update` goes on from it with the rest, and the same recipe is trained anew on the whole.
Both are tested on the same newest events, as is the earlier run as it was, on the grown catalog.
Minutes are of training and validation, by the clock.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import torch
from measure import arguments, report

from l2rec.config import load_recipe
from l2rec.data.dataset import Dataset, open_dataset
from l2rec.data.formats.columns import Columns
from l2rec.data.formats.open import open_source
from l2rec.runs.launch import Silent
from l2rec.runs.train import train_run
from l2rec.studies.update import update_run

MAIN = "ndcg@10"
KEPT = 0.98
"""Share of the full training's score that an update is to reach."""


class Lines(Silent):
    """Progress that prints its lines."""

    def line(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def cut(data: Path, share: float, folder: Path) -> tuple[Dataset, Path, Path]:
    """Cut a data set at a moment: the part before as a data set, the rest as a log and catalog."""
    dataset = open_dataset(data)
    owners = np.repeat(np.arange(dataset.n_users), np.diff(dataset.offsets))
    events = pl.DataFrame(
        {
            "user_id": dataset.user_ids.to_numpy(zero_copy_only=False)[owners],
            "item_id": dataset.item_ids.to_numpy(zero_copy_only=False)[np.asarray(dataset.items)],
            "timestamp": np.asarray(dataset.timestamps),
        }
    )
    moment = float(np.quantile(np.asarray(dataset.timestamps), share))
    catalog = cast(pl.DataFrame, pl.from_arrow(dataset.catalog)).select("item_id", "text")
    before = Dataset.from_frames(
        events.filter(pl.col("timestamp") < moment), catalog, folder / "before", progress=False
    )
    newer, items = folder / "newer.parquet", folder / "items.parquet"
    events.filter(pl.col("timestamp") >= moment).write_parquet(newer)
    catalog.write_parquet(items)
    return before, newer, items


def row(name: str, found: dict[str, Any], whole: dict[str, Any]) -> dict[str, object]:
    """Return the row of a run: its scores, and its minutes beside those of the full training."""
    scores = found["scores"][found["method"]]
    minutes = (found["training_seconds"] + found["validation_seconds"]) / 60
    all_minutes = (whole["training_seconds"] + whole["validation_seconds"]) / 60
    return {
        "name": name,
        "recall": scores["recall@10"],
        "ndcg": scores[MAIN],
        "masked": scores[f"{MAIN}_masked"],
        "kept": scores[f"{MAIN}_masked"] / whole["scores"][whole["method"]][f"{MAIN}_masked"],
        "minutes": minutes,
        "share": minutes / all_minutes,
    }


def main(argv: Sequence[str] | None = None) -> None:
    p = arguments(__file__, __doc__)
    p.add_argument("--data", type=Path, required=True, help="data set folder, with times")
    p.add_argument("--recipe", default="sasrec", help="recipe (default %(default)s)")
    p.add_argument("--override", nargs="*", default=[], metavar="KEY=VALUE", help="of the recipe")
    p.add_argument("--share", type=float, default=0.9, help="events before (default %(default)s)")
    args = p.parse_args(sys.argv[1:] if argv is None else argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    quick = ["training.max_minutes=0.1"] if args.quick else []
    config = load_recipe(args.recipe, [*args.override, *quick])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        before, newer, items = cut(args.data, args.share, folder)
        train_run(config, before.path, folder / "first", progress=Lines())
        log = open_source(newer, items=items, columns=Columns())
        updated = update_run(folder / "first", log, folder / "updated", progress=Lines())
        grown = folder / "updated-data"
        whole = train_run(config, grown, folder / "whole", progress=Lines())
        as_it_was = {
            **updated,
            "scores": {updated["method"]: updated["scores"]["before fine-tuning"]},
            "training_seconds": 0.0,
            "validation_seconds": 0.0,
        }
        new = open_dataset(grown)
    rows = [
        row("trained anew", whole, whole),
        row("updated", updated, whole),
        row("not updated", as_it_was, whole),
    ]
    kept, share = rows[1]["kept"], rows[1]["share"]
    report(
        "update",
        args.json,
        goal="an update keeps the quality of a full training in a part of its time",
        columns=[
            ("name", "run"),
            ("recall", "recall@10"),
            ("ndcg", MAIN),
            ("masked", f"{MAIN} masked"),
            ("kept", "kept"),
            ("minutes", "minutes"),
            ("share", "by anew"),
        ],
        rows=rows,
        notes=[
            f"{args.recipe} {' '.join(args.override)} on {args.data.name}: "
            f"{before.n_events:,} events before, {new.n_events - before.n_events:,} newer, "
            f"{new.n_items - before.n_items:,} items and {new.n_users - before.n_users:,} users "
            "are new."
        ],
        summary=[
            {
                "path": f"update, {args.recipe} on {args.data.name}",
                "goal": f"{KEPT} of the score of a full training",
                "measured": f"{kept:.3f} in {share:.0%} of its time",
                "reached": float(cast(float, kept)) >= KEPT,
            }
        ],
    )


if __name__ == "__main__":
    main()
