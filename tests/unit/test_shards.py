"""Vectors in shards: the same numbers as in one file, what a kill leaves, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.support.command import PROGRAM, Call
from tests.support.errors import one_line
from tests.support.runs import Finished, Quiet

from l2rec.data.dataset import Dataset, open_dataset
from l2rec.data.vectors import MANIFEST, read_vectors, rounded
from l2rec.errors import CheckpointError, ConfigError, DataError
from l2rec.runs import shards
from l2rec.runs.embed import Sharding, embed_run
from l2rec.runs.predictor import load

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is given few rows at once, so that forty users are several shards."""
    monkeypatch.setattr(shards, "BLOCK", 4)


def histories_of(data: Path) -> pa.Table:
    """Return the users of a data set as `--histories` takes them."""
    dataset = open_dataset(data)
    ids = dataset.item_ids.to_pylist()
    rows = [[ids[item] for item in dataset.sequences[n]] for n in range(dataset.n_users)]
    return pa.table({"user_id": dataset.user_ids.to_pylist(), "history": rows})


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
def test_shards_hold_what_one_file_holds(
    catalog_run: Finished, tmp_path: Path, precision: str
) -> None:
    embed_run(catalog_run.run, tmp_path, Quiet(), precision=precision)
    done = embed_run(
        catalog_run.run, tmp_path, Quiet(), precision=precision, sharding=Sharding(rows=12)
    )
    whole, parts = read_vectors(tmp_path / "users.parquet"), read_vectors(tmp_path / "users")
    assert done.files[1] == (tmp_path / "users", 40, 32)
    assert parts.ids == whole.ids and parts.version == whole.version
    exact = read_vectors(tmp_path / "users") if precision == "float32" else None
    if exact is None:  # of int8, every shard has a scale of its own
        embed_run(catalog_run.run, tmp_path / "exact", Quiet())
        exact = read_vectors(tmp_path / "exact" / "users.parquet")
    expected = [rounded(exact.vectors[at : at + 12], precision) for at in range(0, 40, 12)]
    np.testing.assert_array_equal(parts.vectors, np.concatenate(expected))
    if precision != "int8":
        np.testing.assert_array_equal(parts.vectors, whole.vectors)
    manifest = json.loads((tmp_path / "users" / MANIFEST).read_text())
    assert [shard["rows"] for shard in manifest["shards"]] == [12, 12, 12, 4]
    assert manifest["rows"] == 40 and manifest["complete"] is True


def test_histories_of_parquet_are_those_of_the_data_set(
    catalog_run: Finished, tmp_path: Path
) -> None:
    table, source = histories_of(catalog_run.data), tmp_path / "tonight"
    source.mkdir()
    empty = pa.table({"user_id": ["nobody"], "history": pa.array([[]], pa.list_(pa.string()))})
    pq.write_table(table.slice(0, 21), source / "a.parquet", row_group_size=8)
    pq.write_table(pa.concat_tables([table.slice(21), empty]), source / "b.parquet")
    embed_run(catalog_run.run, tmp_path, Quiet())
    embed_run(catalog_run.run, tmp_path, Quiet(), histories=source, sharding=Sharding(rows=12))
    whole, parts = read_vectors(tmp_path / "users.parquet"), read_vectors(tmp_path / "users")
    assert parts.ids == whole.ids, "in order, and nobody without events"
    np.testing.assert_allclose(parts.vectors, whole.vectors, atol=1e-6)
    manifest = json.loads((tmp_path / "users" / MANIFEST).read_text())
    assert [shard["rows"] for shard in manifest["shards"]] == [12, 9, 12, 7]
    assert set(manifest["source"]["files"]) == {"a.parquet", "b.parquet"}


def test_texts_of_parquet_are_encoded_as_new_items(catalog_run: Finished, tmp_path: Path) -> None:
    texts = [f"a lamp of kind {n}" for n in range(10)]
    source = tmp_path / "new.parquet"
    pq.write_table(pa.table({"item_id": [str(n) for n in range(10)], "text": texts}), source)
    predictor = load(catalog_run.run)
    expected = predictor.encode_items(texts).numpy()
    done = embed_run(
        catalog_run.run,
        tmp_path / "v",
        Quiet(),
        texts=source,
        with_users=False,
        sharding=Sharding(rows=4),
    )
    assert done.files == [(tmp_path / "v" / "items", 10, 32)]
    found = read_vectors(tmp_path / "v" / "items")
    assert found.ids == [str(n) for n in range(10)] and found.version == predictor.version
    np.testing.assert_allclose(found.vectors, expected, atol=1e-6)

    embed_run(
        catalog_run.run, tmp_path / "w", Quiet(), texts=source, with_users=False, precision="int8"
    )
    footer = pq.read_metadata(tmp_path / "w" / "items" / "shard-00000.parquet").metadata
    assert predictor.vectors is not None
    scale = float(predictor.vectors.abs().max()) / 127
    assert float(footer[b"l2rec.scale"]) == pytest.approx(scale), "that of the run's own items"


