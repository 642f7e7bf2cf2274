"""Run folders of earlier versions that hold more, or less, than those of today."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from tests.support import runs
from tests.support.runs import Finished, Quiet

from l2rec.data.ragged import Ragged
from l2rec.disk import read_json, write_json
from l2rec.errors import ConfigError
from l2rec.runs.checkpoint import load_tensors, save_tensors
from l2rec.runs.folder import load_run_config, load_shown_config, write_blend
from l2rec.runs.predictor import load
from l2rec.runs.train import train_run
from l2rec.studies.compare import compare_runs

HISTORIES = Ragged.from_rows([[0, 1], [3], [5, 1, 2, 7]])


def test_tensors_that_are_gone_change_no_score(blended_run: Finished, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(blended_run.run, run)
    tensors, metadata = load_tensors(run / "model.safetensors")
    assert "skip" not in tensors
    save_tensors(run / "model.safetensors", tensors | {"skip": torch.tensor(1.0)}, **metadata)
    blend = load_tensors(run / "blend.safetensors")[0] | {"spread": torch.tensor(0.0)}
    write_blend(run, blend, yaml.safe_load((run / "config.yaml").read_text()))
    found, wanted = load(run), load(blended_run.run)
    assert torch.equal(found.scorer()(HISTORIES), wanted.scorer()(HISTORIES))


def test_a_run_with_a_tensor_that_is_gone_can_be_a_start(
    catalog_run: Finished, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(catalog_run.run, run)
    tensors, metadata = load_tensors(run / "model.safetensors")
    save_tensors(run / "model.safetensors", tensors | {"skip": torch.tensor(1.0)}, **metadata)
    config = runs.config(catalog_run.backbone, max_steps=1)
    starts = []
    for start in (catalog_run.run, run):
        out = tmp_path / f"from-{start.name}"
        train_run(config, catalog_run.data, out, progress=Quiet(), init=start)
        starts.append(load_tensors(out / "state" / "start.safetensors")[0])
    a, b = starts
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_that_cannot_be_loaded_is_compared(catalog_run: Finished, tmp_path: Path) -> None:
    """Results outlive the options that they were found with."""
    run = tmp_path / "run"
    shutil.copytree(catalog_run.run, run)
    identity = yaml.safe_load((run / "config.yaml").read_text())
    identity["config"]["model"] |= {"form": "table", "view_loss": 0.5}
    (run / "config.yaml").write_text(yaml.safe_dump(identity))
    with pytest.raises(ConfigError, match="form=table is no option any more"):
        load_run_config(run)
    shown, _ = load_shown_config(run)
    assert shown.model_dump(mode="json")["model"] == identity["config"]["model"]
    assert shown.training == load_run_config(catalog_run.run)[0].training
    found = compare_runs([catalog_run.run, run])
    assert [entry.runs for entry in found.entries] == [[str(catalog_run.run)], [str(run)]]
    identity["config"]["training"]["epochs"] = 0
    (run / "config.yaml").write_text(yaml.safe_dump(identity))
    with pytest.raises(ConfigError, match=r"training\.epochs=0"):
        compare_runs([catalog_run.run, run])


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
