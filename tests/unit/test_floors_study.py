"""Floors of a data set, without a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.runs import Finished, Quiet
from typer.testing import CliRunner

from l2rec.cli import app
from l2rec.config import SplitConfig
from l2rec.data.dataset import Dataset
from l2rec.disk import read_json
from l2rec.errors import DataError
from l2rec.studies.floors import score_floors


def test_floors_are_those_of_a_run_on_the_same_data(catalog_run: Finished) -> None:
    report = score_floors(catalog_run.data, SplitConfig(), backbone="none", progress=Quiet())
    of_run = read_json(catalog_run.run / "report.json")
    assert list(report["scores"]) == ["popularity", "last item neighbour", "co-occurrence"]
    for name, scores in report["scores"].items():
        assert scores == pytest.approx(of_run["scores"][name])
    assert report["protocol"] == of_run["protocol"]
    assert report["dataset"]["fingerprint"] == of_run["dataset"]["fingerprint"]


def test_texts_are_ranked_by_an_untrained_backbone(catalog_run: Finished) -> None:
    report = score_floors(
        catalog_run.data, SplitConfig(), backbone=str(catalog_run.backbone), progress=Quiet()
    )
    assert 0 < report["scores"]["text neighbour"]["mrr"] < 1
    assert (catalog_run.data / "cache").is_dir(), "texts are read once"


def test_data_without_texts_has_no_text_neighbour(tmp_path: Path) -> None:
    events = {"user_id": [*"uuuvvv"], "item_id": [*"abcbca"], "timestamp": [0, 1, 2] * 2}
    import polars as pl

    data = Dataset.from_frames(pl.DataFrame(events), out=tmp_path / "d", progress=False)
    report = score_floors(data.path, SplitConfig(), progress=Quiet())
    assert "text neighbour" not in report["scores"] and report["backbone"] == "none"


def test_the_command_writes_what_it_prints(chains: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "floors.json"
    options = ["--backbone", "none", "--out", str(out)]
    shown = CliRunner().invoke(app, ["floors", str(chains.path), *options, "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout) == read_json(out)
    table = CliRunner().invoke(app, ["floors", str(chains.path), *options])
    assert "co-occurrence" in table.stdout and table.exit_code == 0
    by_time = CliRunner().invoke(app, ["floors", str(chains.path), *options, "--split", "time"])
    assert isinstance(by_time.exception, DataError | None)
