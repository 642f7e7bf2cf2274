"""Items that were never sold: recommended by their text alone.

    python examples/cold_items.py          writes into ./example-runs/cold_items

A tenth of the catalog is taken out before training, and put back as new items afterwards.
"""

from __future__ import annotations

import sys
from pathlib import Path

import polars as pl
from shop import write_shop

import l2rec

out = Path(sys.argv[1] if len(sys.argv) > 1 else "example-runs/cold_items")
shop = write_shop(out / "shop")
events, items = pl.read_csv(shop / "events.csv"), pl.read_csv(shop / "items.csv")

cold = items.gather_every(10)
known = items.join(cold, on="item_id", how="anti")
dataset = l2rec.Dataset.from_frames(
    events.join(cold, on="item_id", how="anti"), known, out / "data", text="{title}"
)

# Any method that reads texts will do (`l2rec recipes`); one of ids alone says that it cannot.
model = l2rec.L2Rec(
    "learn",
    model={"dim": 64, "layers": 1, "inner": 128},  # small, as the data are
    training={"epochs": 4, "batch_users": 64, "lr": 1e-3},
    out=out / "run",
)
model.fit(dataset, resume=True)
predictor = model.predictor_
predictor.add_items(dict(cold.select("item_id", "title").iter_rows()))

# A customer who has what a project needs before the new thing, of its brand (after it, where it is
# the first): where does the new thing come among all that they do not have?
brand_of = {item: (item[:2], item[-1]) for item in items["item_id"]}  # an aisle, and a brand
for new in cold["item_id"]:
    others = [item for item in known["item_id"] if brand_of[item] == brand_of[new]]
    history = [item for item in others if item < new][-2:] or others[:2]
    k = predictor.n_items - len(history)
    ranking = [found["id"] for found in predictor.recommend(history, k).items]
    print(f"{predictor.text_of(new):40} rank {ranking.index(new) + 1} of {len(ranking)}")