def test_finished_shards_are_not_computed_again(
    catalog_run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that fails goes on where it stopped, and writes what a whole one writes."""
    arguments: dict[str, Any] = {"sharding": Sharding(rows=8)}
    embed_run(catalog_run.run, tmp_path / "whole", Quiet(), **arguments)
    encoded: list[int] = []
    encode = shards.Encoder.__call__

    def counted(self: shards.Encoder, shard: shards.Shard) -> None:
        if shard.number == 3 and len(encoded) < 4:
            raise DataError("the light went out")
        encode(self, shard)
        encoded.append(shard.number)

    monkeypatch.setattr(shards.Encoder, "__call__", counted)
    with pytest.raises(DataError, match="the light went out"):
        embed_run(catalog_run.run, tmp_path / "v", Quiet(), **arguments)
    assert encoded == [0, 1, 2]
    with pytest.raises(CheckpointError, match="not complete; give the same `l2rec embed` again"):
        read_vectors(tmp_path / "v" / "users")
    torn = tmp_path / "v" / "users" / "shard-00001.parquet"
    torn.write_bytes(torn.read_bytes()[:-20])
    (tmp_path / "v" / "users" / ".shard-00003.parquet.0a0a0a0a.part").write_bytes(b"half")
    encoded.append(-1)
    progress = Quiet()
    embed_run(catalog_run.run, tmp_path / "v", progress, **arguments)
    assert encoded == [0, 1, 2, -1, 1, 3, 4]
    assert any("2 of 5 shards are there already" in line for line in progress.lines)
    assert files(tmp_path / "v" / "users") == files(tmp_path / "whole" / "users")
    embed_run(catalog_run.run, tmp_path / "v", Quiet(), **arguments)
    assert encoded == [0, 1, 2, -1, 1, 3, 4], "nothing is left to do"


def test_shards_of_something_else(catalog_run: Finished, tmp_path: Path) -> None:
    out = tmp_path / "v"
    embed_run(catalog_run.run, out, Quiet(), sharding=Sharding(rows=8))
    with pytest.raises(CheckpointError, match=r"has vectors of shard_rows 8, not 16; delete it,"):
        embed_run(catalog_run.run, out, Quiet(), sharding=Sharding(rows=16))
    with pytest.raises(CheckpointError, match="of precision float32, not binary") as raised:
        embed_run(catalog_run.run, out, Quiet(), precision="binary", sharding=Sharding(rows=8))
    assert one_line(raised)
    (out / "users" / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"is not empty and has no vectors\.json"):
        embed_run(catalog_run.run, out, Quiet(), sharding=Sharding(rows=8))
    with pytest.raises(CheckpointError, match=r"holds no vectors of `l2rec embed`: no vectors\."):
        read_vectors(out / "users")


def test_a_shard_that_was_exchanged(catalog_run: Finished, tmp_path: Path) -> None:
    embed_run(catalog_run.run, tmp_path, Quiet(), sharding=Sharding(rows=8))
    folder = tmp_path / "users"
    shutil.copy(folder / "shard-00000.parquet", folder / "shard-00001.parquet")
    with pytest.raises(CheckpointError, match=r"shard-00001\.parquet is not the shard that vec"):
        read_vectors(folder)


def test_a_shard_lies_in_the_folder(catalog_run: Finished, tmp_path: Path) -> None:
    embed_run(catalog_run.run, tmp_path, Quiet(), sharding=Sharding(rows=8))
    manifest = tmp_path / "users" / MANIFEST
    manifest.write_text(manifest.read_text().replace("shard-00001", "../shard-00001"))
    with pytest.raises(CheckpointError, match="names a file that is not in the folder"):
        read_vectors(tmp_path / "users")


def test_rows_that_changed_are_not_taken_for_those_that_were_encoded(
    catalog_run: Finished, tmp_path: Path
) -> None:
    """The two files have the same layout, counts and statistics: what a footer tells of them."""
    source, names = tmp_path / "h.parquet", [f"u{n}" for n in range(4)]
    footers = []
    for middle in ("i2", "i3"):
        rows = [["i1", middle], ["i1", "i4"], ["i4", "i1"], ["i2", "i3"]]
        pq.write_table(pa.table({"user_id": names, "history": rows}), source)
        footers.append(
            source.read_bytes()[-8 - int.from_bytes(source.read_bytes()[-8:-4], "little") :]
        )
        if middle == "i2":
            embed_run(catalog_run.run, tmp_path / "v", Quiet(), histories=source)
    assert footers[0] == footers[1]
    with pytest.raises(CheckpointError, match=r"has vectors of source .* delete it,"):
        embed_run(catalog_run.run, tmp_path / "v", Quiet(), histories=source)


def test_a_shard_is_kept_only_if_it_is_whole_and_of_the_plan(
    catalog_run: Finished, tmp_path: Path
) -> None:
    """A flipped byte, other rows, another precision: all are encoded anew, the rest is kept."""
    arguments: dict[str, Any] = {"sharding": Sharding(rows=8)}
    embed_run(catalog_run.run, tmp_path / "v", Quiet(), **arguments)
    embed_run(catalog_run.run, tmp_path / "bits", Quiet(), precision="binary", **arguments)
    folder = tmp_path / "v" / "users"
    whole = files(folder)
    vector = read_vectors(folder).vectors[0].tobytes()
    first = bytearray(whole["shard-00000.parquet"])
    first[first.index(vector[:16])] ^= 1
    (folder / "shard-00000.parquet").write_bytes(first)
    shutil.copy(folder / "shard-00002.parquet", folder / "shard-00001.parquet")
    shutil.copy(tmp_path / "bits" / "users" / "shard-00003.parquet", folder)
    progress = Quiet()
    embed_run(catalog_run.run, tmp_path / "v", progress, **arguments)
    assert any("2 of 5 shards are there already" in line for line in progress.lines)
    assert files(folder) == whole

    # While the manifest names no shards yet, the precision tells them apart.
    (folder / MANIFEST).write_text(
        json.dumps({**json.loads(whole[MANIFEST]), "complete": False, "shards": []})
    )
    shutil.copy(tmp_path / "bits" / "users" / "shard-00003.parquet", folder)
    embed_run(catalog_run.run, tmp_path / "v", Quiet(), **arguments)
    assert files(folder) == whole


def test_a_run_that_changes_while_it_is_encoded(catalog_run: Finished, tmp_path: Path) -> None:
    """A process that loads the run later writes nothing of another version."""
    predictor = load(catalog_run.run)
    known, predictor.version = predictor.version, "0a0a0a0a"
    source = shards.Source("users", catalog_run.run, catalog_run.data)
    with pytest.raises(CheckpointError, match=f"is of version {known} now, and was of 0a0a0a0a"):
        shards.write(source, tmp_path / "v", predictor, Quiet(), precision="float32")
    assert not list((tmp_path / "v").glob("shard-*"))


@pytest.mark.parametrize(
    ("columns", "kind", "message"),
    [
        (
            {"user_id": ["a", "b"], "history": [["i1"], ["i1", None]]},
            "histories",
            r"given\.parquet, rows 0 to 1: 1 item ids in history are null",
        ),
        (
            {"user_id": ["a", "b", "a", "b"], "history": [["i1"], ["i1"], ["i2"], []]},
            "histories",
            r"given\.parquet: user_id 'a' is in 2 rows; every row needs its own",
        ),
        (
            {"item_id": ["a", "b", "b"], "text": ["one", "two", "three"]},
            "texts",
            r"given\.parquet: item_id 'b' is in 2 rows; every row needs its own",
        ),
    ],
)
def test_what_spoils_a_result_is_found_before_anything_is_encoded(
    catalog_run: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    columns: dict[str, list[Any]],
    kind: str,
    message: str,
) -> None:
    source = tmp_path / "given.parquet"
    pq.write_table(pa.table(columns), source)
    monkeypatch.setattr(shards, "Encoder", None)
    given: dict[str, Any] = {kind: source, "with_users": kind == "histories"}
    with pytest.raises(DataError, match=message) as raised:
        embed_run(catalog_run.run, tmp_path / "v", Quiet(), **given)
    assert one_line(raised)


@pytest.mark.parametrize(
    ("columns", "kind", "message"),
    [
        ({"user": ["a"], "history": [["i1"]]}, "histories", "needs user_id and history"),
        ({"user_id": ["a"], "history": ["i1"]}, "histories", "history is string; it has to be a"),
        ({"user_id": ["a"], "history": [["i99"]]}, "histories", r"rows 0 to 0: unknown item ids"),
        ({"user_id": ["a", None], "history": [["i1"]] * 2}, "histories", "1 rows have no user_id"),
        ({"item_id": ["a"], "text": [" "]}, "texts", "rows 0 to 0: "),
        ({"item_id": ["a"]}, "texts", "--texts needs item_id and text"),
        ({"item_id": [], "text": []}, "texts", "no rows to encode"),
    ],
)
def test_parquet_that_cannot_be_encoded(
    catalog_run: Finished, tmp_path: Path, columns: dict[str, list[Any]], kind: str, message: str
) -> None:
    source = tmp_path / "given.parquet"
    pq.write_table(pa.table(columns), source)
    given: dict[str, Any] = {kind: source, "with_users": kind == "histories"}
    with pytest.raises(DataError, match=message) as raised:
        embed_run(catalog_run.run, tmp_path / "v", Quiet(), **given)
    assert one_line(raised)


def test_options_that_do_not_fit(
    call: Call, catalog_run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for options, message in [
        (["--engine", "spark"], "--engine spark: choose one of local, ray"),
        (["--shard-rows", "0"], "--shard-rows 0: choose 1 or more"),
        (["--cpus", "2"], "--cpus 2 is for --engine ray"),
        (["--histories", tmp_path, "--no-users"], "--histories with --no-users"),
        (["--no-users", "--engine", "ray"], "--no-users leaves nothing to cut"),
        (["--histories", tmp_path], "no Parquet file there; give one, or a folder"),
    ]:
        outcome = call("embed", catalog_run.run, "--out", tmp_path / "v", *options)
        assert outcome.code == 2 and message in outcome.err
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"needs Ray Data: pip install 'l2rec\[ray\]'"):
        embed_run(catalog_run.run, tmp_path / "w", Quiet(), sharding=Sharding("ray"))


# ------------------------------------------------------------------------------- two nodes


NODES = """
import os, sys, time
import psutil

os.environ["RAY_worker_niceness"] = "0"  # 15 by default: minutes on a busy machine
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
node = cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
sys.stdin.readline()
raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)


