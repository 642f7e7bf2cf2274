"""Where the points of a training go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from l2rec.config import load_recipe
from l2rec.errors import ConfigError
from l2rec.modules import processes
from l2rec.modules.processes import World
from l2rec.runs import trackers


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {n: [(e.step, e.value) for e in events.Scalars(n)] for n in events.Tags()["scalars"]}


def test_accelerates_trackers_get_every_point(tmp_path: Path) -> None:
    """Use TensorBoard's, which needs no server: MLflow's and the others are called alike."""
    options: dict[str, Any] = {"lr": 0.5, "model": {"dim": 8, "views": ["semantic"]}, "max": None}
    assert trackers._flat(options) == {
        "lr": 0.5,
        "model.dim": 8,
        "model.views": "['semantic']",
        "max": "None",
    }
    with trackers._elsewhere("tensorboard", tmp_path, options) as points:
        points("valid", 3, {"ndcg@10": 0.5})
        points("train", 4, {"loss": 2.0})
    found = scalars(tmp_path / trackers.PROJECT)
    assert found["valid/ndcg_at_10"] == [(3, 0.5)] and found["train/loss"] == [(4, 2.0)]


def test_a_tracker_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_recipe("sasrec", ["training.tracker=wandb"])
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["tensorboard"])
    expected = pytest.raises(ConfigError, match="pip install wandb")
    with expected, trackers.tracking(config.training.tracker, tmp_path, 0, {}):
        pass


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    with (
        processes.joined(World(rank=1, size=2)),
        trackers.tracking("tensorboard", tmp_path, 0, {}) as points,
    ):
        points("train", 1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())
