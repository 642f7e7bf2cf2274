"""Runs of an L2Rec with options that are gone: counts and repeats are read as a blend beside it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.support import runs
from tests.support.runs import Finished, Quiet
from torch import Tensor

from l2rec.data.ragged import Ragged
from l2rec.disk import read_json, write_json
from l2rec.errors import CheckpointError
from l2rec.modules.cooccurrence import CoOccurrence
from l2rec.runs.checkpoint import load_tensors, save_tensors
from l2rec.runs.folder import load_run_config, read_run, write_blend
from l2rec.runs.predictor import load
from l2rec.runs.train import train_run
from l2rec.studies.blend import blend_run
from l2rec.studies.compare import compare_runs

HISTORIES = [[0, 1], [3], [5, 1, 2, 7]]
COUNTED = Ragged.from_rows([[0, 1, 2], [1, 3], [2, 1, 7]])
BOTH = {"repeat_bias": True, "cooccurrence": True}


def as_earlier(run: Path, to: Path, near: float, repeat: float, **options: int) -> Path:
    """Write a run as an earlier version did that was trained with these options."""
    shutil.copytree(run, to)
    identity = yaml.safe_load((to / "config.yaml").read_text())
    none = {"repeat_bias": False, "cooccurrence": False, "text_neighbors": False}
    identity["config"]["model"] |= none | options
    (to / "config.yaml").write_text(yaml.safe_dump(identity))
    tensors, metadata = load_tensors(to / "model.safetensors")
    if options.get("repeat_bias"):
        tensors["repeat"] = torch.tensor(repeat)
    if options.get("cooccurrence"):
        together = counts(len(read_run(run).catalog))
        tensors |= {f"together.{name}": t for name, t in together.state_dict().items()}
        tensors["near"] = torch.tensor(near)
    save_tensors(to / "model.safetensors", tensors, **metadata)
    (to / "items.safetensors").unlink()
    return to


def counts(n_items: int) -> CoOccurrence:
    together = CoOccurrence(n_items)
    together.count(COUNTED)
    return together


def added(options: dict[str, Any], near: float, repeat: float, n_items: int) -> Tensor:
    """w m outside of the history, rho within it, and 0 for what an option does not add."""
    met = counts(n_items).recall(Ragged.from_rows(HISTORIES)).toarray()
    term = torch.from_numpy(met).float() * (near if options.get("cooccurrence") else 0.0)
    for row, history in enumerate(HISTORIES):
        term[row, history] = repeat if options.get("repeat_bias") else 0.0
    return term


@pytest.mark.parametrize(
    "options",
    [BOTH, BOTH | {"text_neighbors": True}, {"repeat_bias": True}, {"cooccurrence": True}],
    ids=lambda options: ",".join(options),
)
def test_scores_are_what_they_were(
    catalog_run: Finished, tmp_path: Path, options: dict[str, Any]
) -> None:
    plain = load(catalog_run.run)
    found = load(as_earlier(catalog_run.run, tmp_path / "run", 3.0, -5.0, **options))
    rows, term = Ragged.from_rows(HISTORIES), added(options, 3.0, -5.0, plain.n_items)
    tau = float(plain.model.temperature.detach())
    cosines = plain.scores(plain.encode(rows))
    torch.testing.assert_close(found.scores(found.encode(rows)), cosines + tau * term)
    torch.testing.assert_close(found.scorer()(rows), cosines / tau + term, atol=1e-4, rtol=1e-5)


def test_options_that_were_off_leave_nothing(catalog_run: Finished, tmp_path: Path) -> None:
    run = as_earlier(catalog_run.run, tmp_path / "run", 0.0, 0.0)
    assert (
        load(run).blend is None and load_run_config(run)[0] == load_run_config(catalog_run.run)[0]
    )
    assert load(run).version == load(catalog_run.run).version


def test_a_finished_run_is_not_trained_on_nor_blended(
    catalog_run: Finished, tmp_path: Path
) -> None:
    run = as_earlier(catalog_run.run, tmp_path / "run", 3.0, -5.0, **BOTH)
    config = load_run_config(run)[0]
    message = "was begun by an earlier version, with repeat_bias=true, cooccurrence=true"
    with pytest.raises(CheckpointError, match=message):
        train_run(config, catalog_run.data, run, progress=Quiet(), resume=True)
    with pytest.raises(CheckpointError, match="with co-occurrence or repeats of its own; train"):
        blend_run(run, tmp_path / "out", progress=Quiet(), data=catalog_run.data)


def test_its_weights_can_be_a_start(catalog_run: Finished, tmp_path: Path) -> None:
    run = as_earlier(catalog_run.run, tmp_path / "run", 3.0, -5.0, **BOTH)
    config = runs.config(catalog_run.backbone, max_steps=1)
    for start in (catalog_run.run, run):
        out = tmp_path / f"from-{start.name}"
        train_run(config, catalog_run.data, out, progress=Quiet(), init=start)
    started = (
        load_tensors(tmp_path / f"from-{s}/state/start.safetensors")[0] for s in ("table", "run")
    )
    a, b = started
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_is_another_recipe_than_that_without_the_options(
    catalog_run: Finished, tmp_path: Path
) -> None:
    run = as_earlier(catalog_run.run, tmp_path / "run", 3.0, -5.0, **BOTH)
    assert len(compare_runs([catalog_run.run, run]).entries) == 2


def test_a_blend_beside_the_options_is_refused(catalog_run: Finished, tmp_path: Path) -> None:
    run = as_earlier(catalog_run.run, tmp_path / "run", 3.0, -5.0, **BOTH)
    identity = yaml.safe_load((run / "config.yaml").read_text())
    write_blend(run, {"near": torch.tensor(1.0)}, identity)
    with pytest.raises(CheckpointError, match="was blended by an earlier version, beside"):
        load(run)


def test_a_view_that_was_trained_first_changes_no_score(
    catalog_run: Finished, tmp_path: Path
) -> None:
    run = as_earlier(catalog_run.run, tmp_path / "run", 0.0, 0.0, behavioral_epochs=4)
    rows = Ragged.from_rows(HISTORIES)
    assert load(run).blend is None
    assert torch.equal(load(run).scorer()(rows), load(catalog_run.run).scorer()(rows))
    assert len(compare_runs([catalog_run.run, run]).entries) == 2
    with pytest.raises(CheckpointError, match=r"with behavioral_epochs=4: .* another --out$"):
        train_run(load_run_config(run)[0], catalog_run.data, run, progress=Quiet(), resume=True)


def test_a_blend_without_a_spread_is_read(blended_run: Finished, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(blended_run.run, run)
    tensors = load_tensors(run / "blend.safetensors")[0]
    del tensors["spread"]
    write_blend(run, tensors, yaml.safe_load((run / "config.yaml").read_text()))
    rows = Ragged.from_rows(HISTORIES)
    assert torch.equal(load(run).scorer()(rows), load(blended_run.run).scorer()(rows))


def test_a_training_goes_on_by_the_rule_that_it_began_with(
    catalog_run: Finished, tmp_path: Path
) -> None:
    """Before, the score that is not masked chose the best step, and states did not name it."""
    run = tmp_path / "run"
    config = runs.config(catalog_run.backbone, epochs=1)
    train_run(config, catalog_run.data, run, progress=Quiet())
    assert read_json(run / "report.json")["selected_by"] == "ndcg@10_masked"
    (run / "report.json").unlink()
    (newest,) = sorted((run / "state").glob("step-*"))[-1:]
    counters = read_json(newest / "counters.json")
    assert counters.pop("select") == "ndcg@10_masked"
    counters["best"] = counters["best_metrics"]["ndcg@10"]
    write_json(newest / "counters.json", counters)
    more = runs.config(catalog_run.backbone, epochs=2)
    report = train_run(more, catalog_run.data, run, progress=Quiet(), resume=True)
    assert report["selected_by"] == "ndcg@10"
    valid = [record["ndcg@10"] for record in runs.log(run, "valid")]
    assert report["valid"]["ndcg@10"] == max(valid)
