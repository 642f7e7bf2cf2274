"""Indexes: what each kind finds against all inner products, and what is refused from disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.unit.conftest import Finished
from tests.unit.tiny_run import Quiet

from l2rec import index as ix
from l2rec.errors import CheckpointError, ConfigError, DataError
from l2rec.index import Exact, build, build_folder, load, read_vectors, recall, save
from l2rec.runs import embed_run


def unit(n: int, dim: int = 16, seed: int = 0) -> ix.Floats:
    rows = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


VECTORS, QUERIES = unit(600), unit(40, seed=1)


def options(kind: str, folder: Path) -> dict[str, str]:
    if kind == "milvus":
        pytest.importorskip("milvus_lite", reason="milvus-lite is not installed")
        return {"uri": str(folder / "milvus.db")}
    if kind != "exact":
        pytest.importorskip("faiss", reason="FAISS is not installed")
    return {}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ix.KINDS)
def test_every_kind_finds_what_there_is_and_comes_back_from_disk(kind: str, tmp_path: Path) -> None:
    made = build(VECTORS, kind, **options(kind, tmp_path))
    assert made.kind == kind and len(made) == 600
    rows, scores = made.search(QUERIES, 10)
    assert rows.shape == scores.shape == (40, 10)
    assert rows.dtype == np.int64 and scores.dtype == np.float32
    real = rows >= 0
    asked = np.broadcast_to(np.arange(40)[:, None], rows.shape)[real]
    np.testing.assert_allclose(
        scores[real], (QUERIES[asked] * VECTORS[rows[real]]).sum(-1), atol=1e-5
    )
    assert (np.diff(np.where(real, scores, -9.0), axis=1) <= 1e-6).all(), "best first"
    found = recall(made, VECTORS, QUERIES, 10)
    assert found == 1.0 if kind in ("exact", "flat") else found > 0.5
    ids = [f"item-{n}" for n in range(600)]
    save(made, tmp_path / "index", ids=ids, version="v1")
    again, names, version = load(tmp_path / "index")
    assert (names, version, again.kind) == (ids, "v1", kind)
    np.testing.assert_array_equal(again.search(QUERIES, 10)[0], rows)


def test_exact_is_the_sorted_matrix_with_ties_by_row() -> None:
    vectors = np.concatenate((VECTORS[:50], VECTORS[:50]))  # every score twice
    rows, _ = Exact(vectors).search(QUERIES, 100)
    scores = QUERIES @ vectors.T
    for query in range(len(QUERIES)):
        best = np.lexsort((np.arange(100), -scores[query].round(5)))
        assert rows[query].tolist() == best.tolist()
    rows, scores = Exact(VECTORS[:3]).search(QUERIES[:2], 5)
    assert rows[:, 3:].tolist() == [[-1, -1]] * 2 and np.isneginf(scores[:, 3:]).all()


def test_size_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss", reason="FAISS is not installed")
    monkeypatch.setattr(ix, "EXACT_ROWS", 100)
    monkeypatch.setattr(ix, "FLAT_ROWS", 500)
    assert [build(VECTORS[:n]).kind for n in (100, 101, 501)] == ["exact", "flat", "hnsw"]
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert build(VECTORS).kind == "exact", "without FAISS there is always exact"
    with pytest.raises(ConfigError, match=r"needs FAISS: pip install 'l2rec\[faiss\]'"):
        build(VECTORS, "hnsw")


def test_what_cannot_be_built() -> None:
    for given, message in (
        ((VECTORS[:0],), "an index needs rows"),
        ((np.full((2, 3), np.nan, dtype=np.float32),), "not finite"),
    ):
        with pytest.raises(DataError, match=message):
            build(*given)
    with pytest.raises(ConfigError, match="index kind 'annoy': choose auto or one of exact"):
        build(VECTORS, "annoy")
    with pytest.raises(ConfigError, match="index kind 'exact' has no option 'ef'"):
        build(VECTORS, "exact", ef=3)
    with pytest.raises(ConfigError, match="kind=milvus needs a uri"):
        build(VECTORS, "milvus")


# ------------------------------------------------------------------------------- on disk


def test_what_is_refused_from_disk(tmp_path: Path) -> None:
    folder, ids = tmp_path / "index", [str(n) for n in range(600)]
    save(build(VECTORS, "exact"), folder, ids=ids, version="v")
    with pytest.raises(DataError, match="3 ids for an index of 600 rows"):
        save(build(VECTORS, "exact"), folder, ids=["a", "b", "c"], version="v")
    good = (folder / "vectors.npy").read_bytes()
    (folder / "vectors.npy").write_bytes(good[:-4])
    with pytest.raises(CheckpointError, match=r"vectors.npy is torn or was edited"):
        load(folder)
    (folder / "vectors.npy").write_bytes(good)
    manifest = json.loads((folder / ix.MANIFEST).read_text())
    for change, message in (
        ({"format": 99}, "index of format 99, this l2rec reads 1"),
        ({"rows": 5}, "600 rows and 600 ids"),
        ({"kind": "annoy"}, "index kind 'annoy' is not known"),
        ({"files": {"../x": "0"}}, "torn or was edited"),
        ({"files": None}, "torn or edited"),
    ):
        (folder / ix.MANIFEST).write_text(json.dumps(manifest | change))
        with pytest.raises(CheckpointError, match=message):
            load(folder)
    (folder / ix.MANIFEST).write_text("{")
    with pytest.raises(CheckpointError, match="torn or edited"):
        load(folder)
    (folder / ix.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"is no index: index.json is missing"):
        load(folder)
    with pytest.raises(CheckpointError, match="is not an index; choose another folder"):
        save(build(VECTORS, "exact"), folder, ids=ids, version="v")


WRITER = """
import sys
from pathlib import Path
import numpy as np
from l2rec.index import build, save
n = 0
while True:
    n += 1
    vectors = np.full((4000, 16), float(n), dtype=np.float32)
    save(build(vectors, "exact"), Path(sys.argv[1]), ids=[str(n)] * 4000, version=str(n))
    print(n, flush=True)
