"""Cold items: in nothing that training sees, given to a trained model by their texts, and tested
apart.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import experiments, logs, runs
from tests.support.command import Call
from tests.support.experiments import Processes
from tests.support.rows import rows_of
from tests.support.runs import Finished

from l2rec.config import SplitConfig, load_recipe
from l2rec.data.cold import hold_out_items
from l2rec.data.dataset import Dataset, open_dataset
from l2rec.data.merge import merge
from l2rec.data.splits import Cases, Split, split_events
from l2rec.data.synthetic import simple_text
from l2rec.disk import read_json
from l2rec.errors import CheckpointError, DataError
from l2rec.evaluation.ranks import read_ranks
from l2rec.runs.checkpoint import load_tensors
from l2rec.runs.folder import read_catalog
from l2rec.runs.predictor import load
from l2rec.runs.train import evaluate_run, train_run
from l2rec.studies.average import average_runs
from l2rec.studies.blend import blend_run
from l2rec.studies.compare import compare_runs
from l2rec.studies.experiment.definition import load_experiment
from l2rec.studies.experiment.plan import plan
from l2rec.studies.experiment.report import page, to_json
from l2rec.studies.experiment.run import run as run_plan
from l2rec.studies.exposure import exposure_of
from l2rec.studies.floors import score_floors

ITEMS = 24
SASREC = ["training.max_steps=6", "model.dim=8", "model.dropout=0", "training.batch_users=16"]


TEXTS = [simple_text(17 * n) for n in range(ITEMS)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return logs.dated(tmp_path_factory.mktemp("data") / "all", TEXTS)


@pytest.fixture(scope="module")
def cold(data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return hold_out_items(data.path, tmp_path_factory.mktemp("data") / "cold", 0.25, seed=3)


# -- the data set --------------------------------------------------------------------------------


def by_ids(dataset: Dataset) -> list[list[str]]:
    ids = dataset.item_ids.to_pylist()
    return [[ids[item] for item in row] for row in rows_of(dataset.sequences)]


def test_items_are_numbered_anew_and_nothing_else_changes(data: Dataset, cold: Dataset) -> None:
    assert (cold.n_items, cold.n_cold, cold.n_warm) == (data.n_items, 6, data.n_items - 6)
    assert by_ids(cold) == by_ids(data)
    assert cold.user_ids.equals(data.user_ids)
    assert dict(zip(cold.item_ids.to_pylist(), cold.texts(), strict=True)) == dict(
        zip(data.item_ids.to_pylist(), data.texts(), strict=True)
    )
    np.testing.assert_array_equal(cold.timestamps, data.timestamps)
    assert cold.fingerprint != data.fingerprint
    assert cold.describe()["cold_items"] == 6 and data.describe()["cold_items"] == 0
    assert cold.meta["cold"]["of"]["fingerprint"] == data.fingerprint
    assert cold.warm_catalog["item_id"].to_pylist() == cold.item_ids.to_pylist()[: cold.n_warm]


def test_the_seed_draws_them(data: Dataset, cold: Dataset, tmp_path: Path) -> None:
    again = hold_out_items(data.path, tmp_path / "again", 0.25, seed=3)
    other = hold_out_items(data.path, tmp_path / "other", 0.25, seed=4)
    assert again.fingerprint == cold.fingerprint != other.fingerprint


def test_an_item_without_a_text_is_never_cold(tmp_path: Path) -> None:
    dataset = logs.dated(tmp_path / "some", [t if n % 2 else "" for n, t in enumerate(TEXTS)])
    some = hold_out_items(dataset.path, tmp_path / "cold", 0.4)
    assert all(some.texts()[some.n_warm :])
    with pytest.raises(DataError, match="12 have a text"):
        hold_out_items(dataset.path, tmp_path / "more", 0.6)


def test_what_cannot_be_is_refused(
    data: Dataset, cold: Dataset, tmp_path: Path, call: Call
) -> None:
    for share in (0.0, 1.0, -1.0):
        with pytest.raises(DataError, match="between 0 and 1"):
            hold_out_items(data.path, tmp_path / "x", share)
    with pytest.raises(DataError, match="has 6 cold items already"):
        hold_out_items(cold.path, tmp_path / "x")
    with pytest.raises(DataError, match="would be trained on"):
        merge([data.path, cold.path], tmp_path / "x")
    own = shutil.copytree(data.path, tmp_path / "own")
    with pytest.raises(DataError, match="is the data set that is read"):
        hold_out_items(own, own / ".." / "own")
    assert open_dataset(own).fingerprint == data.fingerprint
    wrong = call("cold", data.path, "--out", tmp_path / "x", "--seed", "-1")
    assert wrong.code == 2 and "'--seed'" in wrong.err and not (tmp_path / "x").exists()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "mine.txt").write_text("mine")
    assert call("cold", data.path, "--out", tmp_path / "kept").code == 2
    assert (tmp_path / "kept" / "mine.txt").read_text() == "mine"
    done = call("cold", data.path, "--out", tmp_path / "made", "--share", "0.25", "--seed", "3")
    assert "of which 6 are cold" in done.out
    assert open_dataset(tmp_path / "made").fingerprint == cold.fingerprint


# -- the splits ----------------------------------------------------------------------------------


def plain(cases: Cases) -> list[tuple[int, list[int], list[int]]]:
    columns = (cases.users.tolist(), rows_of(cases.histories), rows_of(cases.targets))
    return list(zip(*columns, strict=True))


@pytest.mark.parametrize("kind", ["leave-one-out", "tied-day", "time"])
def test_cold_items_are_in_nothing_but_the_targets_of_the_test(
    data: Dataset, cold: Dataset, kind: Any
) -> None:
    """Compare with the split of all events, from which they are taken out, row by row."""
    number = {item: n for n, item in enumerate(cold.item_ids.to_pylist())}
    new = [number[item] for item in data.item_ids.to_pylist()]
    whole, split = split_events(data, kind), split_events(cold, kind)

    def warm(row: list[int]) -> list[int]:
        return [new[item] for item in row if new[item] < cold.n_warm]

    train = [kept for row in rows_of(whole.train) if (kept := warm(row))]
    assert rows_of(split.train) == train
    valid = [(u, warm(h), warm(t)) for u, h, t in plain(whole.valid)]
    assert plain(split.valid) == [case for case in valid if case[1] and case[2]]
    test = [(u, warm(h), [new[i] for i in t]) for u, h, t in plain(whole.test)]
    assert plain(split.test) == [case for case in test if case[1]]
    assert split.warm == cold.n_warm and whole.warm is None
    assert (split.test.targets.values >= cold.n_warm).any()
    assert "6 of 24 items are cold" in split.protocol


def test_too_many_cold_items_leave_nobody(data: Dataset, tmp_path: Path) -> None:
    most = hold_out_items(data.path, tmp_path / "most", 0.95)
    with pytest.raises(DataError, match="choose another --share"):
        split_events(most)


# -- runs ----------------------------------------------------------------------------------------


def test_what_training_may_know_of_many_users(cold: Dataset) -> None:
    users = np.arange(cold.n_users)[::-2]
    rows = cold.warm(users)
    assert len(rows) == len(users) and len(rows.values) < cold.sequences.take(users).lengths.sum()
    for user, row in zip(users, rows, strict=True):
        np.testing.assert_array_equal(row, cold.warm_items(int(user)))


@pytest.fixture(scope="module")
def run(cold: Dataset, backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    config = runs.config(backbone_folder, "catalog")
    return runs.finished(config, cold.path, tmp_path_factory.mktemp("runs") / "catalog")


@pytest.fixture(scope="module")
def ids_alone(cold: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = load_recipe("sasrec", SASREC)
    return runs.finished(config, cold.path, tmp_path_factory.mktemp("runs") / "sasrec").run


def test_a_model_never_sees_them(run: Finished, cold: Dataset, tmp_path: Path) -> None:
    """Train on the same data, the texts of cold items exchanged: the model is the same."""
    last = set(cold.item_ids.to_pylist()[cold.n_warm :])
    texts = [TEXTS[n - 1] if f"i{n}" in last else text for n, text in enumerate(TEXTS)]
    other = hold_out_items(
        logs.dated(tmp_path / "all", texts).path, tmp_path / "cold", 0.25, seed=3
    )
    assert set(other.item_ids.to_pylist()[other.n_warm :]) == last
    config = runs.config(run.backbone, "catalog")
    second = runs.finished(config, other.path, tmp_path / "run")
    runs.assert_same_weights(run.run, second.run)
    rows = [
        len(tensor)
        for name, tensor in load_tensors(run.run / "model.safetensors")[0].items()
        if name.endswith("residual")
    ]
    assert rows == [cold.n_warm] and len(read_catalog(run.run)) == cold.n_warm
    assert len(load_tensors(run.run / "items.safetensors")[0]["vectors"]) == cold.n_warm
    ours, theirs = (read_ranks(folder / "ranks.parquet") for folder in (run.run, second.run))
    assert ours.ranks.tolist() != theirs.ranks.tolist(), "they are ranked by their texts"


def expected(predictor: Any, split: Split, cold: Dataset) -> list[float]:
    """Rank the targets of the test by a model that was given the cold items by hand."""
    ids = cold.item_ids.to_pylist()
    texts = cold.texts()
    predictor.add_items({ids[n]: texts[n] for n in range(cold.n_warm, cold.n_items)})
    scorer, ranks = predictor.scorer(), []
    with torch.inference_mode():
        for row, target in enumerate(split.test.targets.values.tolist()):
            scores = scorer(split.test.histories.take(np.array([row])))[0]
            equal = int((scores == scores[target]).sum()) - 1
            ranks.append(1 + int((scores > scores[target]).sum()) + equal / 2)
    return ranks


def test_they_are_added_by_their_texts_and_tested_apart(run: Finished, cold: Dataset) -> None:
    split = split_events(cold)
    ranks = read_ranks(run.run / "ranks.parquet")
    assert ranks.warm == cold.n_warm
    assert ranks.ranks.tolist() == expected(load(run.run), split, cold)
    report = read_json(run.run / "report.json")
    is_cold = split.test.targets.values >= cold.n_warm
    names = ["L2Rec", "popularity", "last item neighbour", "co-occurrence", "untrained backbone"]
    for part, which in (("cold", is_cold), ("warm", ~is_cold)):
        found = report["parts"][part]
        assert list(found["scores"]) == names and found["users_tested"] == which.sum()
        gains = np.where(ranks.ranks[which] <= 10, 1 / np.log2(1 + ranks.ranks[which]), 0)
        assert found["scores"]["L2Rec"]["ndcg@10"] == pytest.approx(gains.mean())
        assert f"{part.capitalize()} targets" in (run.run / "report.html").read_text()
    for metric in ("ndcg@10", "mrr", "recall@10_masked"):
        parts = [report["parts"][part] for part in ("cold", "warm")]
        mean = sum(p["users_tested"] * p["scores"]["L2Rec"][metric] for p in parts) / len(
            split.test
        )
        assert report["scores"]["L2Rec"][metric] == pytest.approx(mean)
    again = evaluate_run(run.run, "test", runs.Quiet())
    assert again["cold"]["ndcg@10"] == report["parts"]["cold"]["scores"]["L2Rec"]["ndcg@10"]


def test_what_knows_ids_alone_ranks_them_last(ids_alone: Path, cold: Dataset) -> None:
    ranks = read_ranks(ids_alone / "ranks.parquet")
    is_cold = ranks.targets >= cold.n_warm
    assert set(ranks.ranks[is_cold]) == {cold.n_warm + (cold.n_cold + 1) / 2}
    assert ranks.ranks[~is_cold].max() <= cold.n_warm


def test_floors_rank_them_last_alike(tmp_path: Path) -> None:
    """Below warm items without a training event too, whose counts are zero as well."""
    few = hold_out_items(logs.dated(tmp_path / "all", TEXTS, 10).path, tmp_path / "cold", 0.25)
    counts = np.bincount(split_events(few).train.values, minlength=few.n_warm)
    assert (counts == 0).any(), "or nothing is tested here"
    run = runs.finished(load_recipe("sasrec", SASREC), few.path, tmp_path / "run").run
    of_run = read_json(run / "report.json")
    of_data = score_floors(few.path, SplitConfig(), backbone="none", progress=runs.Quiet())
    of_ids = of_run["parts"]["cold"]["scores"]["SASRec"]["mrr"]
    assert of_ids == pytest.approx(1 / (few.n_warm + (few.n_cold + 1) / 2))
    for floor in ("popularity", "last item neighbour", "co-occurrence"):
        for report in (of_run, of_data):
            assert report["parts"]["cold"]["scores"][floor]["mrr"] == pytest.approx(of_ids)


def test_it_is_said_how_often_they_are_listed(
    run: Finished, ids_alone: Path, cold: Dataset
) -> None:
    for path, listed in ((run.run, True), (ids_alone, False)):
        report = exposure_of(path, ["popularity"], progress=runs.Quiet())
        groups = {row["group"]: row for row in report["items"]["popularity"]}
        assert groups["cold"]["items"] >= cold.n_cold and groups["cold"]["next"] > 0
        assert (groups["cold"]["exposure"] > 0) is listed


def test_blends_and_averages_have_both_parts(
    run: Finished, ids_alone: Path, cold: Dataset, tmp_path: Path
) -> None:
    blended = blend_run(run.run, tmp_path / "blend", progress=runs.Quiet())
    ranks = read_ranks(tmp_path / "blend" / "ranks.parquet")
    assert ranks.ranks.tolist() == expected(load(tmp_path / "blend"), split_events(cold), cold)
    method = blended["method"]
    assert list(blended["parts"]["cold"]["scores"])[:2] == [method, "L2Rec"]
    assert len(load_tensors(tmp_path / "blend" / "items.safetensors")[0]["vectors"]) == cold.n_warm
    averaged = average_runs([run.run, ids_alone], tmp_path / "both", progress=runs.Quiet())
    of_cold = averaged["parts"]["cold"]["scores"][averaged["method"]]
    assert of_cold["recall@10"] == 0, "one of the two does not know them"
    compared = compare_runs([run.run, ids_alone])
    assert "cold target" in {block.segment for block in compared.blocks}


def test_a_start_that_knows_them_is_refused(
    data: Dataset, cold: Dataset, backbone_folder: Path, tmp_path: Path
) -> None:
    config = load_recipe("sasrec", SASREC)
    before = runs.finished(config, data.path, tmp_path / "before").run
    with pytest.raises(CheckpointError, match="trained on this data by another split"):
        train_run(config, cold.path, tmp_path / "x", progress=runs.Quiet(), init=before)


# -- experiments ---------------------------------------------------------------------------------


def test_an_experiment_has_a_table_for_each_part_and_compares_on_one(
    cold: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    Processes(monkeypatch)
    both = [{"a": "wide", "b": "narrow", "targets": part} for part in ("all", "cold", "warm")]
    path = experiments.written(tmp_path / "e.yaml", comparisons=both)
    planned = plan(load_experiment(str(path)), [cold.path], tmp_path / "out")
    planned = run_plan(planned, progress=runs.Quiet())
    contents = page(planned)
    parts = ["cold", "cold, cold targets", "cold, warm targets"]
    assert [section.title for section in contents.sections] == parts
    assert len(contents.cells) == 4, "each run once"
    found = to_json(planned)
    assert [test["data"] for test in found["comparisons"]] == parts
    for one, test in zip(parts, found["comparisons"], strict=True):
        means = [
            found["scores"][one][name]["ndcg@10_masked"]["mean"] for name in ("wide", "narrow")
        ]
        assert test["difference"] == pytest.approx(means[0] - means[1])
    whole, of_cold, of_warm = (found["scores"][one]["wide"] for one in parts)
    assert of_cold["ndcg@10"]["mean"] == 0 < of_warm["ndcg@10"]["mean"] > whole["ndcg@10"]["mean"]


def test_a_part_that_is_not_there_is_said(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    Processes(monkeypatch)
    only = [{"a": "wide", "b": "narrow", "targets": "cold"}]
    path = experiments.written(tmp_path / "e.yaml", comparisons=only, seeds=[1])
    planned = plan(load_experiment(str(path)), [data.path], tmp_path / "out")
    (test,) = to_json(run_plan(planned, progress=runs.Quiet()))["comparisons"]
    assert test["notes"] == ["no item is cold: l2rec cold makes such data"]
