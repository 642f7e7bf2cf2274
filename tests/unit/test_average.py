"""`results/average.py`: the mean of runs' scores, as a control."""

from __future__ import annotations

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.runs import Finished

from l2rec.data.ragged import Ragged
from l2rec.disk import read_json
from l2rec.runs.predictor import load

PATH = Path(__file__).parents[2] / "results" / "average.py"


@pytest.fixture(scope="module")
def average() -> Any:
    spec = spec_from_file_location("average", PATH)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_scores_are_the_mean(average: Any, table_run: Finished, catalog_run: Finished) -> None:
    histories = Ragged.from_rows([[0, 1], [3]])
    runs = [table_run.run, catalog_run.run]
    each = [load(run).scorer()(histories) for run in runs]
    found = average.Average(runs).scorer()(histories)
    torch.testing.assert_close(found, (each[0] + each[1]) / 2)


def test_a_run_averaged_with_itself_is_itself(
    average: Any, table_run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, file = str(table_run.run), tmp_path / "found.json"
    options = [run, run, "--against", run, "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["average.py", *options])
    average.main()
    found, report = json.loads(file.read_text()), read_json(table_run.run / "report.json")
    own = report["scores"][report["method"]]
    for metric, value in found["scores"].items():
        assert value == pytest.approx(own[metric], abs=1e-6)
        assert found["against_scores"][metric] == pytest.approx(value, abs=1e-6)
        assert found["p"][metric] > 0.1
