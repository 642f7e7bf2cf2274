"""Whole runs on a tiny backbone: killed and resumed, loaded without their data, extended."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from tests.support import runs
from tests.support.command import PROGRAM, Call
from tests.support.errors import one_line
from tests.support.runs import SMALL, Finished, Quiet, assert_same_training, log

from l2rec.config import resolve
from l2rec.data.dataset import Dataset, open_dataset
from l2rec.data.prepare import prepare
from l2rec.data.splits import leave_one_out
from l2rec.data.synthetic import chain_dataset
from l2rec.disk import read_json
from l2rec.errors import BackboneError, CheckpointError, ConfigError, DataError, L2RecError
from l2rec.evaluation.ranks import read_ranks
from l2rec.methods.sasrec import SASRec
from l2rec.runs import diagnostics, folder, scoring
from l2rec.runs import train as training
from l2rec.runs.checkpoint import load_tensors, save_tensors, trained_tensors
from l2rec.runs.embed import embed_run
from l2rec.runs.folder import user_history
from l2rec.runs.loop import TrainingResult
from l2rec.runs.predictor import Predictor, load
from l2rec.runs.start import start_from
from l2rec.runs.train import evaluate_run, train_run
from l2rec.studies.blend import blend_run

TIMELESS = ("scores", "valid", "best_step", "steps", "stopped", "significance", "tokens_seen")


def copied(finished: Finished, to: Path) -> Path:
    shutil.copytree(finished.run, to)
    return to


def assert_same_run(a: Path, b: Path) -> None:
    assert_same_training(a, b)
    reports = [read_json(run / "report.json") for run in (a, b)]
    for key in TIMELESS:
        assert reports[0][key] == reports[1][key], key
    ours_ranks, their_ranks = (read_ranks(run / "ranks.parquet") for run in (a, b))
    assert np.array_equal(ours_ranks.ranks, their_ranks.ranks)


# -- a run ---------------------------------------------------------------------------------------


def test_what_a_run_leaves(catalog_run: Finished, chains: Dataset) -> None:
    run = catalog_run.run
    report = read_json(run / "report.json")
    assert list(report["scores"]) == [
        "L2Rec",
        "popularity",
        "last item neighbour",
        "co-occurrence",
        "untrained backbone",
    ]
    assert report["dataset"]["fingerprint"] == chains.fingerprint
    # The untrained row is the model of step 0, not the trained one.
    assert report["scores"]["untrained backbone"] != report["scores"]["L2Rec"]
    assert report["scores"]["L2Rec"]["ndcg@10"] > report["scores"]["untrained backbone"]["ndcg@10"]
    best = max(r["ndcg@10_masked"] for r in log(run, "valid"))
    assert (report["selected_by"], report["valid"]["ndcg@10_masked"]) == ("ndcg@10_masked", best)
    texts = report["texts"]
    assert texts["limit"] == SMALL["item_tokens"] and 0 < texts["tokens_read"] <= 1
    assert report["backbone"]["trained_parameters"] > 0 and report["wall_seconds"] > 0
    names = {p.name for p in run.iterdir()}
    assert {"report.html", "diagnostics.json", "items.safetensors", "catalog.parquet"} <= names
    assert not [p for p in run.rglob("*") if p.name.endswith(".part")]
    tensors, _ = load_tensors(run / "model.safetensors")
    assert not [n for n in tensors if n.startswith("backbone")]
    start, _ = load_tensors(run / "state" / "start.safetensors")
    assert not torch.equal(start["items.semantic"], tensors["items.semantic"])


def test_no_score_of_the_test_split_before_training_ends(
    backbone_folder: Path, chains: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    train, test = training.train, training.score
    monkeypatch.setattr(
        training, "train", lambda *a, **k: (order.append("train"), train(*a, **k))[1]
    )
    monkeypatch.setattr(training, "score", lambda *a, **k: (order.append("test"), test(*a, **k))[1])
    config = runs.config(backbone_folder, max_steps=1)
    train_run(config, chains.path, tmp_path / "run", progress=Quiet())
    assert order == ["train", *["test"] * 5]  # the method, three floors, the untrained model


@pytest.mark.parametrize("items", ["catalog", "paper"])
def test_sigkill_and_resume_is_exact(
    items: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    finished: Finished = request.getfixturevalue(f"{items}_run")
    values = runs.recipe_values(finished.backbone, items)
    recipe = runs.write_recipe(tmp_path / "recipe.yaml", values)
    run = tmp_path / "run"
    arguments = ["train", str(recipe), "--data", str(finished.data), "--out", str(run)]
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen([*PROGRAM, *arguments], stdout=output, stderr=output)
        # In the middle of the second epoch (of 5 steps), then at any moment.
        deadline = time.monotonic() + 120
        while not (run / "state" / "step-00000007").is_dir():
            assert process.poll() is None, (tmp_path / "output").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (run / "report.json").is_file()
    progress = Quiet()
    config = resolve(values, where="test")
    train_run(config, finished.data, run, progress=progress, resume=True)
    assert [line for line in progress.lines if line.startswith("resuming at step ")]
    assert_same_run(finished.run, run)
    assert not list(run.rglob("*.part"))


def test_killed_before_the_first_state(
    catalog_run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    config = runs.config(catalog_run.backbone)
    with monkeypatch.context() as patch:
        patch.setattr(training, "train", crash)
        with pytest.raises(KeyboardInterrupt):
            train_run(config, catalog_run.data, tmp_path / "run", progress=Quiet())
    train_run(config, catalog_run.data, tmp_path / "run", progress=Quiet(), resume=True)
    assert_same_run(catalog_run.run, tmp_path / "run")


@pytest.mark.parametrize("moment", ["write_ranks", "write_json", "write_report"])
def test_killed_after_training(
    catalog_run: Finished, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    run = copied(catalog_run, tmp_path / "run")
    config = runs.config(catalog_run.backbone)
    (run / "report.html").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(scoring if moment == "write_ranks" else training, moment, crash)
        with pytest.raises(KeyboardInterrupt):
            train_run(config, catalog_run.data, run, progress=Quiet(), resume=True)
    assert folder.finished_report(run) is None
    train_run(config, catalog_run.data, run, progress=Quiet(), resume=True)
    assert_same_run(catalog_run.run, run)
    assert folder.finished_report(run) is not None


def test_resume_of_a_finished_run_changes_nothing(
    catalog_run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(catalog_run, tmp_path / "run")
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.rglob("*") if p.is_file()}
    monkeypatch.setattr(
        "l2rec.runs.predictor.load_backbone", None
    )  # not even the backbone is needed
    progress = Quiet()
    config = runs.config(catalog_run.backbone)
    report = train_run(config, catalog_run.data, run, progress=progress, resume=True)
    assert report == read_json(run / "report.json")
    assert progress.lines == [f"{run} is finished: these are its scores"]
    after = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.rglob("*") if p.is_file()}
    assert after == before


def test_resume_with_more_epochs_goes_on(catalog_run: Finished, tmp_path: Path) -> None:
    run = copied(catalog_run, tmp_path / "run")
    config = runs.config(catalog_run.backbone, epochs=3)
    report = train_run(config, catalog_run.data, run, progress=Quiet(), resume=True)
    assert report["steps"] == read_json(catalog_run.run / "report.json")["steps"] * 3 // 2
    saved, identity = folder.load_run_config(run)
    assert saved.training.epochs == 3 and folder.resumed_from(identity) == [{"epochs": 2}]
    config = runs.config(catalog_run.backbone, epochs=4, lr=0.001)
    train_run(config, catalog_run.data, run, progress=Quiet(), resume=True)
    lr = saved.training.lr
    noted = [{"epochs": 2}, {"lr": lr, "epochs": 3}]
    assert folder.resumed_from(folder.load_run_config(run)[1]) == noted
    blend_run(run, tmp_path / "blended", progress=Quiet())
    assert folder.resumed_from(folder.load_run_config(tmp_path / "blended")[1]) == noted


def test_a_report_is_not_of_an_earlier_training(
    catalog_run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    run = copied(catalog_run, tmp_path / "run")
    config = runs.config(catalog_run.backbone, epochs=3)
    with monkeypatch.context() as patch:
        patch.setattr(training, "train", crash)
        with pytest.raises(KeyboardInterrupt):
            train_run(config, catalog_run.data, run, progress=Quiet(), resume=True)
    assert folder.finished_report(run) is None
    assert train_run(config, catalog_run.data, run, progress=Quiet(), resume=True)["steps"] == 30


def test_the_model_is_the_best_one_when_all_is_scored(
    catalog_run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[Any] = []
    real = training.build_model

    def build(*args: Any) -> Any:
        models.append(real(*args))
        return models[-1]

    monkeypatch.setattr(training, "build_model", build)
    run = copied(catalog_run, tmp_path / "run")
    (run / "report.html").unlink()
    config = runs.config(catalog_run.backbone)
    train_run(config, catalog_run.data, run, progress=Quiet(), resume=True)
    best, _ = load_tensors(run / "model.safetensors")
    assert all(torch.equal(t, best[n]) for n, t in trained_tensors(models[0]).items())


def test_a_folder_is_claimed_once(catalog_run: Finished, chains: Dataset, tmp_path: Path) -> None:
    def refused(run: Path, message: str, data: Path = chains.path, **changes: Any) -> None:
        resume = changes.pop("resume", True)
        config = runs.config(catalog_run.backbone, **changes)
        before = {p: p.stat().st_mtime_ns for p in run.rglob("*")} if run.is_dir() else {}
        with pytest.raises(CheckpointError, match=message) as error:
            train_run(config, data, run, progress=Quiet(), resume=resume)
        one_line(error)
        assert before == ({p: p.stat().st_mtime_ns for p in run.rglob("*")} if before else {})

    refused(catalog_run.run, "holds a run already; add --resume", resume=False)
    refused(catalog_run.run, r"another recipe \(model\.rank was 2, is 3\)", model={"rank": 3})
    other = chain_dataset(tmp_path / "other", 20, 10, 6, seed=1)
    refused(catalog_run.run, f"{chains.fingerprint}, this is {other.fingerprint}", data=other.path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    refused(tmp_path / "mine", "not empty and not a run folder; choose another --out")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is a file; choose a folder")


@pytest.mark.skipif(sys.platform == "win32", reason="locks of POSIX")
def test_one_training_at_a_time(
    catalog_run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second one is refused at once, with and without --resume, and changes nothing."""
    config, run = runs.config(catalog_run.backbone), tmp_path / "run"
    train, refused = training.train, []

    def during(*arguments: Any, **named: Any) -> TrainingResult:
        before = sorted(run.rglob("*"))
        for resume in (False, True):
            with pytest.raises(CheckpointError, match="another process is working on it") as error:
                train_run(config, catalog_run.data, run, progress=Quiet(), resume=resume)
            refused.append(one_line(error))
        assert sorted(run.rglob("*")) == before
        return train(*arguments, **named)

    monkeypatch.setattr(training, "train", during)
    train_run(config, catalog_run.data, run, progress=Quiet())
    assert len(refused) == 2 and all(str(run) in line for line in refused)
    assert_same_run(catalog_run.run, run)
    served = {"events.db"}  # of tests that serve the other run
    assert {p.name for p in run.iterdir()} == {p.name for p in catalog_run.run.iterdir()} - served


