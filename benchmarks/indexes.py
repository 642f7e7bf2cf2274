"""Catalog size from which an index pays: every kind, ever more rows, one query and 32 at a time.

    python benchmarks/indexes.py                                  random unit vectors, 384 wide
    python benchmarks/indexes.py --items vectors/items.parquet --queries vectors/users.parquet
    python benchmarks/indexes.py --rows 16859 611000 --kinds exact flat hnsw

With ``--items`` the rows are those of `l2rec embed`; where more are wanted than it has, more are
generated around them (cosine about 0.9), as a catalog has variants of its articles. Random vectors
have no near neighbours, the worst case of an approximate index. ``EXACT_ROWS`` of `l2rec.index`
comes from here.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from l2rec.data.vectors import Floats, read_vectors
from l2rec.index import Exact, Index, build, recall

DIM, NOISE = 384, 0.5


def unit(rows: Floats) -> Floats:
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def catalog(rows: int, known: Floats | None) -> Floats:
    """Make vectors [rows, D]: random, or the known ones and others around them."""
    chance = np.random.default_rng(0)
    if known is None:
        return unit(chance.standard_normal((rows, DIM), dtype=np.float32))
    made = known[np.arange(rows) % len(known)]
    scale = np.float32(NOISE / known.shape[1] ** 0.5)
    for start in range(len(known), rows, 10_000):  # in parts: no second copy of them all
        part = made[start : start + 10_000]
        part += scale * chance.standard_normal(part.shape, dtype=np.float32)
    return unit(made)


def milliseconds(index: Index, queries: Floats, k: int, at_once: int, seconds: float) -> float:
    """Measure milliseconds of one query: the median over searches of ``at_once`` queries."""
    spent: list[float] = []
    started, at = time.perf_counter(), 0
    while len(spent) < 3 or (time.perf_counter() - started < seconds and len(spent) < 200):
        some = queries.take(np.arange(at, at + at_once), axis=0, mode="wrap")
        begun = time.perf_counter()
        index.search(some, k)
        spent.append(time.perf_counter() - begun)
        at += at_once
    return float(np.median(spent[1:])) / at_once * 1000


def measure(
    vectors: Floats, queries: Floats, kind: str, k: int, asked: int, seconds: float
) -> dict[str, Any]:
    started = time.perf_counter()
    index = build(vectors, kind)
    built = time.perf_counter() - started
    return {
        "rows": len(vectors),
        "kind": kind,
        "build_s": round(built, 2),
        "ms_1": round(milliseconds(index, queries, k, 1, seconds), 3),
        "ms_32": round(milliseconds(index, queries, k, 32, seconds), 3),
        "recall": 1.0 if isinstance(index, Exact) else recall(index, vectors, queries[:asked], k),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--items", type=Path)
    parser.add_argument("--queries", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[5_000, 20_000, 50_000, 200_000])
    parser.add_argument("--kinds", nargs="+", default=["exact", "flat", "hnsw", "ivf"])
    parser.add_argument("-k", type=int, default=10)
    parser.add_argument("--asked", type=int, default=200, help="queries of the recall")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement of speed")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    known = None if given.items is None else read_vectors(given.items).vectors
    users = None if given.queries is None else read_vectors(given.queries).vectors
    print(f"{torch.get_num_threads()} threads, k={given.k}")
    found = []
    for rows in given.rows:
        vectors = catalog(rows, known)
        queries = users
        if queries is None:
            queries = catalog((0 if known is None else len(known)) + 1000, known)[-1000:]
        chance = np.random.default_rng(1)
        queries = queries[chance.permutation(len(queries))[:2000]]
        for kind in given.kinds:
            found.append(measure(vectors, queries, kind, given.k, given.asked, given.seconds))
            print("  ".join(f"{name} {value}" for name, value in found[-1].items()), flush=True)
            gc.collect()
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
