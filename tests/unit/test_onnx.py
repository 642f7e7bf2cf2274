"""`l2rec onnx`: a graph gives the model's user vectors, in every shape, or is not written."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument
from tests.support import models, tiny
from tests.support.command import Call, Outcome
from tests.support.runs import Finished, Quiet
from tests.support.sequential import HISTORIES, TEXTS

from l2rec.data.catalog import Catalog
from l2rec.data.dataset import Dataset
from l2rec.data.ragged import Ragged
from l2rec.errors import CheckpointError, ConfigError
from l2rec.methods.bert4rec import BERT4Rec
from l2rec.methods.esasrec import ESASRec
from l2rec.methods.famousrec import FamouSRec
from l2rec.methods.fdsa import FDSA
from l2rec.methods.gru4rec import GRU4Rec
from l2rec.methods.hdrec import HDRec
from l2rec.methods.l2rec import L2Rec
from l2rec.methods.learn import LEARN
from l2rec.methods.recformer import RecFormer
from l2rec.methods.s3rec import S3Rec
from l2rec.methods.said import SAID
from l2rec.methods.sasrec import SASRec
from l2rec.methods.sasrec_table import SASRecTable
from l2rec.methods.unisrec import UniSRec
from l2rec.modules.sequences import pad
from l2rec.protocols import Exportable
from l2rec.runs.checkpoint import load_tensors
from l2rec.runs.onnx import onnx_run, write_graph
from l2rec.runs.predictor import load
from l2rec.studies.blend import blend_run

pytestmark = pytest.mark.usefixtures("one_thread")

MAX_ITEMS = 6
TINY: dict[str, Any] = {
    **{"dim": 16, "hidden": 16, "inner": 24, "heads": 2, "layers": 1},
    **{"text_tokens": 12, "max_items": MAX_ITEMS, "min_items": 1, "max_share": 1.0},
}
"""Of these, every method gets what it has."""
EXPORTED: list[tuple[Any, dict[str, Any]]] = [
    (SASRec, {"layers": 2}),
    (SASRec, {"max_items": 1}),
    (ESASRec, {"from_newest": True}),
    (GRU4Rec, {"layers": 2}),
    (BERT4Rec, {}),
    (SASRecTable, {}),
    (UniSRec, {}),
    (FDSA, {}),
    (S3Rec, {}),
    (SAID, {}),
    (LEARN, {}),
]


def built(method: Any, options: dict[str, Any]) -> Any:
    """A model of some size with weights as after a training."""
    known = {k: v for k, v in TINY.items() if k in method.Config.model_fields}
    backbone = tiny.random_backbone("bert") if method.uses_backbone else None
    return models.shaken(models.build(method, known | options, Catalog.of_texts(TEXTS), backbone))


def run_graph(path: Path, rows: Ragged, *, padding: int = 0) -> Any:
    """User vectors [B, D] of a graph, with columns of padding after the longest row."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    items = np.pad(pad(rows)[0].numpy(), ((0, 0), (0, padding)))
    (users,) = session.run(None, {"items": items, "lengths": rows.lengths})
    return users


