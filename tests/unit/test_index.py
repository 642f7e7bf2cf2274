"""Indexes: what each kind finds against all inner products, what is refused from disk, kills."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tests.support.errors import one_line
from tests.support.runs import Finished, Quiet
from typer.testing import CliRunner

from l2rec.cli import app
from l2rec.data.catalog import with_separator
from l2rec.data.dataset import open_dataset
from l2rec.data.prepare import PrepareConfig, prepare
from l2rec.data.vectors import Floats, read_vectors, vectors_hash, vectors_table
from l2rec.errors import CheckpointError, ConfigError, DataError, StorageError
from l2rec.index import (
    KINDS,
    Attribute,
    Exact,
    Milvus,
    build,
    build_folder,
    building,
    load,
    recall,
    save,
)
from l2rec.index import exact as exact_module
from l2rec.index import folder as folder_module
from l2rec.index import milvus as milvus_module
from l2rec.index.building import searched
from l2rec.index.faiss import SMALL
from l2rec.index.folder import MANIFEST
from l2rec.index.protocol import Rows
from l2rec.runs.embed import embed_run

milvus_is_loud = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def unit(n: int, dim: int = 16, seed: int = 0) -> Floats:
    rows = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


VECTORS, QUERIES = unit(600), unit(40, seed=1)
IDS = [f"item-{n}" for n in range(600)]


def options(kind: str, folder: Path) -> dict[str, Any]:
    if kind == "milvus":
        pytest.importorskip("milvus_lite", reason="milvus-lite is not installed")
        return {"uri": str(folder / "milvus.db")}
    if kind != "exact":
        pytest.importorskip("faiss", reason="FAISS is not installed")
    return {}


def embedded(
    path: Path, vectors: Floats, version: str = "v1", ids: list[str] | None = None
) -> Path:
    named = [f"item-{n}" for n in range(len(vectors))] if ids is None else ids
    pq.write_table(vectors_table(named, vectors, version), path)
    return path


# ------------------------------------------------------------------------------- kinds


@milvus_is_loud
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_finds_what_there_is_and_comes_back_from_disk(kind: str, tmp_path: Path) -> None:
    made = build(VECTORS, kind, **options(kind, tmp_path))
    assert (made.kind, len(made), made.dim) == (kind, 600, 16)
    rows, scores = made.search(QUERIES, 10)
    assert rows.shape == scores.shape == (40, 10)
    assert rows.dtype == np.int64 and scores.dtype == np.float32
    real = rows >= 0
    asked = np.broadcast_to(np.arange(40)[:, None], rows.shape)[real]
    rounding = 1e-2 if kind in SMALL else 1e-5
    np.testing.assert_allclose(
        scores[real], (QUERIES[asked] * VECTORS[rows[real]]).sum(-1), atol=rounding
    )
    assert (np.diff(np.where(real, scores, -9.0), axis=1) <= 0).all(), "best first"
    found = recall(made, VECTORS, QUERIES, 10)
    assert found == 1.0 if kind in ("exact", "flat") else found > 0.8
    save(made, tmp_path / "index", ids=IDS, version="v1")
    again, names, version = load(tmp_path / "index")
    assert (names, version, again.kind, again.dim) == (IDS, "v1", kind, 16)
    np.testing.assert_array_equal(again.search(QUERIES, 10)[0], rows)
    np.testing.assert_array_equal(again.search(QUERIES[:0], 10)[0], np.zeros((0, 10)))
    rows, scores = again.search(QUERIES[:2], 700)
    assert rows[:, 600:].tolist() == [[-1] * 100] * 2 and np.isneginf(scores[rows < 0]).all()
    if kind in ("exact", "flat"):
        assert np.sort(rows[:, :600]).tolist() == [list(range(600))] * 2
    for asked, k, message in (
        (QUERIES[:, :8], 3, r"queries of shape \[40, 8\]; this index takes \[B, 16\]"),
        (QUERIES[0], 3, r"queries of shape \[16\]"),
        (QUERIES * np.nan, 3, "queries hold numbers that are not finite"),
        (QUERIES, 0, "k=0; choose 1 or more"),
    ):
        with pytest.raises(DataError, match=message):
            again.search(asked, k)


def test_places_may_be_named_by_texts(tmp_path: Path) -> None:
    source, out = embedded(tmp_path / "items.parquet", VECTORS), tmp_path / "index"
    facts = build_folder(str(source), str(out), kind="exact", queries=str(source))
    assert facts["rows"] == len(load(str(out))[0]) == len(VECTORS)
    index, ids, version = load(out)
    save(index, str(tmp_path / "again"), ids=ids, version=version)
    assert load(tmp_path / "again")[1:] == (ids, version)
    with pytest.raises(CheckpointError, match=r"is no index: index\.json is missing"):
        load(source)


def test_fewer_bits_take_less_room(tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="FAISS is not installed")
    wide = unit(2000, 128)
    source = embedded(tmp_path / "items.parquet", wide)
    asked = embedded(tmp_path / "users.parquet", wide[:50] + 0.02 * unit(50, 128, seed=2))
    facts = {
        kind: build_folder(source, tmp_path / kind, kind=kind, queries=asked)
        for kind in ("flat", *SMALL)
    }
    assert facts["int8"]["recall@10"] > 0.95 and facts["binary"]["recall@10"] > 0.6
    assert facts["int8"]["megabytes"] < 0.35 * facts["flat"]["megabytes"]
    assert facts["binary"]["megabytes"] < 0.45 * facts["flat"]["megabytes"]
    plain = build(wide, "binary")
    plain.index.k_factor = 1.0
    few = recall(plain, wide, read_vectors(asked).vectors, 10)
    assert few < facts["binary"]["recall@10"], "rescoring is worth something"


@pytest.mark.parametrize("kind", ["exact", "flat"])
def test_equal_scores_are_in_order_of_row_across_the_cut_too(kind: str, tmp_path: Path) -> None:
    few = np.eye(4, dtype=np.float32)[[0, 1, 0, 2, 1, 0, 3, 0]]  # small integers: true ties
    vectors = np.concatenate([few] * 30)
    made = build(vectors, kind, **options(kind, tmp_path))
    queries = np.array([[4, 3, 2, 1], [1, 4, 2, 3], [1, 1, 1, 1]], dtype=np.float32)
    for k in (1, 7, 100, 240):
        rows, scores = made.search(queries, k)
        for query, found, its in zip(queries, rows, scores, strict=True):
            best = np.lexsort((np.arange(240), -(vectors @ query)))[:k]
            assert found.tolist() == best.tolist()
            assert its.tolist() == (vectors @ query)[best].tolist()


def test_exact_in_blocks_is_the_sorted_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Exact(VECTORS).search(QUERIES, 600)
    best = np.argsort(-(QUERIES @ VECTORS.T), axis=1, kind="stable")
    assert (whole[0] == best).mean() > 0.999, "but for rounding"
    monkeypatch.setattr(exact_module, "BLOCK_SCORES", 7 * 600)
    np.testing.assert_array_equal(Exact(VECTORS).search(QUERIES, 600)[0], whole[0])


def test_size_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss", reason="FAISS is not installed")
    monkeypatch.setattr(building, "EXACT_ROWS", 100)
    assert [build(VECTORS[:n]).kind for n in (100, 101)] == ["exact", "hnsw"]
    assert build(VECTORS * 3).kind == "exact", "a graph is for unit vectors"
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert build(VECTORS).kind == "exact", "without FAISS there is always exact"
    with pytest.raises(ConfigError, match=r"needs FAISS: pip install 'l2rec\[faiss\]'"):
        build(VECTORS, "hnsw")
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(ConfigError, match=r"needs pymilvus: pip install 'l2rec\[milvus\]'"):
        build(VECTORS, "milvus", uri="http://127.0.0.1:19530")


def test_faiss_has_the_threads_that_torch_has() -> None:
    faiss = pytest.importorskip("faiss", reason="FAISS is not installed")
    made, before = build(VECTORS, "flat"), torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made.search(QUERIES, 3)
            assert faiss.omp_get_max_threads() == threads
            torch.randn(300, 300) @ torch.randn(300, 300)  # both libraries' threads, in turn
    finally:
        torch.set_num_threads(before)


def test_options_of_faiss() -> None:
    pytest.importorskip("faiss", reason="FAISS is not installed")
    narrow, wide = (build(VECTORS, "ivf", lists=15, probes=probes) for probes in (1, 15))
    assert recall(narrow, VECTORS, QUERIES, 10) < 0.9 < recall(wide, VECTORS, QUERIES, 10) == 1.0
    assert (narrow.search(QUERIES, 600)[0] == -1).any(), "one list does not have all rows"
    assert build(VECTORS[:3], "ivf").search(QUERIES, 3)[0].shape == (40, 3)
    with pytest.raises(ConfigError, match=r"probes=0: choose 1\.\.600"):
        build(VECTORS, "ivf", probes=0)
    with pytest.raises(ConfigError, match=r"lists=601: choose 1\.\.600"):
        build(VECTORS, "ivf", lists=601)
    with pytest.raises(ConfigError, match=r"ef=0: choose 1\.\.65536"):
        build(VECTORS, "hnsw", ef=0)


def test_recall_counts_rows_that_tie_with_the_last() -> None:
    class Found(Exact):
        def search(self, queries: Floats, k: int) -> tuple[Rows, Floats]:
            rows = np.broadcast_to(np.array([self.rows]), (len(queries), k))
            return rows, np.zeros((len(queries), k), dtype=np.float32)

        rows: list[int]

    vectors = np.eye(4, dtype=np.float32)[[0, 1, 1, 1, 2]]
    query = np.array([[3, 2, 1, 0]], dtype=np.float32)  # best: 0, then 1, 2 and 3 alike, then 4
    for rows, share in (([0, 1], 1.0), ([0, 3], 1.0), ([0, 4], 0.5), ([0, 0], 0.5), ([4, -1], 0.0)):
        fake = Found(vectors)
        fake.rows = rows
        assert recall(fake, vectors, query, 2) == share
    with pytest.raises(DataError, match="no queries; recall needs some"):
        recall(Exact(vectors), vectors, query[:0], 2)


def test_what_cannot_be_built(tmp_path: Path) -> None:
    for given, message in (
        ((VECTORS[:0],), r"vectors of shape \[0, 16\]; an index needs rows"),
        ((VECTORS[0],), r"vectors of shape \[16\]"),
        ((np.full((2, 3), np.nan, dtype=np.float32),), "not finite"),
    ):
        with pytest.raises(DataError, match=message):
            build(*given)
    for kind, given_options, text in (
        ("annoy", {}, "index kind 'annoy': choose auto or one of exact"),
        ("exact", {"ef": 3}, "index kind 'exact' has no option 'ef'"),
        ("milvus", {}, r"kind=milvus needs a uri: a server's, or a file ending in \.db"),
        ("milvus", {"uri": str(tmp_path / "file")}, r"a server's, such as http://host:19530, or"),
        ("milvus", {"uri": "http://root:secret@127.0.0.1:1"}, "put user:password in L2REC_MILVUS"),
    ):
        with pytest.raises(ConfigError, match=text) as raised:
            build(VECTORS, kind, **given_options)
        assert "secret" not in str(raised.value)


# ------------------------------------------------------------------------------- Milvus


@milvus_is_loud
def test_a_collection_belongs_to_one_folder_and_must_be_whole(tmp_path: Path) -> None:
    uri = options("milvus", tmp_path)["uri"]
    one = embedded(tmp_path / "one.parquet", VECTORS, "one")
    two = embedded(tmp_path / "two.parquet", VECTORS[:500], "two")
    for out in ("a", "b"):
        facts = build_folder(one, tmp_path / out, kind="milvus", uri=uri)
        assert facts["recall@10"] > 0.9 and facts["kind"] == "milvus"
    a, b = (load(tmp_path / out)[0] for out in ("a", "b"))
    assert isinstance(a, Milvus) and isinstance(b, Milvus)
    assert a.collection != b.collection
    build_folder(two, tmp_path / "a", kind="milvus", uri=uri)
    index, ids, version = load(tmp_path / "a")
    assert (len(index), len(ids), version) == (500, 500, "two")
    assert not a.client.has_collection(a.collection), "of what was replaced"
    assert load(tmp_path / "b")[2] == "one"
    shutil.copytree(tmp_path / "b", tmp_path / "copy")
    build_folder(one, tmp_path / "copy", kind="exact")
    load(tmp_path / "b")  # the copy's old collection was not its own
    b.client.delete(b.collection, ids=[3, 4])
    with pytest.raises(CheckpointError, match="has 598 rows, not 600; build the index again"):
        load(tmp_path / "b")
    assert build_folder(one, tmp_path / "b", kind="milvus", uri=uri)["rows"] == 600
    load(tmp_path / "b")
    b.drop()
    with pytest.raises(CheckpointError, match="is missing; build the index again"):
        load(tmp_path / "b")
    with pytest.raises(StorageError, match=r"Milvus at .*milvus\.db: is it up\?"):
        b.search(QUERIES, 3)


@milvus_is_loud
def test_folders_of_one_path_on_two_machines_have_collections_of_their_own(tmp_path: Path) -> None:
    """Two machines, one server: the same vectors into the same path, then others on one of them."""
    uri, out = options("milvus", tmp_path)["uri"], tmp_path / "v" / "index"
    one, two = embedded(tmp_path / "1", VECTORS), embedded(tmp_path / "2", VECTORS[::-1], "v2")
    theirs = build_folder(one, out, kind="milvus", uri=uri)["collection"]
    out.parent.rename(tmp_path / "of another machine")
    ours = build_folder(one, out, kind="milvus", uri=uri)["collection"]
    assert ours != theirs
    index = load(out)[0]
    assert isinstance(index, Milvus)
    newer = build_folder(two, out, kind="milvus", uri=uri)["collection"]
    assert set(index.client.list_collections()) == {theirs, newer}

    # A copy of the folder owns nothing, though it lies where the one that was copied lay.
    (tmp_path / "other").mkdir()
    shutil.move(out, tmp_path / "other" / "index")
    shutil.move(out.parent, tmp_path / "of a third machine")
    shutil.copytree(tmp_path / "other" / "index", out)
    build_folder(one, out, kind="milvus", uri=uri)
    assert len(index.client.list_collections()) == 3


@milvus_is_loud
def test_a_folder_from_before_there_were_tokens_keeps_its_collections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, out = options("milvus", tmp_path)["uri"], tmp_path / "index"
    one, two = embedded(tmp_path / "1", VECTORS), embedded(tmp_path / "2", VECTORS[::-1], "v2")
    with monkeypatch.context() as patch:
        patch.setattr(building, "own_collections", lambda folder: None)
        first = build_folder(one, out, kind="milvus", uri=uri, alias="shop")["collection"]
    second = build_folder(two, out, kind="milvus", uri=uri)["collection"]
    index = load(out)[0]
    assert isinstance(index, Milvus) and second[:23] == first[:23]
    assert index.client.list_collections() == [second]
    assert index.client.describe_alias("shop")["collection_name"] == second


@milvus_is_loud
def test_the_recall_that_is_printed_is_that_of_the_index_that_is_loaded(tmp_path: Path) -> None:
    """milvus-lite builds what it searches when a collection is loaded; before, it is exact."""
    uri = options("milvus", tmp_path)["uri"]
    vectors = unit(1500, dim=64)  # random: a narrow search misses some
    items = embedded(tmp_path / "items.parquet", vectors)
    facts = build_folder(items, tmp_path / "index", kind="milvus", uri=uri, k=10)
    assert facts["search"] == "HNSW graph, 32 links, ef 128"
    some = vectors[np.unique(np.linspace(0, 1499, 1000).astype(np.int64))]
    index = load(tmp_path / "index")[0]
    assert isinstance(index, Milvus) and index.ef == 128
    assert facts["recall@10"] == round(recall(index, vectors, some, 10), 4)
    # And it is a graph that is searched, no wider than it says.
    index.ef = 10
    narrow = recall(index, vectors, some, 10)
    made = build(vectors, "milvus", uri=uri, collection="narrow", ef=10)
    assert narrow < 1.0 and recall(made, vectors, some, 10) < 1.0


@milvus_is_loud
def test_a_collection_that_left_its_index_to_milvus(tmp_path: Path) -> None:
    """Of an earlier l2rec: searched as ever, named as what it is, and not taken for a new one."""
    uri = options("milvus", tmp_path)["uri"]
    old = Milvus(uri, "old", *VECTORS.shape)
    old.client.create_collection("old", dimension=16, metric_type="IP")
    rows = [{"id": n, "vector": vector} for n, vector in enumerate(VECTORS.tolist())]
    old.client.insert("old", rows)
    assert searched(old) == "AUTOINDEX of Milvus" and len(old.search(QUERIES, 3)[0]) == 40
    made = build(VECTORS, "milvus", uri=uri, collection="old")
    assert searched(made) == "HNSW graph, 32 links, ef 128"
    (name,) = made.client.list_indexes("old")
    assert made.client.describe_index("old", name)["index_type"] == "HNSW"


def test_a_search_says_how_broad_it_is(tmp_path: Path) -> None:
    assert searched(build(VECTORS, "exact")) == "every row"
    options("flat", tmp_path)
    assert searched(build(VECTORS, "flat")) == "every row"
    assert searched(build(VECTORS, "ivf", lists=12, probes=3)) == "3 of 12 inverted lists"
    wide = build(VECTORS, "hnsw", ef=300)
    save(wide, tmp_path / "index", ids=IDS, version="v1")
    for index in (wide, load(tmp_path / "index")[0]):
        assert searched(index) == "HNSW graph, 32 links, ef 300"


@milvus_is_loud
def test_an_alias_is_moved_to_the_new_version(tmp_path: Path) -> None:
    """A client of the alias finds the new rows, by the items' ids, and the old collection is gone;
    an alias that the folder once had stays with it.
    """
    uri, out = options("milvus", tmp_path)["uri"], tmp_path / "index"
    one, two = embedded(tmp_path / "1", VECTORS), embedded(tmp_path / "2", VECTORS[::-1], "v2")
    build_folder(one, out, kind="milvus", uri=uri)
    before = load(out)[0]
    assert isinstance(before, Milvus)
    facts = build_folder(two, out, kind="milvus", uri=uri, alias="shop")
    assert facts["alias"] == "shop" and facts["collection"] != before.collection
    client = before.client

    def found() -> Any:
        hits = client.search("shop", VECTORS[:1].tolist(), limit=1, output_fields=["item_id"])
        return hits[0][0]["entity"]["item_id"]

    assert found() == "item-599" and client.list_collections() == [facts["collection"]]
    build_folder(one, out, kind="milvus", uri=uri)
    assert found() == "item-0" and len(client.list_collections()) == 1
    build_folder(two, tmp_path / "other", kind="milvus", uri=uri, alias="shop")
    assert found() == "item-599", "an index of another folder takes the alias"
    assert len(client.list_collections()) == 2, "and leaves the collection of this one"
    load(out)
    with pytest.raises(ConfigError, match=r"--alias l2rec_.*: a collection has this name"):
        build_folder(two, out, kind="milvus", uri=uri, alias=facts["collection"])


@milvus_is_loud
def test_an_alias_stays_where_the_new_version_is_not_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, out = options("milvus", tmp_path)["uri"], tmp_path / "index"
    one, two = embedded(tmp_path / "1", VECTORS), embedded(tmp_path / "2", VECTORS[::-1], "v2")
    before = build_folder(one, out, kind="milvus", uri=uri, alias="shop")["collection"]
    search = Milvus.search
    monkeypatch.setattr(
        Milvus, "search", lambda *a, **o: (0 * search(*a, **o)[0], search(*a, **o)[1])
    )
    with pytest.raises(CheckpointError, match="the alias shop, which stays as it was") as raised:
        build_folder(two, out, kind="milvus", uri=uri, alias="shop")
    assert one_line(raised)
    monkeypatch.undo()
    index, _, version = load(out)
    assert isinstance(index, Milvus) and version == "v1"
    assert index.client.describe_alias("shop")["collection_name"] == before


@milvus_is_loud
def test_an_alias_after_a_kill_before_it_was_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, out = options("milvus", tmp_path)["uri"], tmp_path / "index"
    one, two = embedded(tmp_path / "1", VECTORS), embedded(tmp_path / "2", VECTORS[::-1], "v2")
    build_folder(one, out, kind="milvus", uri=uri, alias="shop")
    monkeypatch.setattr(Milvus, "take_over", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build_folder(two, out, kind="milvus", uri=uri, alias="shop")
    monkeypatch.undo()
    index = load(out)[0]
    assert isinstance(index, Milvus) and len(index.client.list_collections()) == 2
    build_folder(two, out, kind="milvus", uri=uri, alias="shop")
    assert index.client.list_collections() == [index.collection]
    assert index.client.describe_alias("shop")["collection_name"] == index.collection


@milvus_is_loud
def test_aliases_of_an_earlier_collection_after_a_kill_before_they_were_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest of the new version names what it is to replace, until that is done: the same
    command goes on, and so does another one.
    """
    uri, out = options("milvus", tmp_path)["uri"], tmp_path / "index"
    one, two, three = (embedded(tmp_path / v, VECTORS, v) for v in ("v1", "v2", "v3"))

    def killed(source: Path, **kind: str) -> None:
        with monkeypatch.context() as patch:
            for name in ("take_over", "drop"):
                patch.setattr(Milvus, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                build_folder(source, out, **kind)

    first = build_folder(one, out, kind="milvus", uri=uri, alias="shop")["collection"]
    killed(two, kind="milvus", uri=uri)
    index = load(out)[0]
    assert isinstance(index, Milvus)
    assert index.client.describe_alias("shop")["collection_name"] == first != index.collection
    build_folder(two, out, kind="milvus", uri=uri)
    assert index.client.list_collections() == [index.collection]
    assert index.client.describe_alias("shop")["collection_name"] == index.collection
    assert "replaces" not in json.loads((out / MANIFEST).read_text())

    killed(three, kind="milvus", uri=uri)
    killed(one, kind="exact")
    assert len(index.client.list_collections()) == 2
    build_folder(one, out, kind="exact")
    assert index.client.list_collections() == []
    assert load(out)[2] == "v1"


@milvus_is_loud
def test_rows_that_milvus_lost_while_it_was_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = options("milvus", tmp_path)["uri"]
    from pymilvus import MilvusClient

    insert = MilvusClient.insert
    monkeypatch.setattr(
        MilvusClient, "insert", lambda self, name, rows: insert(self, name, rows[1:])
    )
    with pytest.raises(CheckpointError, match="has 599 rows, not 600; build the index again"):
        build(VECTORS, "milvus", uri=uri)


def test_a_server_keeps_what_an_alias_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server refuses to delete a collection that has an alias; milvus-lite deletes both. So the
    alias is moved first, in one call.
    """
    calls: list[str] = []

    class Server:
        collections, aliases = ["l2rec_a_1", "l2rec_a_2"], {"shop": "l2rec_a_1"}

        def list_collections(self) -> list[str]:
            return list(self.collections)

        def list_aliases(self, of: str = "") -> dict[str, list[str]]:
            return {"aliases": [a for a, c in self.aliases.items() if of in ("", c)]}

        def describe_alias(self, alias: str) -> dict[str, str]:
            return {"collection_name": self.aliases[alias]}

        def create_alias(self, collection: str, alias: str) -> None:
            assert alias not in self.aliases, "a server refuses"
            self.aliases[alias] = collection
            calls.append(f"create {alias}")

        def alter_alias(self, collection: str, alias: str) -> None:
            assert alias in self.aliases, "a server refuses"
            self.aliases[alias] = collection
            calls.append(f"alter {alias}")

        def drop_collection(self, collection: str) -> None:
            assert collection not in self.aliases.values(), "a server refuses"
            self.collections.remove(collection)
            calls.append(f"drop {collection}")

    index = Milvus.__new__(Milvus)
    index.uri, index.collection, index.client = "http://host:19530", "l2rec_a_2", Server()
    index.take_over(set(), "shop", "l2rec_a_")
    assert calls == ["alter shop", "drop l2rec_a_1"]
    index.take_over({"l2rec_a_1"}, "second", "l2rec_a_")
    assert calls[2:] == ["create second"]
    assert Server.aliases == {"shop": "l2rec_a_2", "second": "l2rec_a_2"}


@milvus_is_loud
def test_a_search_within_partitions(tmp_path: Path) -> None:
    uri, out = options("milvus", tmp_path)["uri"], tmp_path / "index"
    brands = ['a "b"', "c'd", "e\\f", "Größe", ""]
    values = np.array([brands[n % 5] for n in range(600)])
    table = pa.table({"item_id": IDS, "text": IDS, "brand": values, "tags": ["x|y"] * 600})
    tags = with_separator(table.schema.field("tags"), "|")
    table = table.cast(table.schema.set(3, tags))
    data = catalog_as_data_set(tmp_path / "data", table)
    items = embedded(tmp_path / "items.parquet", VECTORS)
    given: dict[str, Any] = {"kind": "milvus", "uri": uri, "data": data}
    facts = build_folder(items, out, partition_by="brand", **given)
    assert facts["recall@10 within one brand"] > 0.9
    index = load(out)[0]
    assert isinstance(index, Milvus) and index.attribute == "brand"
    for some in (*([brand] for brand in brands), brands[:2]):
        rows = np.flatnonzero(np.isin(values, some))
        best = rows[np.argmax(QUERIES @ VECTORS[rows].T, axis=1)]
        found = index.search(QUERIES, 200, within=some)[0]
        assert np.isin(found[found >= 0], rows).all() and (found >= 0).sum(1).max() > 100
        assert (found[:, 0] == best).mean() > 0.9
    hits = index.client.query(index.collection, filter='item_id == "item-7"', limit=2)
    assert [(hit["id"], hit["brand"]) for hit in hits] == [(7, "e\\f")]

    with pytest.raises(DataError, match="tags has several values of one item"):
        build_folder(items, out, partition_by="tags", **given)
    with pytest.raises(DataError, match=r"no field 'brant'; did you mean 'brand'\?"):
        build_folder(items, out, partition_by="brant", **given)
    other = embedded(tmp_path / "o.parquet", VECTORS[:3], ids=["item-1", "new", "item-2"])
    with pytest.raises(DataError, match="1 items, such as 'new', are not in"):
        build_folder(other, out, partition_by="brand", **given)
    plain = build(VECTORS, "milvus", uri=uri)
    with pytest.raises(ConfigError, match="has no partitions; build it with --partition-by"):
        plain.search(QUERIES, 3, within=["x"])  # type: ignore[call-arg]


def catalog_as_data_set(folder: Path, catalog: pa.Table) -> Path:
    """Write a data set of a catalog: one user who had the first three items."""
    source = folder.parent / "log"
    source.mkdir()
    names = [name for name in catalog.column_names if name not in ("item_id", "text")]
    pq.write_table(catalog, source / "items.parquet")
    events = {
        "user_id": ["u"] * 3,
        "item_id": catalog["item_id"].slice(0, 3),
        "timestamp": [1, 2, 3],
    }
    pq.write_table(pa.table(events), source / "events.parquet")
    config = PrepareConfig(keep_all_items=True, text="{text}")
    prepare(source / "events.parquet", folder, config, items=source / "items.parquet")
    assert set(names) <= set(open_dataset(folder).catalog.column_names)
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alias": "shop"}, "an alias is for --kind milvus, not auto"),
        ({"kind": "milvus", "alias": "1-shop"}, "--alias 1-shop: Milvus takes letters, digits"),
        ({"kind": "milvus", "partition_by": "x"}, "--partition-by FIELD and --data DATA"),
        ({"data": Path("x")}, "--partition-by FIELD and --data DATA"),
    ],
)
def test_options_of_milvus(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    items = embedded(tmp_path / "items.parquet", VECTORS)
    with pytest.raises(ConfigError, match=message):
        build_folder(items, tmp_path / "index", **arguments)


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        (
            Attribute("a-b", ["x"] * 600),
            "--partition-by a-b: Milvus takes letters, digits and _; id,",
        ),
        (Attribute("vector", ["x"] * 600), "vector and item_id are taken"),
        (Attribute("brand", ["é" * 33_000] * 600), "brand .é.*is longer than 65535 bytes"),
    ],
)
def test_attributes_that_cannot_be_fields(
    tmp_path: Path, attribute: Attribute, message: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        build(VECTORS, "milvus", uri=str(tmp_path / "m.db"), attribute=attribute)


@milvus_is_loud
def test_a_milvus_that_is_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("pymilvus", reason="pymilvus is not installed")
    monkeypatch.setenv("L2REC_MILVUS_TOKEN", "root:secret")
    monkeypatch.setattr(milvus_module, "MILVUS_SECONDS", 0.2)
    with pytest.raises(
        StorageError, match=r"Milvus at http://127\.0\.0\.1:1: is it up, and L2"
    ) as e:
        build(VECTORS, "milvus", uri="http://127.0.0.1:1")
    assert "secret" not in str(e.value)
    source = embedded(tmp_path / "items.parquet", VECTORS)
    build_folder(source, tmp_path / "index")
    manifest = json.loads((tmp_path / "index" / MANIFEST).read_text())
    manifest |= {"kind": "milvus", "options": {"uri": str(tmp_path / "x.db"), "collection": "c"}}
    manifest["sha256"] = folder_module._seal(manifest)
    (tmp_path / "index" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"its Milvus file .*x\.db is missing"):
        load(tmp_path / "index")
    assert not (tmp_path / "x.db").exists()


KILLED_FILLING = """
import os, signal, sys
from pathlib import Path
from pymilvus import MilvusClient
from l2rec.index import build_folder
folder = Path(sys.argv[1])
build_folder(folder / "one.parquet", folder / "index", kind="milvus", uri=str(folder / "m.db"))
insert, parts = MilvusClient.insert, []
def killed(self, *given, **named):
    parts.append(0)
    if len(parts) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return insert(self, *given, **named)
MilvusClient.insert = killed
build_folder(folder / "two.parquet", folder / "index", kind="milvus", uri=str(folder / "m.db"))
"""


@milvus_is_loud
def test_a_kill_while_milvus_is_filled(tmp_path: Path) -> None:
    uri = str(tmp_path / "m.db")
    options("milvus", tmp_path)
    embedded(tmp_path / "one.parquet", VECTORS, "one")
    two = embedded(tmp_path / "two.parquet", unit(1500, seed=2), "two")
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_FILLING, str(tmp_path)], capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    index, ids, version = load(tmp_path / "index")
    assert (len(index), len(ids), version) == (600, 600, "one")
    assert recall(index, VECTORS, QUERIES, 10) > 0.9
    assert isinstance(index, Milvus)
    build_folder(two, tmp_path / "index", kind="milvus", uri=uri)
    assert load(tmp_path / "index")[2] == "two"
    assert len(index.client.list_collections()) == 1, "what the kill left was taken up"


# ------------------------------------------------------------------------------- on disk


def edit(folder: Path, *, sealed: bool = False, **change: Any) -> None:
    """A manifest with other values; sealed: and with the right hash, as another writer's."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text()) | change
    if sealed:
        manifest["sha256"] = folder_module._seal(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("kind", ["exact", "hnsw"])
def test_what_is_refused_from_disk(kind: str, tmp_path: Path) -> None:
    options(kind, tmp_path)
    folder, good = tmp_path / "index", tmp_path / "good"
    made = build(VECTORS, kind)
    with pytest.raises(CheckpointError, match=r"is no index: index\.json is missing"):
        load(folder)
    save(made, folder, ids=IDS, version="v")
    for ids, message in ((["a", "b"], "2 ids for an index of 600"), (["a"] * 600, "an id twice")):
        with pytest.raises(DataError, match=message):
            save(made, folder, ids=ids, version="v")
    shutil.copytree(folder, good)

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as raised:
            load(folder)
        assert one_line(raised)
        shutil.rmtree(folder)
        shutil.copytree(good, folder)

    for path in sorted(good.glob("*-*")):
        torn, whole = folder / path.name, path.read_bytes()
        torn.write_bytes(whole[:-4])
        refused(f"{path.name} is torn or was edited; build the index again")
        torn.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
        refused(f"{path.name} is torn or was edited")
        torn.unlink()
        refused(f"{path.name}: No such file or directory; build the index again")
    for change in ({"version": "other"}, {"rows": 5}, {"kind": "flat"}, {"files": {}}):
        edit(folder, **change)
        refused(r"index\.json was edited; build the index again")
    edit(folder, format=99)
    refused("index of format 99, this l2rec reads 2; build it again")
    edit(folder, sealed=True, kind="annoy")
    refused("index kind 'annoy' is not known here")
    edit(folder, sealed=True, rows=5)
    refused("600 ids and an index of 600 rows of 16, its manifest says 5 of 16")
    files = json.loads((good / MANIFEST).read_text())["files"]
    for name in ("../good/{}", "../index/{}", f"{good}/{{}}"):
        elsewhere = {**files["ids"], "name": name.format(files["ids"]["name"])}
        edit(folder, sealed=True, files={**files, "ids": elsewhere})
        refused("is outside of it; build the index again")
    edit(folder, sealed=True, files={})
    refused("cannot be read, build it again: 'ids'")
    for text, message in (("{", "not readable"), ("[]", "not a manifest"), ("", "not readable")):
        (folder / MANIFEST).write_text(text)
        refused(message)
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="is not an index; choose another folder"):
        save(made, folder, ids=IDS, version="v")
    assert load(good)[2] == "v"


def test_where_an_index_may_be_is_asked_before_it_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty, other = tmp_path / "empty", tmp_path / "other"
    empty.mkdir()
    save(build(VECTORS, "exact"), empty, ids=IDS, version="v")
    assert load(empty)[2] == "v"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    monkeypatch.setattr(building, "read_vectors", lambda source: pytest.fail("read"))
    with pytest.raises(CheckpointError, match="is not an index; choose another folder"):
        build_folder(tmp_path / "vectors", other)


def test_a_folder_that_is_exchanged_keeps_what_is_not_the_indexs(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "index"
    save(build(VECTORS, "exact"), folder, ids=IDS, version="one")
    (folder / "notes.txt").write_text("mine")
    save(build(VECTORS, "exact"), folder, ids=IDS, version="same vectors")
    save(build(VECTORS[:5], "exact"), folder, ids=IDS[:5], version="two")
    assert len(list(folder.iterdir())) == 4 and (folder / "notes.txt").is_file()
    assert [p.name for p in folder.parent.iterdir()] == ["index"]
    assert load(folder)[2] == "two"


def test_one_that_is_exchanged_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "index"
    save(build(VECTORS, "exact"), folder, ids=IDS, version="one")
    read = folder_module._read

    def meanwhile(*given: Any) -> Any:
        monkeypatch.setattr(folder_module, "_read", read)
        save(build(VECTORS[:7], "exact"), folder, ids=IDS[:7], version="two")
        return read(*given)

    monkeypatch.setattr(folder_module, "_read", meanwhile)
    index, ids, version = load(folder)
    assert (len(index), len(ids), version) == (7, 7, "two")


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writes beyond it fail, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kind", ["exact", "flat", "hnsw"])
def test_a_disk_that_fills_up(kind: str, tmp_path: Path) -> None:
    made = build(VECTORS, kind, **options(kind, tmp_path))
    folder, new = tmp_path / "index", tmp_path / "new"
    save(build(VECTORS[:9], "exact"), folder, ids=IDS[:9], version="old")
    save(made, tmp_path / "size", ids=IDS, version="new")
    most = max(p.stat().st_size for p in (tmp_path / "size").iterdir())
    for size in (100, most // 2, most - 1):
        for out in (folder, new):
            with (
                files_of_at_most(size),
                pytest.raises(CheckpointError, match="cannot be written, what was there is as it"),
            ):
                save(made, out, ids=IDS, version="new")
        assert load(folder)[2] == "old" and not new.exists()
    assert {p.name for p in tmp_path.iterdir()} == {"index", "size"}


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import faiss, torch, l2rec.evaluation.ranking  # once, not in every child
from l2rec.index import build_folder, load

folder, out = Path(sys.argv[1]), Path(sys.argv[1]) / "index"
names, at_random = ("one", "two"), random.Random(0)

def in_child(work):
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    return child

def builds(name, kind):
    return lambda: build_folder(folder / f"{name}.parquet", out, kind=kind)

def killed_before(event, work):
    # Each operation on a file is announced; the process is killed at the event-th.
    seen = []
    def count(name, given):
        if name in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir") and "index" in str(
            given[0]
        ).removeprefix(str(folder)):
            seen.append(name)
            if len(seen) == event:
                os.kill(os.getpid(), signal.SIGKILL)
    def hooked():
        sys.addaudithook(count)
        work()
    return hooked

def told(kills):
    index, ids, version = load(out)
    print(kills, index.kind, len(index), len(ids), version, flush=True)

def wait(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

mode, kinds = sys.argv[2], sys.argv[3].split(",")
if mode == "first":  # killed before anything was ever there
    for event in range(1, 1000):
        ended = wait(in_child(killed_before(event, builds("one", kinds[0]))))
        if ended == 0:
            told(event - 1)
            break
        assert ended == -signal.SIGKILL, ended
        if out.exists():
            told(event)
elif mode == "steps":  # one is there; what is to replace it is killed at every step
    for event in range(1, 1000):
        assert wait(in_child(builds("one", kinds[0]))) == 0
        ended = wait(in_child(killed_before(event, builds("two", kinds[1]))))
        told(event - (ended == 0))
        if ended == 0:
            break
        assert ended == -signal.SIGKILL, ended
else:  # killed at any time, again and again
    assert wait(in_child(builds("one", kinds[0]))) == 0
    started = time.monotonic()
    for number in range(4):
        wait(in_child(builds(names[number % 2], kinds[number % 2])))
    whole = (time.monotonic() - started) / 4
    for number in range(12):
        child = in_child(builds(names[number % 2], kinds[number % 2]))
        time.sleep(at_random.uniform(0, whole))
        os.kill(child, signal.SIGKILL)
        wait(child)
        told(number + 1)
"""


def killed(folder: Path, mode: str, kinds: str) -> list[list[str]]:
    """What is in the folder after each kill: [kills, kind, rows, ids, version]."""
    for kind in kinds.split(","):
        options(kind, folder)
    embedded(folder / "one.parquet", VECTORS, "one")
    embedded(folder / "two.parquet", unit(700, seed=3), "two")
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLS, str(folder), mode, kinds],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # its children are forked
    )
    assert child.returncode == 0, child.stderr
    return [line.split() for line in child.stdout.splitlines()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills are of POSIX")
@pytest.mark.parametrize(
    "mode", [*(pytest.param(m, marks=pytest.mark.slow) for m in ("first", "steps")), "any time"]
)
def test_a_kill_leaves_the_old_index_or_the_new_one(mode: str, tmp_path: Path) -> None:
    found = killed(tmp_path, mode, "exact,flat")
    old, new = ["exact", "600", "600", "one"], ["flat", "700", "700", "two"]
    states = [state for _, *state in found]
    if mode == "first":
        assert set(map(tuple, states)) == {tuple(old)} and int(found[-1][0]) >= 6
    elif mode == "steps":
        exchanged = states.index(new)
        assert exchanged >= 6, "there are steps before the exchange"
        assert states == [old] * exchanged + [new] * (len(states) - exchanged)
        assert len(states) - exchanged >= 3, "and steps after it: what was there is removed"
    else:
        assert len(states) == 12 and all(state in (old, new) for state in states)
    known = ("one.parquet", "two.parquet", "index")
    assert all(p.name in known or p.match(".index.*.part") for p in tmp_path.iterdir()), (
        "a killed writer leaves no more than its hidden folder"
    )
    source = tmp_path / "two.parquet"
    build_folder(source, tmp_path / "index", kind="exact")
    assert load(tmp_path / "index")[2] == "two"
    assert len(list((tmp_path / "index").iterdir())) == 3, "nothing is left of what was killed"
    assert {p.name for p in tmp_path.iterdir()} == set(known)


def test_two_writers_at_once(tmp_path: Path) -> None:
    embedded(tmp_path / "items.parquet", VECTORS)
    code = (
        "import sys; from pathlib import Path; from l2rec.index import build_folder\n"
        "for n in range(12):\n"
        "    build_folder(Path(sys.argv[1]), Path(sys.argv[2]), kind='exact')"
    )
    given = [sys.executable, "-c", code, str(tmp_path / "items.parquet"), str(tmp_path / "index")]
    writers = [subprocess.Popen(given, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [writer.communicate()[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], errors
    assert load(tmp_path / "index")[1] == IDS


# ------------------------------------------------------------------------------- from a run


def test_from_embed_to_index(catalog_run: Finished, tmp_path: Path) -> None:
    embed_run(catalog_run.run, tmp_path, Quiet())
    items, users = tmp_path / "items.parquet", tmp_path / "users.parquet"
    given = read_vectors(items)
    assert len(given.ids) == len(given.vectors) and given.vectors.dtype == np.float32
    out = tmp_path / "index"
    command = ["index", str(items), "--out", str(out), "--queries", str(users), "-k", "5"]
    printed = CliRunner().invoke(app, [*command, "--json"])
    assert printed.exit_code == 0, printed.output
    facts = json.loads(printed.output)
    assert facts["recall@5"] == 1.0 and facts["rows"] == len(given.ids)
    assert facts["kind"] == "exact" and facts["dim"] == given.vectors.shape[1]
    index, ids, version = load(out)
    assert (ids, version) == (given.ids, given.version) and len(index) == len(ids)
    told = CliRunner().invoke(app, command)
    assert told.exit_code == 0 and "recall@5" in told.output


def test_the_facts_of_a_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are those of the files; every time is between two readings of a clock."""
    source = embedded(tmp_path / "items.parquet", unit(3000))
    clock = iter([0.0, 2.0, 10.0, 10.5, 20.0, 20.25])  # build, search, exact search
    monkeypatch.setattr(building.time, "monotonic", lambda: next(clock))
    facts = build_folder(source, tmp_path / "index", kind="exact", k=3)
    monkeypatch.undo()
    files = [p for p in (tmp_path / "index").iterdir() if p.name != "index.json"]
    size = sum(path.stat().st_size for path in files)
    assert size > 3000 * 16 * 4 and facts["megabytes"] == round(size / 1e6, 1) == 0.2
    assert (facts["kind"], facts["rows"], facts["dim"], facts["recall@3"]) == ("exact", 3000, 16, 1)
    assert facts["build seconds"] == 2.0
    assert facts["queries per second"] == 2 * facts["queries"]
    assert facts["exact queries per second"] == 4 * facts["queries"]


def test_commands_that_do_not_fit(tmp_path: Path) -> None:
    items = embedded(tmp_path / "items.parquet", VECTORS)
    other = embedded(tmp_path / "other.parquet", VECTORS, "v2")
    nobody = embedded(tmp_path / "nobody.parquet", VECTORS[:0])
    out = tmp_path / "index"
    with pytest.raises(ConfigError, match="k=0; choose 1 or more"):
        build_folder(items, out, k=0)
    with pytest.raises(ConfigError, match="a uri is for --kind milvus, not auto"):
        build_folder(items, out, uri="x.db")
    with pytest.raises(DataError, match=r"other\.parquet is of model v2, .*items\.parquet of v1"):
        build_folder(items, out, queries=other)
    with pytest.raises(DataError, match=r"nobody\.parquet has no rows"):
        build_folder(items, out, queries=nobody)
    with pytest.raises(DataError, match=r"nobody\.parquet has no rows"):
        build_folder(nobody, out)
    assert not out.exists()


def test_vectors_that_are_not_whole(tmp_path: Path) -> None:
    path = embedded(tmp_path / "items.parquet", VECTORS)
    table = pq.ParquetFile(path).read()
    meta = table.schema.metadata

    def refused(changed: pa.Table, message: str) -> None:
        pq.write_table(changed, path)
        with pytest.raises(CheckpointError, match=message) as raised:
            read_vectors(path)
        assert one_line(raised)

    def with_column(name: str, values: Any) -> pa.Table:
        at = table.schema.get_field_index(name)
        return table.set_column(at, table.schema.field(name), values)

    refused(table.slice(0, 5), "5 rows and 80 numbers, 600 of 16 were written")
    refused(table.replace_schema_metadata({}), "holds no vectors of `l2rec embed`")
    refused(table.replace_schema_metadata(meta | {b"l2rec.rows": b"x"}), "holds no vectors")
    for key in (b"l2rec.version", b"l2rec.sha256"):
        refused(
            table.replace_schema_metadata(meta | {key: b"other"}), "several versions|was changed"
        )
    refused(table.take(list(range(599, -1, -1))), "was changed after it was written")
    refused(with_column("id", pa.array([*IDS[:-1], "item-600"])), "was changed after")
    refused(with_column("id", pa.array([*IDS[:-1], None])), "was changed after")
    flat = np.array(table["vector"].combine_chunks().flatten())
    flat[100] += 1e-6
    edited = pa.FixedSizeListArray.from_arrays(pa.array(flat), 16)
    refused(with_column("vector", edited), "was changed after")
    hole = pa.array([None, *table["vector"].to_pylist()[1:]], pa.list_(pa.float32(), 16))
    refused(with_column("vector", hole), "600 rows and 9584 numbers|was changed after")
    versions = ["v2", *table["version"].to_pylist()[1:]]
    refused(with_column("version", pa.array(versions)), "vectors of several versions")
    refused(table.drop_columns("vector"), "holds no vectors")
    twice = vectors_table(["a", *IDS[2:], "a"], VECTORS, "v1")
    refused(twice, "an id twice")
    for value, message in (
        (np.nan, "numbers that are not finite"),
        (0.0, "1 of 600 vectors are not of"),
    ):
        bad = VECTORS.copy()
        bad[7] = value
        refused(vectors_table(IDS, bad, "v1"), message)
    pq.write_table(vectors_table(IDS, VECTORS * 5, "v1"), path)
    assert len(read_vectors(path).ids) == 600, "a method may have vectors of any length"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="holds no vectors"):
        read_vectors(path)
    with pytest.raises(CheckpointError, match="holds no vectors"):
        read_vectors(tmp_path / "nothing.parquet")
    odd = ["a\0b", "c", '"', "é\n"]
    pq.write_table(vectors_table(odd, VECTORS[:4], "v1"), path)
    assert read_vectors(path).ids == odd
    assert vectors_hash(["a", "b\0c"], VECTORS, "v") != vectors_hash(["a\0b", "c"], VECTORS, "v")