@pytest.mark.skipif(sys.platform == "win32", reason="locks of POSIX")
def test_two_trainings_at_the_same_moment(chains: Dataset, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [*PROGRAM, "train", "sasrec", "--data", str(chains.path), "--out", str(run)]
    both = [
        subprocess.Popen(
            [*command, f"seed={seed}", "training.max_steps=6"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in (0, 1)
    ]
    errors = [process.communicate(timeout=120)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2]
    (line,) = errors[codes.index(2)].splitlines()
    assert str(run) in line and ("another process is working on" in line or "holds a run" in line)
    report = read_json(run / "report.json")
    assert report["seed"] == codes.index(0) and report["steps"] == 6
    steps = [record["step"] for record in log(run, "train")]
    assert steps == sorted(set(steps))


def test_resume_refuses_other_weights(catalog_run: Finished, tmp_path: Path) -> None:
    backbone = tmp_path / "bert"
    shutil.copytree(catalog_run.backbone, backbone)
    config = runs.config(backbone, max_steps=1)
    train_run(config, catalog_run.data, tmp_path / "run", progress=Quiet())
    runs.save_backbone(backbone, seed=1)
    config = runs.config(backbone, max_steps=2)
    with pytest.raises(CheckpointError, match="trained on other weights"):
        train_run(config, catalog_run.data, tmp_path / "run", progress=Quiet(), resume=True)
    with pytest.raises(CheckpointError, match="trained on other weights") as error:
        load(tmp_path / "run")
    one_line(error)


def test_a_full_disk_in_training_keeps_the_run(
    catalog_run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from l2rec.runs import checkpoint

    real, saved = checkpoint.save_file, []

    def fills_up(*args: Any, **kwargs: Any) -> None:
        saved.append(args)
        if len(saved) > 12:
            raise OSError(28, "No space left on device")
        real(*args, **kwargs)

    config = runs.config(catalog_run.backbone)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", fills_up)
        with pytest.raises(CheckpointError, match=r"disk is full.*--resume"):
            train_run(config, catalog_run.data, tmp_path / "run", progress=Quiet())
    load(tmp_path / "run").recommend(["i1"])
    train_run(config, catalog_run.data, tmp_path / "run", progress=Quiet(), resume=True)
    assert_same_run(catalog_run.run, tmp_path / "run")


def test_nobody_to_evaluate(backbone_folder: Path, tmp_path: Path) -> None:
    data = chain_dataset(tmp_path / "short", 10, 5, 2, seed=0)
    config = runs.config(backbone_folder)
    with pytest.raises(L2RecError, match="no user has three events"):
        train_run(config, data.path, tmp_path / "run", progress=Quiet())


def test_one_evaluable_user_has_scores_and_no_test(tmp_path: Path, call: Call) -> None:
    log = "user_id,item_id,timestamp\nann,a,1\nann,b,2\nann,c,3\nbob,a,1\nbob,c,2\n"
    (tmp_path / "log.csv").write_text(log)
    prepare(tmp_path / "log.csv", tmp_path / "data", progress=False)
    run = tmp_path / "run"
    done = call(
        *("train", "sasrec", "--data", tmp_path / "data", "--out", run), "training.max_steps=2"
    )
    assert done.code == 0, done.err
    report = read_json(run / "report.json")
    assert report["significance"] == {} and len(report["scores"]) == 5
    page = (run / "report.html").read_text()
    assert "popularity" in page and "significant" not in page
    assert call("compare", run, "--json").code == 0
    again = call("train", "sasrec", "--data", tmp_path / "data", "--out", run, "--resume")
    assert again.code == 0


def test_a_share_of_the_users_is_trained_on(
    backbone_folder: Path, chains: Dataset, tmp_path: Path
) -> None:
    config = runs.config(backbone_folder, user_share=0.25, epochs=1)
    split = training.training_split(config, chains)
    assert len(split.train) == round(0.25 * chains.n_users)
    report = train_run(config, chains.path, tmp_path / "run", progress=Quiet())
    whole = train_run(
        runs.config(backbone_folder, epochs=1),
        chains.path,
        tmp_path / "whole",
        progress=Quiet(),
    )
    ranks = [read_ranks(tmp_path / name / "ranks.parquet") for name in ("run", "whole")]
    assert len(ranks[0].users) == len(ranks[1].users) == len(split.test.users)
    assert report["steps"] < whole["steps"]
    # The floors know no more than the method.
    assert report["scores"]["popularity"] != whole["scores"]["popularity"]


# -- fine-tuning ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def target_data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return chain_dataset(tmp_path_factory.mktemp("target") / "data", 20, 17, 6, seed=3)


@pytest.mark.parametrize("items", ["catalog", "paper"])
def test_fine_tuning_starts_from_the_pretrained_experts(
    items: str, request: pytest.FixtureRequest, target_data: Dataset, tmp_path: Path
) -> None:
    finished: Finished = request.getfixturevalue(f"{items}_run")
    config = runs.config(finished.backbone, items, max_steps=2)
    run = tmp_path / "run"
    progress = Quiet()
    report = train_run(config, target_data.path, run, progress=progress, init=finished.run)
    assert any("rows of its items left out" in line for line in progress.lines)
    assert "before fine-tuning" in report["scores"]
    assert "untrained backbone" not in report["scores"]
    start, _ = load_tensors(run / "state" / "start.safetensors")
    before, _ = load_tensors(finished.run / "model.safetensors")
    experts = [n for n in before if n.startswith("experts.")]
    assert experts and all(torch.equal(start[n], before[n]) for n in experts)
    if items == "catalog":
        residual = start["items.table.residual"]
        assert len(residual) == 17 and residual.abs().max() == 0
        mean = "items.table.mean"
        assert not torch.equal(start[mean], before[mean])  # of its own items
    # Going on does not need to be told again, nor the pre-trained run to be there.
    config = runs.config(finished.backbone, items, max_steps=4)
    again = train_run(config, target_data.path, run, progress=Quiet(), resume=True)
    assert again["scores"]["before fine-tuning"] == report["scores"]["before fine-tuning"]
    assert folder.load_run_config(run)[1]["init"] == str(finished.run)


def test_fine_tuning_refuses_another_recipe(
    catalog_run: Finished, paper_run: Finished, target_data: Dataset, tmp_path: Path
) -> None:
    config = runs.config(catalog_run.backbone, model={"rank": 3})
    for init, message in (
        (catalog_run.run, r"experts\..* does not fit this recipe"),
        (paper_run.run, "does not fit this recipe"),
        (tmp_path, "not a run folder"),
    ):
        with pytest.raises(CheckpointError, match=message) as error:
            train_run(config, target_data.path, tmp_path / "run", progress=Quiet(), init=init)
        one_line(error)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["catalog_run", "paper_run", "sasrec_run", "beam_run"])
def test_a_start_on_the_same_items_is_taken_whole(
    name: str, request: pytest.FixtureRequest, chains: Dataset, tmp_path: Path
) -> None:
    """Before its first step the run scores as its start does, on test and on validation."""
    found = request.getfixturevalue(name)
    start = found.run if isinstance(found, Finished) else found
    values = folder.load_run_config(start)[0].model_dump(mode="json")
    values["training"] |= {"max_steps": 1}
    out, progress = tmp_path / "run", Quiet()
    report = train_run(
        resolve(values, where="test"), chains.path, out, progress=progress, init=start
    )
    assert any("rows of its items kept: the catalog is the same" in li for li in progress.lines)
    before = read_json(start / "report.json")
    assert report["scores"]["before fine-tuning"] == pytest.approx(
        before["scores"][before["method"]], abs=1e-6
    )
    first = log(out, "valid")[0]
    assert first["step"] == 0
    assert {key: first[key] for key in before["valid"]} == pytest.approx(before["valid"], abs=1e-6)


def test_items_of_one_name_with_other_texts_are_others(
    catalog_run: Finished, chains: Dataset, tmp_path: Path
) -> None:
    texts = [f"{text} anew" for text in chains.texts()]
    column = chains.catalog.column_names.index("text")
    table = chains.catalog.set_column(column, "text", [texts])
    other = tmp_path / "other"
    shutil.copytree(chains.path, other)
    pq.write_table(table, other / "catalog.parquet")
    model = load(catalog_run.run).model
    line = start_from(model, catalog_run.run, open_dataset(other))
    assert line.endswith("the rows of its items left out")


def test_a_start_of_which_nothing_can_be_taken_is_refused(
    sasrec_run: Path, target_data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method all of whose tensors belong to its items learns nothing that other data can use."""
    tensors, _ = load_tensors(sasrec_run / "model.safetensors")
    monkeypatch.setattr(SASRec, "item_tensors", frozenset(tensors))
    config, run = folder.load_run_config(sasrec_run)[0], tmp_path / "run"
    with pytest.raises(CheckpointError, match="all that SASRec learns belongs to its") as error:
        train_run(config, target_data.path, run, progress=Quiet(), init=sasrec_run)
    one_line(error)
    assert "leave --init out" in str(error.value) and not run.exists()


# -- loading -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["catalog", "paper"])
def moved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run far from its data set, which is gone."""
    finished: Finished = request.getfixturevalue(f"{request.param}_run")
    run = copied(finished, tmp_path_factory.mktemp("moved") / "run")
    identity = yaml.safe_load((run / "config.yaml").read_text())
    identity["dataset"]["path"] = str(run / "gone")
    (run / "config.yaml").write_text(yaml.safe_dump(identity))
    return run


@pytest.fixture
def predictor(moved: Path) -> Predictor:
    return load(moved)


def test_load_gives_the_scores_of_the_report(
    moved: Path, predictor: Predictor, chains: Dataset
) -> None:
    stored = read_ranks(moved / "ranks.parquet")
    assert len(stored.users) == 40
    for row in range(0, 40, 7):
        user = chains.sequences[chains.user_index(stored.users[row])]
        history = [f"i{item}" for item in user[:-1]]
        found = predictor.recommend(history, 30, exclude_seen=False)
        place = [item["id"] for item in found.items].index(f"i{user[-1]}")
        assert place + 1 == pytest.approx(stored.ranks[row], abs=0.5)


def test_a_run_finds_a_backbone_folder_that_moved_with_it(
    chains: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    there.mkdir()
    monkeypatch.chdir(there)
    runs.save_backbone(Path("models/tiny"))
    options = runs.config(Path("models/tiny"), epochs=1)
    runs.finished(options, chains.path, Path("runs/a"))
    expected = load("runs/a").recommend(["i1", "i2"], 3).items
    monkeypatch.chdir(tmp_path)  # where `models/tiny` is no folder
    assert load(there / "runs/a").recommend(["i1", "i2"], 3).items == expected
    shutil.copytree(there / "runs/a", tmp_path / "alone")
    assert load(tmp_path / "alone").recommend(["i1", "i2"], 3).items == expected
    there.rename(elsewhere)
    assert load(elsewhere / "runs/a").recommend(["i1", "i2"], 3).items == expected
    with pytest.raises(BackboneError, match="/there/models/tiny, which is gone; put it back"):
        load(tmp_path / "alone")
    text = (tmp_path / "alone/config.yaml").read_text()
    assert text.count("name: models/tiny") == 2  # of the recipe, and of what was loaded
    edited = text.replace("name: models/tiny", "name: elsewhere/models/tiny", 1)
    (tmp_path / "alone/config.yaml").write_text(edited)
    assert load(tmp_path / "alone").recommend(["i1", "i2"], 3).items == expected


def test_stored_vectors_are_those_of_the_model(moved: Path, predictor: Predictor) -> None:
    fresh = predictor.model.encode_items(np.arange(30, dtype=np.int32))
    torch.testing.assert_close(predictor.vectors, fresh, rtol=0, atol=1e-6)
    torch.testing.assert_close(predictor.vectors.norm(dim=-1), torch.ones(30))


def test_stale_vectors_are_not_used(moved: Path, tmp_path: Path, predictor: Predictor) -> None:
    run = tmp_path / "run"
    shutil.copytree(moved, run)
    save_tensors(run / "items.safetensors", {"vectors": torch.zeros(30, 32)}, model="of-another")
    assert torch.allclose(load(run).vectors, predictor.vectors, atol=1e-6)
    (run / "items.safetensors").unlink()
    assert torch.allclose(load(run).vectors, predictor.vectors, atol=1e-6)


def test_recommend(predictor: Predictor) -> None:
    found = predictor.recommend(["i3", "i7"], k=5)
    assert len(found.items) == 5
    scores = [item["score"] for item in found.items]
    assert scores == sorted(scores, reverse=True)
    assert not {"i3", "i7"} & {item["id"] for item in found.items}
    assert all(item["text"] == predictor.text_of(item["id"]) for item in found.items)
    assert found.gate is not None and 0 <= found.gate <= 1
    everything = predictor.recommend(["i3", "i7"], k=30)
    assert len(everything.items) == 28 and everything.items[:5] == found.items
    seen = predictor.recommend(["i3", "i7"], k=30, exclude_seen=False)
    assert len(seen.items) == 30
    users = predictor.encode_users([["i3", "i7"], ["i1"]])
    inner = users @ predictor.vectors.T
    by_id = {item["id"]: item["score"] for item in seen.items}
    assert inner[0].tolist() == pytest.approx([by_id[i] for i in predictor.ids], abs=1e-3)


def test_recommend_refuses(predictor: Predictor) -> None:
    cases: list[tuple[list[str], int, str]] = [
        ([], 5, "an empty history"),
        (["i3", "i99", "j7"], 5, r"unknown item ids: 'i99', 'j7'; did you mean 'i"),
        ([f"x{n}" for n in range(9)], 5, r"'x0', 'x1', 'x2', 'x3', 'x4' and 4 more"),
        (["i3"], 0, r"k=0: the catalog has 30 items; choose 1\.\.30"),
        (["i3"], 31, r"k=31: the catalog has 30 items; choose 1\.\.30"),
    ]
    for history, k, message in cases:
        with pytest.raises(DataError, match=message) as error:
            predictor.recommend(history, k)
        one_line(error)


def test_only_the_newest_items_count(predictor: Predictor) -> None:
    """6 items behavioural, 4 and 48 tokens semantic: what is older changes nothing."""
    recent = [f"i{n}" for n in (4, 8, 15, 16, 23, 29)]
    long = [f"i{n % 30}" for n in range(500)] + recent
    a = predictor.recommend(recent, 30, exclude_seen=False).items
    b = predictor.recommend(long, 30, exclude_seen=False).items
    assert [i["score"] for i in a] == pytest.approx([i["score"] for i in b], abs=1e-4)
    assert predictor.recommend(long, 5).items == []  # everything was seen
    c = predictor.recommend(recent[1:], 30, exclude_seen=False).items
    assert [i["score"] for i in a] != pytest.approx([i["score"] for i in c], abs=1e-4)


def test_texts_alone(predictor: Predictor) -> None:
    ids, count = list(predictor.ids), predictor.model.n_items
    vectors = predictor.encode_items(["small red wood lamp", "old blue glass clock"])
    assert vectors.shape == (2, 32)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2))
    assert (predictor.ids, predictor.model.n_items) == (ids, count)
    assert predictor.encode_items([]).shape == (0, 32)
    assert predictor.encode_users([]).shape == (0, 32)


def test_new_items_are_ranked_and_usable(predictor: Predictor) -> None:
    before = predictor.recommend(["i3", "i7"], 30, exclude_seen=False).items
    predictor.add_items({"n1": "small red wood lamp", "n2": "old blue glass clock"})
    after = predictor.recommend(["i3", "i7"], 32, exclude_seen=False).items
    assert {item["id"] for item in after} == {*predictor.ids} and len(after) == 32
    kept = [item for item in after if not item["id"].startswith("n")]
    assert [i["id"] for i in kept] == [i["id"] for i in before]
    assert predictor.text_of("n2") == "old blue glass clock"
    with_new = predictor.recommend(["i3", "n1"], 10)
    assert "n1" not in {item["id"] for item in with_new.items}
    a, b = predictor.encode_users([["i3", "n1"], ["i3", "n2"]])
    assert not torch.allclose(a, b, atol=1e-4)
    torch.testing.assert_close(
        predictor.encode_items(["small red wood lamp"])[0], predictor.vectors[30]
    )
    predictor.add_items({"n3": "new green metal boat"})
    assert len(predictor.recommend(["n3", "n1"], 33, exclude_seen=False).items) == 33


def test_new_items_are_refused_whole(predictor: Predictor) -> None:
    ids, vectors = list(predictor.ids), predictor.vectors
    for items, message in (
        ({"n1": "a lamp", "i3": "again"}, "item 'i3' is in the catalog already"),
        ({"n1": "a lamp", "n2": " \t"}, "a new item needs a text"),
    ):
        with pytest.raises(DataError, match=message) as error:
            predictor.add_items(items)
        one_line(error)
        assert predictor.ids == ids and predictor.vectors is vectors
        assert predictor.model.n_items == len(ids)
    predictor.add_items({})
    assert predictor.ids == ids


def test_the_same_text_is_the_same_item(paper_run: Finished) -> None:
    predictor = load(paper_run.run)
    predictor.add_items({"twin": predictor.text_of("i5")})
    torch.testing.assert_close(predictor.vectors[30], predictor.vectors[5], rtol=0, atol=1e-5)
    ranked = [i["id"] for i in predictor.recommend(["i3"], 31, exclude_seen=False).items]
    assert abs(ranked.index("twin") - ranked.index("i5")) == 1


# -- torn and edited folders ---------------------------------------------------------------------


def edit_identity(run: Path, change: Any) -> None:
    identity = yaml.safe_load((run / "config.yaml").read_text())
    change(identity)
    (run / "config.yaml").write_text(yaml.safe_dump(identity))


def cut(name: str) -> Any:
    return lambda run: (run / name).write_bytes((run / name).read_bytes()[:50])


def removed(name: str) -> Any:
    return lambda run: (run / name).unlink()


def other_tensor(run: Path) -> None:
    tensors, metadata = load_tensors(run / "model.safetensors")
    tensors["experts.other"] = tensors.pop("projector.gain", torch.ones(1))
    save_tensors(run / "model.safetensors", tensors, **metadata)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (removed("config.yaml"), "is not a run folder: it has no config.yaml"),
        (lambda run: (run / "config.yaml").write_text("a: [1"), r"config\.yaml: torn or edited"),
        (lambda run: (run / "config.yaml").write_text("- 1"), "not a run of this version"),
        (
            lambda run: edit_identity(run, lambda i: i["config"]["model"].update(rnak=3)),
            "unknown key.*rnak.*did you mean",
        ),
        (
            lambda run: edit_identity(run, lambda i: i["config"]["model"].update(rank=3)),
            r"has shape .*, this model and data set need",
        ),
        (lambda run: edit_identity(run, lambda i: i.pop("backbone")), "torn or edited"),
        (removed("model.safetensors"), "no such file; was this run ever checkpointed"),
        (cut("model.safetensors"), r"model\.safetensors: torn"),
        (other_tensor, "its tensors are not this model's: .*unexpected.*experts.other"),
        (removed("catalog.parquet"), r"catalog\.parquet: missing or torn"),
        (cut("catalog.parquet"), r"catalog\.parquet: missing or torn"),
        (cut("items.safetensors"), r"items\.safetensors: torn"),
        (
            lambda run: edit_identity(run, lambda i: i["backbone"].update(weight_hash="0" * 16)),
            "trained on other weights of",
        ),
    ],
)
def test_damage_is_one_clear_line(
    catalog_run: Finished, tmp_path: Path, damage: Any, message: str
) -> None:
    run = copied(catalog_run, tmp_path / "run")
    damage(run)
    with pytest.raises((CheckpointError, ConfigError), match=message) as error:
        load(run)
    assert str(run) in one_line(error)


# -- a run that has not come to its end ----------------------------------------------------------


@pytest.fixture
def stopped(catalog_run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was killed before its first step."""
    run, step = tmp_path / "stopped", "l2rec.runs.loop._train_stage"

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(step, crash)
        train_run(runs.config(catalog_run.backbone), catalog_run.data, run, progress=Quiet())
    return run


def test_an_unfinished_run_is_named_and_used(
    stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    note = f"note: {stopped} is not finished: this is its best model so far, untrained"
    before = sorted(stopped.iterdir())
    assert len(load(stopped).recommend(["i1"], 3).items) == 3
    assert evaluate_run(stopped, "test", Quiet())["users"] == 40
    embed_run(stopped, tmp_path / "vectors", Quiet())
    assert [record.getMessage() for record in caplog.records] == [note] * 3
    assert not (stopped / "ranks.parquet").exists()  # those of the finished run alone are written
    assert [path for path in sorted(stopped.iterdir()) if path.name != "cache"] == before
    caplog.clear()
    tensors, _ = load_tensors(stopped / "model.safetensors")
    save_tensors(stopped / "model.safetensors", tensors, step="12")
    load(stopped)
    assert "best model so far, of step 12" in caplog.text


def test_a_finished_run_is_not_remarked_on(
    catalog_run: Finished, caplog: pytest.LogCaptureFixture
) -> None:
    load(catalog_run.run)
    assert not caplog.records


def test_the_command_names_an_unfinished_run_on_standard_error(stopped: Path) -> None:
    command = [*PROGRAM, "recommend", str(stopped), "--history", "i1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(json.loads(done.stdout)["items"]) == 10
    assert done.stderr.startswith(f"note: {stopped} is not finished")
    assert done.stderr.count("\n") == 1


def test_an_unfinished_run_is_not_blended(stopped: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"stopped is not finished.*--resume") as error:
        blend_run(stopped, tmp_path / "blend", progress=Quiet())
    one_line(error)
    assert not (tmp_path / "blend").exists()


def test_an_unfinished_run_is_no_start(
    stopped: Path, catalog_run: Finished, tmp_path: Path
) -> None:
    config, out = runs.config(catalog_run.backbone), tmp_path / "run"
    with pytest.raises(
        CheckpointError, match=r"stopped is not finished.*stopped --resume"
    ) as error:
        train_run(config, catalog_run.data, out, progress=Quiet(), init=stopped)
    one_line(error)
    assert not out.exists()


def test_an_unfinished_blend_is_blended_again(blended_run: Finished, tmp_path: Path) -> None:
    run = copied(blended_run, tmp_path / "run")
    (run / "report.json").unlink()
    with pytest.raises(CheckpointError, match=r"not finished.*delete it and call l2rec blend"):
        folder.require_finished(run)


# -- what can be used ----------------------------------------------------------------------------


def test_a_run_on_a_read_only_disk(catalog_run: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    before = {p for p in catalog_run.run.rglob("*")}
    load(catalog_run.run).recommend(["i1"])
    assert {p for p in catalog_run.run.rglob("*")} == before


# -- scores and vectors again --------------------------------------------------------------------


@pytest.mark.parametrize("items", ["catalog", "paper"])
def test_evaluate_again(items: str, request: pytest.FixtureRequest) -> None:
    finished: Finished = request.getfixturevalue(f"{items}_run")
    report = read_json(finished.run / "report.json")
    found = evaluate_run(finished.run, "test", Quiet())
    for name, value in report["scores"]["L2Rec"].items():
        assert found[name] == pytest.approx(value, abs=1e-9), name
    assert (found["fingerprint"], found["users"]) == (report["dataset"]["fingerprint"], 40)
    valid = evaluate_run(finished.run, "valid", Quiet())
    assert valid["ndcg@10"] == pytest.approx(report["valid"]["ndcg@10"], abs=1e-9)
    json.dumps(found)
    with pytest.raises(ConfigError, match="split='train': choose valid or test"):
        evaluate_run(finished.run, "train", Quiet())


def test_a_read_only_run_is_scored(
    catalog_run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(catalog_run, tmp_path / "run")
    (run / "ranks.parquet").unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert evaluate_run(run, "test", Quiet(), catalog_run.data)["users"] == 40
    assert not (run / "ranks.parquet").exists()


def test_another_data_set_is_refused(
    catalog_run: Finished, target_data: Dataset, tmp_path: Path
) -> None:
    other = target_data.path
    for call in (
        lambda: evaluate_run(catalog_run.run, "test", Quiet(), other),
        lambda: user_history(catalog_run.run, "u1", other),
        lambda: embed_run(catalog_run.run, tmp_path / "out", Quiet(), data=other),
    ):
        with pytest.raises(CheckpointError, match=f"{target_data.fingerprint}.*--data") as error:
            call()
        one_line(error)


def test_the_data_set_is_gone(moved: Path, chains: Dataset) -> None:
    with pytest.raises(CheckpointError, match=r"no longer at .*give its folder with --data"):
        evaluate_run(moved, "test", Quiet())
    assert evaluate_run(moved, "test", Quiet(), chains.path)["users"] == 40


def test_user_history(catalog_run: Finished, chains: Dataset) -> None:
    row = chains.sequences[chains.user_index("u7")]
    assert user_history(catalog_run.run, "u7") == [f"i{item}" for item in row]
    with pytest.raises(DataError, match=r"user 'u77'.*did you mean"):
        user_history(catalog_run.run, "u77")


def test_examples_say_how_much_of_a_history_they_leave_out(
    catalog_run: Finished, chains: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnostics, "SHOWN_HISTORY", 3)
    split = leave_one_out(chains.sequences)
    for example in diagnostics.diagnose(load(catalog_run.run), split, chains)["examples"]:
        user = chains.user_index(example["user"])
        ids = [f"i{item}" for item in chains.sequences[user]]
        assert [item["id"] for item in example["history"]] == ids[:-1][-3:]
        assert example["earlier"] == max(0, len(ids) - 1 - 3)
        assert example["held_out"]["id"] == ids[-1]


def test_cold_items_are_no_part_of_a_user_history(
    catalog_run: Finished, chains: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = chains.sequences[chains.user_index("u7")]
    least = int(row.min())
    monkeypatch.setattr(Dataset, "n_warm", property(lambda self: least + 1))
    known = user_history(catalog_run.run, "u7")
    assert known and known == [f"i{item}" for item in row if item <= least]
    monkeypatch.setattr(Dataset, "n_warm", property(lambda self: least))
    with pytest.raises(DataError, match="user 'u7' has cold items alone"):
        user_history(catalog_run.run, "u7")


@pytest.mark.parametrize("items", ["catalog", "paper"])
def test_embed(items: str, request: pytest.FixtureRequest, chains: Dataset, tmp_path: Path) -> None:
    finished: Finished = request.getfixturevalue(f"{items}_run")
    written = embed_run(finished.run, tmp_path, Quiet()).files
    assert written == [(tmp_path / "items.parquet", 30, 32), (tmp_path / "users.parquet", 40, 32)]
    predictor = load(finished.run)
    tables = {name: pq.read_table(tmp_path / f"{name}.parquet") for name in ("items", "users")}
    ids, vectors = {}, {}
    for name, table in tables.items():
        assert table.column_names == ["id", "vector", "version"]
        assert set(table["version"].to_pylist()) == {predictor.version}
        ids[name] = table["id"].to_pylist()
        vectors[name] = np.array(table["vector"].to_pylist(), dtype=np.float32)
    assert ids["items"] == predictor.ids and ids["users"] == chains.user_ids.to_pylist()
    scores = vectors["users"] @ vectors["items"].T
    for user in (0, 13, 39):
        history = user_history(finished.run, ids["users"][user])
        found = predictor.recommend(history, 30, exclude_seen=False).items
        by_id = {item["id"]: item["score"] for item in found}
        expected = [by_id[i] for i in ids["items"]]
        assert scores[user].tolist() == pytest.approx(expected, abs=2e-3)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert len(embed_run(finished.run, tmp_path / "b", Quiet(), with_users=False).files) == 1


def test_vectors_are_finite(moved: Path) -> None:
    predictor = load(moved)
    assert torch.isfinite(predictor.vectors).all()
    assert math.isfinite(float(predictor.model.temperature))
