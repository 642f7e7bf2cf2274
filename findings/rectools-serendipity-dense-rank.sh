#!/usr/bin/env bash
# RecTools 0.19.0: Serendipity takes every item that anybody has had for one of the most popular.
#
# Expected: the metric is the gap between an item's place in the user's list and its rank by popularity,
# both out of the number of items, so a hit at the top of a list counts about 1 if its item is among
# the least popular, and about as much whether one user has had it or none.
# Seen: of 1,000 items, a hit whose item one user has had counts 0.049, one whose item none has had 1.0.
# _get_item_popularity_ranks numbers the distinct counts, 50 of them here, not the items, and fit divides
# that number by the number of items; an item without a count is given probability 0 there.
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  rectools==0.19.0 numpy==1.26.4 pandas==2.3.3 scipy==1.17.1
cat >"$work/look.py" <<'PY'
import sys
from importlib.metadata import version

import pandas as pd
from rectools import Columns
from rectools.metrics import Serendipity

N = 1000
counts = [1 + (N - 2 - item) // 20 for item in range(N - 1)] + [0]
events = [(user, item) for item, count in enumerate(counts) for user in range(count)]
before = pd.DataFrame(events, columns=[Columns.User, Columns.Item])
metric = Serendipity(k=1)


def worth(item):
    """Return what a hit at the top counts, and the same by the item's rank among the items."""
    hit = pd.DataFrame({Columns.User: [0], Columns.Item: [item], Columns.Rank: [1]})
    seen = metric.calc(hit, hit, prev_interactions=before, catalog=range(N))
    return seen, sum(count > counts[item] for count in counts) / N


print(f"RecTools {version('rectools')}: {N:,} items, {len(set(counts) - {0})} distinct counts")
worths = {}
for item in (0, N // 2, N - 2, N - 1):
    worths[item] = worth(item)
    seen, by_items = worths[item]
    print(f"item of {counts[item]} users: counts {seen:.3f}, by its rank among the items {by_items:.3f}")
(one, one_by_items), (none, _) = worths[N - 2], worths[N - 1]
if not (one < 0.1 and one_by_items > 0.9 and none == 1.0):
    sys.exit("changed")
PY
"$work/venv/bin/python" "$work/look.py"
