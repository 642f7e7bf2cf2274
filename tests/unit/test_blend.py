"""A run blended with co-occurrence: weights from validation alone, scores as written down."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.runs import Finished, Quiet

from l2rec.data.ragged import Ragged
from l2rec.data.splits import Split
from l2rec.disk import read_json
from l2rec.errors import CheckpointError
from l2rec.modules.cooccurrence import CoOccurrence, Weights, text_neighbors
from l2rec.runs.folder import load_run_config
from l2rec.runs.predictor import load
from l2rec.studies import blend
from l2rec.studies.blend import blend_run
from l2rec.studies.compare import compare_runs


def test_scores_are_as_written_down(table_run: Finished) -> None:
    model = load(table_run.run).model
    n = model.n_items
    together = CoOccurrence(n)
    together.count(Ragged.from_rows([[0, 1, 2], [1, 3], [2, 1]]))
    histories = Ragged.from_rows([[0, 1], [3]])
    own = model.scorer()(histories)
    met = together.recall(histories).toarray()
    scaled, counts, seen = blend._parts(model.scorer(), together)(histories)
    for chosen in (Weights(0.5, -8.0), Weights(0.0, 2.0)):
        scores = scaled + chosen.added(counts, seen)
        for row, history in enumerate([[0, 1], [3]]):
            mean, spread = float(own[row].mean()), float(own[row].std())
            for item in range(n):
                expected = (float(own[row, item]) - mean) / spread
                if item in history:
                    expected += chosen.repeat
                else:
                    expected += chosen.near * met[row, item]
                assert float(scores[row, item]) == pytest.approx(expected, abs=1e-4)


def test_texts_are_among_the_counts_of_a_method_that_reads_them(table_run: Finished) -> None:
    """The neighbours that the run's own backbone finds, as the model's table has them."""
    predictor = load(table_run.run)
    found = blend._alike(load_run_config(table_run.run)[0], predictor.texts)
    table = predictor.model.table
    np.testing.assert_allclose(
        found.toarray(), text_neighbors(table.text).toarray(), rtol=1e-3, atol=1e-5
    )


def test_a_blend_is_a_run_to_compare(table_run: Finished, tmp_path: Path) -> None:
    out = tmp_path / "blend"
    report = blend_run(table_run.run, out, progress=Quiet())
    assert read_json(out / "report.json") == report
    assert report["recipe"].endswith(" + nearby items")
    assert {"L2Rec + nearby items", "L2Rec", "popularity"} <= report["scores"].keys()
    # Weight 0 is among what is tried: on validation a blend is never worse than the run.
    assert (
        report["valid"]["ndcg@10"]
        >= read_json(table_run.run / "report.json")["valid"]["ndcg@10"] - 1e-9
    )
    found = compare_runs([table_run.run, out])
    assert len(found.entries) == 2, "one recipe, and yet two rows"
    with pytest.raises(CheckpointError, match="is not empty; choose another --out"):
        blend_run(table_run.run, out, progress=Quiet())


def test_the_test_split_chooses_nothing(
    table_run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever test targets are, the same blend is chosen."""
    first = blend_run(table_run.run, tmp_path / "a", progress=Quiet())
    split = blend.training_split

    def other(*of: Any) -> Split:
        made = split(*of)
        return replace(made, test_targets=np.zeros_like(made.test_targets))

    monkeypatch.setattr(blend, "training_split", other)
    second = blend_run(table_run.run, tmp_path / "b", progress=Quiet())
    assert first["blend"] == second["blend"]
    assert first["scores"]["L2Rec + nearby items"] != second["scores"]["L2Rec + nearby items"]
    assert torch.isfinite(torch.tensor(list(second["valid"].values()))).all()
