#!/usr/bin/env bash
# milvus-lite 3.2.2: an index of a loaded collection is "Finished" and yet not used until it is loaded again.
#
# Expected: once describe_index says that all rows are indexed and the state is Finished, a search has
# the speed and the recall of that index. Seen: a collection that was loaded before its rows came
# compares every query with every row, whatever was asked for; an inverted file of 64 lists that probes
# one of them finds everything. After release_collection and load_collection the same search finds a
# fifth. Until then any word passes for an index: one of type NONSENSE is Finished too. What a program
# measures right after it has filled a collection is what the next one that opens it does not get.
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    milvus-lite==3.2.2 pymilvus==3.0.2 numpy==2.4.1
cat >"$work/look.py" <<'PY'
import sys
from importlib.metadata import version

import numpy as np
from pymilvus import MilvusClient

rows = np.random.default_rng(0).normal(size=(4000, 64)).astype(np.float32)
queries, exact = rows[:100], np.argsort(-(rows[:100] @ rows.T), axis=1)[:, :10]
client = MilvusClient(uri=sys.argv[1])


def fill(name, kind, params):
    client.create_collection(name, dimension=64, metric_type="IP")
    client.release_collection(name)
    client.drop_index(name, "vector")
    index = client.prepare_index_params()
    index.add_index("vector", index_type=kind, metric_type="IP", params=params)
    client.create_index(name, index)
    client.load_collection(name)
    client.insert(name, [{"id": n, "vector": row.tolist()} for n, row in enumerate(rows)])
    client.flush(name)
    return client.describe_index(name, client.list_indexes(name)[0])


def recall(name):
    search = {"metric_type": "IP", "params": {"nprobe": 1}}
    found = client.search(name, queries.tolist(), limit=10, search_params=search)
    ids = [{hit["id"] for hit in hits} for hits in found]
    return sum(len(some & set(best)) for some, best in zip(ids, exact.tolist())) / exact.size


told = fill("ivf", "IVF_FLAT", {"nlist": 64})
before = recall("ivf")
client.release_collection("ivf")
client.load_collection("ivf")
after = recall("ivf")
odd = fill("odd", "NONSENSE", {})
print(f"milvus-lite {version('milvus-lite')}: IVF_FLAT, {told['indexed_rows']} rows, {told['state']}")
print(f"recall@10 of one list in 64: {before:.2f}, loaded again {after:.2f}")
print(f"index of type {odd['index_type']}: {odd['state']}")
kept = told["state"] == odd["state"] == "Finished" and odd["index_type"] == "NONSENSE"
sys.exit(not (kept and before == 1.0 and after < 0.5))
PY
"$work/venv/bin/python" "$work/look.py" "$work/lite.db"
