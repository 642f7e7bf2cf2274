#!/usr/bin/env bash
# milvus-lite 3.2.2: count(*) of a partition is that of the whole collection.
#
# Expected: query(collection, output_fields=["count(*)"], partition_names=["a"]) counts the rows of
# partition a, as a query for its rows returns them, and as a server does. Seen: it counts the rows of
# all partitions, without an error; whoever checks so that a partition is full believes it.
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

from pymilvus import MilvusClient

client = MilvusClient(uri=sys.argv[1])
client.create_collection("c", dimension=4, metric_type="IP", consistency_level="Strong")
for name, rows in (("a", range(3)), ("b", range(3, 10))):
    client.create_partition("c", name)
    client.insert("c", [{"id": n, "vector": [n, 1, 1, 1]} for n in rows], partition_name=name)
counted = client.query("c", output_fields=["count(*)"], partition_names=["a"])[0]["count(*)"]
listed = len(client.query("c", filter="id >= 0", output_fields=["id"], partition_names=["a"]))
print(f"milvus-lite {version('milvus-lite')}: partition a lists {listed} rows, counts {counted}")
sys.exit(not (listed == 3 and counted == 10))
PY
"$work/venv/bin/python" "$work/look.py" "$work/lite.db"