def encodes():
    return any("_Worker)).submit" in " ".join(child.cmdline()) for child in raylet.children(True))


while not encodes():
    time.sleep(0.01)
cluster.remove_node(node, allow_graceful=False)
print("killed", flush=True)
sys.stdin.readline()
cluster.shutdown()
"""
"""A cluster of two nodes of one core. Told so, it kills one of them while that encodes a shard."""


@pytest.fixture
def nodes() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Begin `NODES`: the address of the cluster, and the process."""
    pytest.importorskip("ray", reason="Ray is not installed")
    pytest.importorskip("psutil", reason="psutil is not installed")
    process = subprocess.Popen(
        [sys.executable, "-c", NODES], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    yield process.stdout.readline().decode().strip(), process
    process.communicate(b"\n", timeout=60)


@pytest.mark.slow
def test_a_node_dies_and_nothing_is_lost_or_doubled(
    nodes: tuple[str, subprocess.Popen[bytes]], sasrec_run: Path, chains: Dataset, tmp_path: Path
) -> None:
    """Two nodes encode; one is killed while it does. In the end all shards are there, with the
    bytes that one process writes.
    """
    address, cluster = nodes
    few = histories_of(chains.path)
    table = pa.concat_tables([few] * (2000 // len(few)))
    users = [f"user-{n}" for n in range(len(table))]
    source = tmp_path / "histories.parquet"
    pq.write_table(table.set_column(0, "user_id", pa.array(users)), source)
    environment = {**os.environ, "RAY_ADDRESS": address, "OMP_NUM_THREADS": "1"}
    command = [*PROGRAM, "embed", str(sasrec_run), "--histories", str(source), "--shard-rows", "4"]

    one, many, errors = tmp_path / "one", tmp_path / "many", tmp_path / "errors"
    subprocess.run([*command, "--out", str(one)], check=True, env=environment)
    with errors.open("w") as opened:
        embedding = subprocess.Popen(
            [*command, "--out", str(many), "--engine", "ray"], env=environment, stderr=opened
        )
    while not list((many / "users").glob("shard-*.parquet")):
        assert embedding.poll() is None, errors.read_text()
        time.sleep(0.05)
    assert cluster.stdin is not None and cluster.stdout is not None
    cluster.stdin.write(b"\n")
    cluster.stdin.flush()
    assert cluster.stdout.readline() == b"killed\n"
    assert embedding.poll() is None, "it was killed after the end"
    assert embedding.wait() == 0, errors.read_text()
    assert files(many / "users") == files(one / "users")
    assert read_vectors(many / "users").ids == users