@pytest.mark.parametrize(
    ("method", "options"), EXPORTED, ids=[f"{m.__name__}{o or ''}" for m, o in EXPORTED]
)
def test_a_graph_gives_the_model_s_users(
    method: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    model = built(method, options)
    encoder = model.user_encoder()
    most = encoder.max_items
    assert isinstance(model, Exportable) and most == (TINY | options)["max_items"]
    path = tmp_path / "graph.onnx"
    write_graph(model, encoder, path)

    users = model.encode_users(HISTORIES).numpy()  # it cuts to the newest items itself
    newest = HISTORIES.tail(most)
    assert int(HISTORIES.lengths.max()) > most
    np.testing.assert_allclose(run_graph(path, newest), users, atol=1e-5)
    short = int(newest.lengths.argmin())
    for row in (0, short):
        alone = newest.take(np.array([row]))
        np.testing.assert_allclose(run_graph(path, alone), users[[row]], atol=1e-5)
    if most > 1:
        alone = newest.take(np.array([short]))
        np.testing.assert_allclose(run_graph(path, alone, padding=2), users[[short]], atol=1e-5)
        assert np.abs(users[0] - users[-1]).max() > 1e-2  # or nothing was compared
    if method is not GRU4Rec:  # which has no positions to run out of
        with pytest.raises((Fail, InvalidArgument), match=r"while running (Gather|Add) node"):
            run_graph(path, HISTORIES)


def test_which_methods_can_be_exported() -> None:
    """Those that read texts at a request, and a mixture by spectra, have no `user_encoder`."""
    assert all(issubclass(method, Exportable) for method, _ in EXPORTED)
    others = (L2Rec, HDRec, RecFormer, FamouSRec)
    assert not any(issubclass(method, Exportable) for method in others)


def test_item_vectors_are_an_initializer_and_nothing_tells_of_this_machine(tmp_path: Path) -> None:
    model = built(UniSRec, {})
    path = tmp_path / "graph.onnx"
    assert write_graph(model, model.user_encoder(), path) == 18
    graph = onnx.load(path).graph
    shapes = {tuple(each.dims) for each in graph.initializer}
    assert (len(TEXTS), 16) in shapes
    assert tuple(model.text.vectors.shape) not in shapes  # texts, experts: all before the graph
    names = [i.name for i in (*graph.input, *graph.output)]
    assert names == ["items", "lengths", "users"]
    assert b".py" not in path.read_bytes()


# -- the command ---------------------------------------------------------------------------------


def refused(outcome: Outcome, message: str) -> None:
    assert outcome.code == 2 and outcome.out == "" and message in outcome.err, outcome
    assert "Traceback" not in outcome.err


def test_what_is_written_ranks_as_the_run_does(
    call: Call, sasrec_run: Path, chains: Dataset, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    outcome = call("onnx", sasrec_run, "--out", out)
    assert outcome.code == 0, outcome
    assert (
        "user_encoder.onnx: SASRec, 30 items, up to 50 of a history, vectors of 64" in outcome.err
    )
    assert "compared with the model" in outcome.err and "Warning" not in outcome.err

    predictor = load(sasrec_run)
    manifest = json.loads((out / "manifest.json").read_text())
    sums = manifest.pop("sha256")
    assert manifest == {
        **{"kind": "l2rec onnx", "method": "SASRec", "version": predictor.version},
        **{"data": chains.fingerprint, "items": 30, "max_items": 50, "dim": 64, "opset": 18},
    }
    assert sums.keys() == {"user_encoder.onnx", "items.safetensors", "item_ids.json"}
    for name, digest in sums.items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    assert sorted(p.name for p in out.iterdir()) == sorted([*sums, "manifest.json"])

    ids = json.loads((out / "item_ids.json").read_text())
    tensors, metadata = load_tensors(out / "items.safetensors")
    assert ids == predictor.ids and metadata == {"model": predictor.version}
    history = ["i3", "i7", "i1"]
    rows = Ragged.from_rows([[ids.index(item) for item in history]])
    scores = run_graph(out / "user_encoder.onnx", rows)[0] @ tensors["vectors"].numpy().T
    best = predictor.recommend(history, len(ids), exclude_seen=False).items
    np.testing.assert_allclose(
        scores[[ids.index(each["id"]) for each in best]], [e["score"] for e in best], atol=1e-5
    )


def test_an_export_replaces_an_export_and_nothing_else(
    call: Call, sasrec_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refused(call("onnx", sasrec_run, "--out", out), "holds something else than an export")
    (out / "manifest.json").write_text('{"kind": "another", "sha256": {"notes.txt": ""}}')
    refused(call("onnx", sasrec_run, "--out", out), "holds something else than an export")
    earlier = '{"kind": "l2rec onnx", "sha256": {"user_encoder.onnx": ""}}'
    (out / "manifest.json").write_text(earlier)
    refused(call("onnx", sasrec_run, "--out", out), "holds something else than an export")
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").rename(out / "user_encoder.onnx")
    assert call("onnx", sasrec_run, "--out", out).code == 0
    assert (out / "manifest.json").read_text() != earlier
    assert (out / "user_encoder.onnx").read_bytes() != b"mine"
    refused(call("onnx", sasrec_run, "--out", out / "manifest.json"), "is a file; give a folder")
    refused(call("onnx", tmp_path, "--out", tmp_path / "new"), "not a run folder")
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_exported(
    call: Call, catalog_run: Finished, sasrec_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    outcome = call("onnx", catalog_run.run, "--out", out)
    refused(outcome, "L2Rec reads texts in its language model at each request")
    assert "`l2rec serve`" in outcome.err and "`l2rec embed`" in outcome.err
    blended = tmp_path / "blended"
    blend_run(sasrec_run, blended, progress=Quiet())
    refused(call("onnx", blended, "--out", out), "is blended: its co-occurrence and repeats are no")
    assert not out.exists()


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package(
    package: str, call: Call, sasrec_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    outcome = call("onnx", sasrec_run, "--out", tmp_path / "out")
    refused(outcome, f"`l2rec onnx` needs {package}: pip install 'l2rec[onnx]'")
    assert not (tmp_path / "out").exists()


def test_without_a_runtime_nothing_is_compared(
    call: Call, sasrec_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    outcome = call("onnx", sasrec_run, "--out", tmp_path / "out")
    assert outcome.code == 0 and "not compared with the model" in outcome.err
    assert (tmp_path / "out" / "user_encoder.onnx").is_file()


def test_a_wrong_graph_is_not_left_behind(
    sasrec_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = SASRec.user_encoder

    def wrong(model: SASRec) -> Any:
        encoder = right(model)
        return replace(encoder, items=encoder.items.flip(0))

    monkeypatch.setattr(SASRec, "user_encoder", wrong)
    with pytest.raises(CheckpointError, match="from the model's, so none was written"):
        onnx_run(sasrec_run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_exporter_that_fails_is_one_line(
    sasrec_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.onnx.OnnxExporterError("no translation of aten.sin\nand 100 lines more")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ConfigError, match=r"no translation of aten\.sin$") as error:
        onnx_run(sasrec_run, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
