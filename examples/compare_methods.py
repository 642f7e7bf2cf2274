"""Three methods on one data set, with what they have to beat: one table, paired tests.

python examples/compare_methods.py     writes into ./example-runs/compare_methods
"""

from __future__ import annotations

import sys
from pathlib import Path

import polars as pl
from shop import write_shop

import l2rec
from l2rec.studies.compare import compare_runs
from l2rec.studies.tables import markdown

out = Path(sys.argv[1] if len(sys.argv) > 1 else "example-runs/compare_methods")
shop = write_shop(out / "shop")
dataset = l2rec.Dataset.from_frames(
    pl.read_csv(shop / "events.csv"), pl.read_csv(shop / "items.csv"), out / "data", text="{title}"
)

# Ids alone, texts alone, both: the same split, the same loop, the same evaluator.
METHODS = {
    "gru4rec": {"training": {"epochs": 10, "batch_users": 64}},
    "learn": {
        "model": {"dim": 64, "layers": 1, "inner": 128},
        "training": {"epochs": 4, "batch_users": 64, "lr": 1e-3},
    },
    "sasrec-table": {"training": {"epochs": 4, "batch_users": 64}},
}
runs = [
    l2rec.L2Rec(name, **changes, seed=1, out=out / name).fit(dataset, resume=True).run_
    for name, changes in METHODS.items()
]

# Recall, NDCG and MRR of each, the best of a column in bold, a dagger where a paired t-test sees a
# difference, then the same for short and long histories. One seed is no result: the l2rec command
# `l2rec compare` takes several runs of one recipe and shows their mean and deviation.
text = markdown(compare_runs(runs))
print(text)
(out / "comparison.md").write_text(text, encoding="utf-8")
