#!/usr/bin/env bash
# milvus-lite 3.2.2: dropping a collection that an alias names succeeds, and takes the alias with it.
#
# Expected: an error, as of a server, which asks for the alias to be dropped or moved first: programs
# search by it. Seen: no error; from then on a search by the alias meets "does not exist". A swap that
# drops the old collection before it moves the alias passes its tests on milvus-lite.
#
# Also, filter_params, the templates of filters that Milvus documents, are not filled: the braces are
# a syntax error.
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

from pymilvus import MilvusClient, MilvusException

client = MilvusClient(uri=sys.argv[1])
client.create_collection("old", dimension=4, metric_type="IP", consistency_level="Strong")
client.insert("old", [{"id": n, "vector": [n, 1, 1, 1]} for n in range(3)])
client.create_alias("old", "shop")


def refused(**options):
    try:
        return "", client.search("shop", [[1, 1, 1, 1]], limit=1, **options)
    except MilvusException as error:
        return error.message, None


plain, _ = refused(filter="id in [1, 2]")
template, _ = refused(filter="id in {ids}", filter_params={"ids": [1, 2]})
client.drop_collection("old")
gone, _ = refused()
print(f"milvus-lite {version('milvus-lite')}: after the drop, a search by the alias: {gone}")
print(f"a filter: {plain or 'works'}; the same as a template: {template}")
sys.exit(not ("does not exist" in gone and not plain and "unexpected character" in template))
PY
"$work/venv/bin/python" "$work/look.py" "$work/lite.db"