"""


def test_a_kill_leaves_the_old_index_or_the_new_one(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    chance = np.random.default_rng(0)
    for _ in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(chance.uniform(0, 0.2))
        os.kill(writer.pid, signal.SIGKILL)
        writer.stdout.close()
        writer.wait()
        index, ids, version = load(folder)
        assert isinstance(index, Exact) and len(index) == 4000
        assert set(ids) == {version} and float(index.vectors[0, 0]) == float(version)


# ------------------------------------------------------------------------------- from a run


def test_from_embed_to_index(table_run: Finished, tmp_path: Path) -> None:
    embed_run(table_run.run, tmp_path, Quiet())
    given = read_vectors(tmp_path / "items.parquet")
    assert len(given.ids) == len(given.vectors) and given.vectors.dtype == np.float32
    facts = build_folder(
        tmp_path / "items.parquet",
        tmp_path / "index",
        kind="exact",
        queries=tmp_path / "users.parquet",
        k=5,
    )
    assert facts["recall@5 of exact"] == 1.0 and facts["rows"] == len(given.ids)
    index, ids, version = load(tmp_path / "index")
    assert (ids, version) == (given.ids, given.version) and len(index) == len(ids)
    with pytest.raises(ConfigError, match="k=0; choose 1 or more"):
        build_folder(tmp_path / "items.parquet", tmp_path / "index", k=0)


def test_vectors_that_are_not_whole(table_run: Finished, tmp_path: Path) -> None:
    embed_run(table_run.run, tmp_path, Quiet(), with_users=False)
    path = tmp_path / "items.parquet"
    table = pq.ParquetFile(path).read()
    pq.write_table(table.slice(0, 5), path)
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        read_vectors(path)
    pq.write_table(table.replace_schema_metadata({}), path)
    with pytest.raises(CheckpointError, match="holds no vectors of `l2rec embed`"):
        read_vectors(path)
    other = ["x", *table["version"].to_pylist()[1:]]
    pq.write_table(table.set_column(2, "version", [other]), path)
    with pytest.raises(CheckpointError, match="vectors of 2 versions"):
        read_vectors(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="holds no vectors"):
        read_vectors(path)
