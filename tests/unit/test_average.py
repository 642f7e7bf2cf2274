"""`l2rec average`: the mean of runs' scores, as a control."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tests.support import runs
from tests.support.runs import Finished

from l2rec.config import load_recipe
from l2rec.data.dataset import Dataset
from l2rec.data.ragged import Ragged
from l2rec.data.synthetic import chain_dataset
from l2rec.disk import read_json
from l2rec.errors import CheckpointError
from l2rec.evaluation.ranks import read_ranks
from l2rec.runs.predictor import Predictor, load
from l2rec.studies.average import Average, average_runs
from l2rec.studies.compare import compare_runs


def test_scores_are_the_mean(catalog_run: Finished, paper_run: Finished) -> None:
    histories = Ragged.from_rows([[0, 1], [3]])
    runs = [catalog_run.run, paper_run.run]
    each = [load(run).scorer()(histories) for run in runs]
    found = Average(runs).scorer()(histories)
    torch.testing.assert_close(found, (each[0] + each[1]) / 2)


def test_what_one_run_did_not_reach_is_not_lost_for_the_others(
    beam_run: Path, sasrec_run: Path
) -> None:
    histories = Ragged.from_rows([[0, 1], [3]])
    beam, every = (load(run).scorer()(histories) for run in (beam_run, sasrec_run))
    found = Average([beam_run, sasrec_run]).scorer()(histories)
    for row in range(2):
        known = beam[row][~beam[row].isneginf()]
        first = (beam[row].clamp(min=known.min()) - known.mean()) / known.std(correction=0)
        second = (every[row] - every[row].mean()) / every[row].std()
        torch.testing.assert_close(found[row], (first + second) / 2)


def test_several_methods_have_one_say_each(
    catalog_run: Finished, blended_run: Finished, sasrec_run: Path, tmp_path: Path
) -> None:
    """Whatever the size of their numbers; a blended run is another method."""
    histories = Ragged.from_rows([[0, 1], [3]])

    class Larger:
        def __init__(self, run: Predictor) -> None:
            self.n_items, self.scorer = run.n_items, lambda: lambda rows: 100 * run.scorer()(rows)

    for runs_ in ([catalog_run.run, sasrec_run], [catalog_run.run, blended_run.run]):
        both = Average(runs_)
        plain = both.scorer()(histories)
        z = [
            (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True)
            for scores in (load(run).scorer()(histories) for run in runs_)
        ]
        torch.testing.assert_close(plain, (z[0] + z[1]) / 2)
        both._runs[0] = Larger(both._runs[0])
        torch.testing.assert_close(both.scorer()(histories), plain)
    progress = runs.Quiet()
    report = average_runs([catalog_run.run, sasrec_run], tmp_path / "x", progress=progress)
    assert any("scores are standardised" in line for line in progress.lines)
    assert report["standardised"] is True


def test_a_run_averaged_with_itself_is_itself(catalog_run: Finished, tmp_path: Path) -> None:
    again = shutil.copytree(catalog_run.run, tmp_path / "again")
    found = average_runs([catalog_run.run, again], tmp_path / "both", progress=runs.Quiet())
    report = read_json(catalog_run.run / "report.json")
    own, averaged = (one["scores"][one["method"]] for one in (report, found))
    assert averaged == pytest.approx(own, abs=1e-6)
    with pytest.raises(CheckpointError, match="one of these is given twice"):
        average_runs(
            [again, tmp_path / "x" / ".." / "again"], tmp_path / "y", progress=runs.Quiet()
        )
    with pytest.raises(CheckpointError, match="both is an average, not a run"):
        compare_runs([catalog_run.run, tmp_path / "both"])


def test_two_seeds_become_a_folder_of_scores(
    catalog_run: Finished, chains: Dataset, tmp_path: Path
) -> None:
    other = load_recipe(
        str(runs.write_recipe(tmp_path / "r.yaml", runs.recipe_values(catalog_run.backbone))),
        ["seed=1"],
    )
    second = runs.finished(other, chains.path, tmp_path / "second").run
    out = tmp_path / "both"
    report = average_runs([catalog_run.run, second], out, progress=runs.Quiet(), command="it")
    assert read_json(out / "report.json") == report
    assert sorted(p.name for p in out.iterdir()) == ["ranks.parquet", "report.json"]
    each = [read_json(run / "report.json") for run in (catalog_run.run, second)]
    for cost in ("training_seconds", "tokens_seen"):
        assert report[cost] == pytest.approx(sum(one[cost] for one in each))
    ranks = read_ranks(out / "ranks.parquet")
    scores = report["scores"][report["method"]]
    assert ranks.values("ndcg@10").mean() == pytest.approx(scores["ndcg@10"])
    assert ranks.users == read_ranks(second / "ranks.parquet").users
    with pytest.raises(CheckpointError, match="not empty"):
        average_runs([catalog_run.run, second], out, progress=runs.Quiet())
    with pytest.raises(CheckpointError, match="two runs or more"):
        average_runs([second], tmp_path / "one", progress=runs.Quiet())


def test_runs_of_other_data_have_no_average(
    sasrec_run: Path, one_thread: None, tmp_path: Path
) -> None:
    data = chain_dataset(tmp_path / "data", 20, 30, 8, seed=3)
    config = load_recipe("sasrec", ["training.max_steps=1"])
    other = runs.finished(config, data.path, tmp_path / "other").run
    with pytest.raises(CheckpointError, match="only runs of the same data and split"):
        average_runs([sasrec_run, other], tmp_path / "out", progress=runs.Quiet())
    assert not (tmp_path / "out").exists()
