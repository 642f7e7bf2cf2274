"""Vectors of fewer bits: what is written, read again, and lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.support.command import Call
from tests.support.errors import one_line
from tests.support.runs import Finished, Quiet

from l2rec.data.vectors import bytes_of, read_vectors, rounded, vectors_table
from l2rec.errors import CheckpointError, ConfigError
from l2rec.evaluation.ranking import evaluate
from l2rec.runs.embed import embed_run
from l2rec.runs.folder import load_run_config, open_run_dataset, split_of
from l2rec.runs.predictor import load

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = np.array([[0.5, -0.25, 0.1, 0.0, 1.0, -1.0, 0.3, 0.2, 0.7, -0.1]], dtype=np.float32)


def test_int8_keeps_inner_products_up_to_rounding() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, 16)).astype(np.float32)
    table = vectors_table([str(n) for n in range(50)], rows, "v", "int8")
    stored = np.array(table["vector"].to_pylist())
    scale = float(table.schema.metadata[b"l2rec.scale"])
    assert stored.dtype == np.int64 and np.abs(stored).max() == 127
    assert scale == pytest.approx(float(np.abs(rows).max()) / 127)
    np.testing.assert_allclose(stored * scale, rows, atol=scale / 2 + 1e-6)
    np.testing.assert_allclose(rounded(rows, "int8"), stored * scale, rtol=1e-6)


def test_binary_is_signs_eight_to_a_byte() -> None:
    table = vectors_table(["a"], ROWS, "v", "binary")
    assert table["vector"].to_pylist() == [[0b10101011, 0b10000000]]  # zero counts as negative
    signs = [1, -1, 1, -1, 1, -1, 1, 1, 1, -1]
    np.testing.assert_allclose(rounded(ROWS, "binary")[0], np.array(signs) / 10**0.5, rtol=1e-6)
    assert [bytes_of(10, p) for p in ("float32", "int8", "binary")] == [40, 10, 2]


@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
def test_read_again(precision: str, tmp_path: Path) -> None:
    rows = np.random.default_rng(1).normal(size=(20, 12)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    path = tmp_path / "items.parquet"
    ids = [f"i{n}" for n in range(20)]
    pq.write_table(vectors_table(ids, rows, "v", precision), path)
    found = read_vectors(path)
    assert found.ids == ids and found.vectors.dtype == np.float32
    np.testing.assert_array_equal(found.vectors, rounded(rows, precision))
    table = pq.read_table(path)
    other = vectors_table(ids, -rows, "v", precision)["vector"]
    pq.write_table(table.set_column(1, "vector", other), path)
    with pytest.raises(CheckpointError, match="was changed"):
        read_vectors(path)


def test_an_unknown_precision_is_refused(catalog_run: Finished, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="float32, int8, binary") as error:
        embed_run(catalog_run.run, tmp_path, Quiet(), precision="int4")
    one_line(error)
    path = tmp_path / "x.parquet"
    table = vectors_table(["a"], ROWS, "v", "int8")
    metadata = {**table.schema.metadata, b"l2rec.precision": b"int4"}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    with pytest.raises(CheckpointError, match="precision 'int4'"):
        read_vectors(path)


def test_embed_says_what_a_precision_loses(
    catalog_run: Finished, tmp_path: Path, call: Call
) -> None:
    done = call("embed", catalog_run.run, "--out", tmp_path / "v", "--precision", "binary")
    assert done.code == 0, done.err
    for word in ("float32", "int8", "binary, rescored", "saving", "recall@10"):
        assert word in done.out
    losses = embed_run(catalog_run.run, tmp_path / "w", Quiet(), precision="int8").losses
    assert [loss["bytes"] for loss in losses.values()] == [128, 32, 4, 36]
    assert losses["float32"]["recall@10"] == 1.0
    assert losses["binary"]["recall@10"] < losses["binary, rescored"]["recall@10"]
    assert losses["int8"]["recall@10"] > 0.9

    predictor = load(catalog_run.run)
    dataset = open_run_dataset(catalog_run.run, None)
    test = split_of(load_run_config(catalog_run.run)[0], dataset).test
    plain = evaluate(predictor, test.histories, test.targets, users=test.users).metrics()
    for name in ("ndcg@10", "ndcg@10_masked"):
        assert losses["float32"][name] == pytest.approx(plain[name], abs=1e-3)
    assert embed_run(catalog_run.run, tmp_path / "x", Quiet()).losses == {}
