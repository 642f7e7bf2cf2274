"""Vectors of users and items as Parquet, and an index that finds the nearest items.

python examples/embed_and_index.py     writes into ./example-runs/embed_and_index
"""

from __future__ import annotations

import sys
from pathlib import Path

import polars as pl
from shop import write_shop

import l2rec
from l2rec import index
from l2rec.console import Console
from l2rec.runs.embed import embed_run

out = Path(sys.argv[1] if len(sys.argv) > 1 else "example-runs/embed_and_index")
shop = write_shop(out / "shop")
dataset = l2rec.Dataset.from_frames(
    pl.read_csv(shop / "events.csv"), pl.read_csv(shop / "items.csv"), out / "data", text="{title}"
)
model = l2rec.L2Rec(
    "learn",
    model={"dim": 64, "layers": 1, "inner": 128},  # small, as the data are
    training={"epochs": 4, "batch_users": 64, "lr": 1e-3},
    out=out / "run",
)
model.fit(dataset, resume=True)

# id, vector, version: what a warehouse, a vector database or another model's features can take.
with Console() as console:
    for path, rows, width in embed_run(model.run_, out / "vectors", console).files:
        print(f"{path}: {rows} vectors of {width} numbers")

# `exact` needs nothing; "hnsw" or "ivf" need the extra faiss, "milvus" a server.
folder = out / "index"
print(index.build_folder(out / "vectors" / "items.parquet", folder, kind="exact", k=10))
nearest, ids, version = index.load(folder)

titles = dict(pl.read_csv(shop / "items.csv").select("item_id", "title").iter_rows())
users = model.predictor_.encode_users([["co0a", "co2b"], ["cl1c"]])
rows, scores = nearest.search(users.cpu().numpy(), 5)
for found, values in zip(rows, scores, strict=True):
    print(
        [
            (titles[ids[row]], round(float(score), 3))
            for row, score in zip(found, values, strict=True)
        ]
    )
