"""Share of real tokens among those computed: padding, in training and in encoding.

    python benchmarks/padding.py --data data/scientific data/games
    python benchmarks/padding.py --quick          a data set of its own, of chains

Everything up to the transformer is the product's own code: the batches of one epoch as training
plans them, items and users as encoding batches them. A counter replaces the transformer, whose
output changes no shape. Attention pads each row to the longest of its bucket, and the tokens it
computes are counted; linear layers, norms and adapters see real tokens, and the fillers that lay a
batch on a ladder of shapes (bfloat16 on a CPU), which are counted too.

    text vectors  of the whole catalog, by the bare backbone, as a model is built
    training      every batch of one epoch: histories, and encoded targets and negatives
    items         every item of the catalog (a table of items is not encoded)
    users         every user of the data set, whole history
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import arguments, report
from torch import Tensor

from l2rec.config import RunConfig, load_recipe
from l2rec.data.catalog import Catalog
from l2rec.data.dataset import Dataset, open_dataset
from l2rec.data.splits import leave_one_out
from l2rec.data.synthetic import chain_dataset
from l2rec.methods.l2rec import L2Rec
from l2rec.modules.backbone import load_backbone
from l2rec.modules.packing import Packing
from l2rec.runs.predictor import build_model

RECIPES = {
    "scientific/l2rec": [],
    # All layers read the rows, which must fit into the positions of a BERT.
    "scientific/l2rec-plus": [
        "model.item_layers=0",
        "model.item_tokens=16",
        "model.max_tokens=400",
    ],
}
"""Recipes, and what is changed of them."""
GOAL = 0.95


@dataclass
class Count:
    """Calls of the transformer, real tokens, and tokens computed."""

    batches: int = 0
    tokens: int = 0
    computed: int = 0


class Counter:
    """A module in the transformer's place that counts tokens and returns its input."""

    def __init__(self) -> None:
        self.count = Count()

    def __call__(self, inputs_embeds: Tensor, packing: Packing) -> Tensor:
        self.count.batches += 1
        self.count.tokens += packing.tokens
        self.count.computed += packing.computed
        return inputs_embeds

    def taken(self) -> Count:
        """Return the counts since the last call and reset them."""
        count, self.count = self.count, Count()
        return count


def train_epoch(model: L2Rec, config: RunConfig, dataset: Dataset) -> None:
    """Run one epoch without gradients."""
    batches = model.batches(
        leave_one_out(dataset.sequences).train,
        seed=config.seed,
        epoch=0,
        batch_users=config.training.batch_users,
        batch_tokens=config.training.batch_tokens,
    )
    for batch in batches.iterate():
        model.loss(batch)


@torch.inference_mode()
def measure(dataset: Dataset, recipe: str, overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    # Adapters act inside the transformer: without it there is nothing for them to adapt.
    config = load_recipe(recipe, ["model.adapt=false", *overrides])
    backbone, counter = load_backbone(config.backbone), Counter()
    backbone.forward = counter  # type: ignore[method-assign, assignment]
    model: L2Rec = build_model(config, Catalog(dataset.catalog), backbone, None)
    found = {"text vectors": counter.taken()}
    train_epoch(model, config, dataset)
    found["training"] = counter.taken()
    model.encode_items(np.arange(model.n_items))
    found["items"] = counter.taken()
    model.encode_users(dataset.sequences.take(np.flatnonzero(dataset.sequences.lengths)))
    found["users"] = counter.taken()
    return [
        {
            "data": dataset.name,
            "recipe": recipe,
            "pass": name,
            **asdict(count),
            "share": count.tokens / count.computed,
            "reached": count.tokens >= GOAL * count.computed,
        }
        for name, count in found.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    p = arguments(__file__, __doc__)
    p.add_argument("--data", type=Path, nargs="+", metavar="DIR", help="prepared data sets")
    args = p.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        datasets = [open_dataset(path) for path in args.data or ()]
        if not datasets:
            datasets = [chain_dataset(Path(folder) / "chains", 500, 200, 12, seed=0)]
        rows = [
            row
            for dataset in datasets
            for recipe, overrides in list(RECIPES.items())[: 1 if args.quick else None]
            for row in measure(dataset, recipe, overrides)
        ]
    lowest = {
        name: min((row for row in rows if row["pass"] == name), key=lambda row: row["share"])
        for name in dict.fromkeys(row["pass"] for row in rows)
    }
    report(
        "padding",
        args.json,
        goal=f"at least {GOAL:.0%} of the tokens that are computed are real",
        columns=[
            ("data", "data"),
            ("recipe", "recipe"),
            ("pass", "pass"),
            ("batches", "batches"),
            ("tokens", "real tokens"),
            ("computed", "computed"),
            ("share", "share"),
            ("reached", "reached"),
        ],
        rows=rows,
        notes=[
            "Padding is computed by attention alone; linear layers and adapters see real tokens "
            "and fillers, which are counted. Both views of a batch are counted together."
        ],
        summary=[
            {
                "path": f"padding: {name}",
                "goal": f"at least {GOAL:.0%} real tokens",
                "measured": f"{row['share']:.1%} ({row['data']}, {row['recipe']}: the lowest)",
                "reached": row["reached"],
            }
            for name, row in lowest.items()
        ],
    )


if __name__ == "__main__":
    main()
