"""Your CSV files to recommendations, in Python.

    python examples/your_csv.py            writes into ./example-runs/your_csv

Replace the two tables by your own: events need a user, an item and a time, items a text.
"""

from __future__ import annotations

import sys
from pathlib import Path

import polars as pl
from shop import write_shop

import l2rec

out = Path(sys.argv[1] if len(sys.argv) > 1 else "example-runs/your_csv")
shop = write_shop(out / "shop")

# 1. Tables (polars, pandas or pyarrow) become a data set: checked, fingerprinted, in a folder.
dataset = l2rec.Dataset.from_frames(
    pl.read_csv(shop / "events.csv"),
    pl.read_csv(shop / "items.csv"),
    out=out / "data",
    text="{title}",
)
print(dataset.describe()["history_length"])

# 2. Train. The default recipe is l2rec-plus; here a small form of it, for a minute on one core.
model = l2rec.L2Rec(
    "l2rec-plus",
    model={"view_experts": 2, "rank": 8, "semantic_items": 5, "max_items": 10},
    training={"epochs": 2, "batch_users": 64},
    out=out / "run",
).fit(dataset, resume=True)
for name, scores in model.report_["scores"].items():
    print(f"{name:22} ndcg@10 with the history masked {scores['ndcg@10_masked']:.3f}")

# 3. Recommend: to everybody, to some, or to a history that was never seen.
table = model.recommend(k=5)
print(table.head(5))
print(model.recommend({"a new customer": ["co0a", "co2b"]}, k=3))
print(model.recommend(["u7"], k=3, items_to_recommend=["ga0a", "ga1b", "cy2c", "co3d"]))
table.write_csv(out / "recommendations.csv")
