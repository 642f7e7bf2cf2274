"""Whole runs in a second or two: a tiny backbone in a folder, chains as data, quiet progress."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from tests.support import tiny

from l2rec.config import RunConfig, resolve
from l2rec.protocols import Progress
from l2rec.runs.checkpoint import load_tensors
from l2rec.runs.train import train_run

MODEL: dict[str, dict[str, Any]] = {
    "paper": {"form": "paper", "negatives": 3},
    "catalog": {"form": "catalog", "item_residual": True, "user_norm": True},
}
SMALL: dict[str, Any] = {
    "max_items": 6,
    "semantic_items": 4,
    "max_tokens": 48,
    "item_tokens": 6,
    "text_tokens": 12,
    "view_experts": 3,
    "rank": 2,
    "router_width": 4,
}
TRAINING: dict[str, Any] = {
    "epochs": 2,
    "lr": 5e-3,
    "batch_users": 8,
    "log_every": 3,
    "checkpoint_minutes": 0,
}


class Finished(NamedTuple):
    """A finished run, its data set and its backbone: three folders."""

    run: Path
    data: Path
    backbone: Path


def save_backbone(folder: Path, seed: int = 0) -> Path:
    """Save a random BERT with its tokenizer, as ``backbone.name`` takes it."""
    tiny.random_model("bert", seed).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def recipe_values(
    backbone: Path, items: str = "catalog", *, model: dict[str, Any] | None = None, **training: Any
) -> dict[str, Any]:
    """Return a recipe for L2Rec of a form, and with these changes."""
    return {
        "backbone": {"name": str(backbone), "dtype": "float32"},
        "model": SMALL | MODEL[items] | (model or {}),
        "training": TRAINING | training,
    }


def config(backbone: Path, items: str = "catalog", **changes: Any) -> RunConfig:
    """Return the configuration of `recipe_values`."""
    return resolve(recipe_values(backbone, items, **changes), where="test")


def write_recipe(path: Path, values: dict[str, Any]) -> Path:
    """Write a recipe as YAML; its path."""
    path.write_text(yaml.safe_dump(values))
    return path


class Quiet(Progress):
    """Progress that nobody watches: remembers the lines and the steps."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[tuple[int, int]] = []

    def training(self, epoch: float, step: int, total: int, text: str) -> None:
        self.steps.append((step, total))

    def validating(self, done: int, total: int) -> None:
        pass

    def line(self, text: str) -> None:
        self.lines.append(text)


def finished(config: RunConfig, data: Path, run: Path) -> Finished:
    """Train a run to its end."""
    train_run(config, data, run, progress=Quiet(), recipe="tiny", command="test")
    return Finished(run, data, Path(config.backbone.name))


def log(run: Path, event: str = "") -> list[dict[str, Any]]:
    """Read the lines of metrics.jsonl, of one event or all."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if not event or r["event"] == event]


def losses(run: Path) -> list[tuple[int, float]]:
    """Read the steps that were logged and their losses."""
    return [(r["step"], r["loss"]) for r in log(run, "train")]


def assert_same_weights(a: Path, b: Path) -> None:
    """Compare the models of two runs to the bit, with their metadata."""
    ours, theirs = (load_tensors(run / "model.safetensors") for run in (a, b))
    assert ours[1] == theirs[1] and ours[0].keys() == theirs[0].keys()
    for name, tensor in ours[0].items():
        assert torch.equal(tensor, theirs[0][name]), name


def assert_no_step_twice(run: Path) -> None:
    """Look for steps that were logged again."""
    steps = [(r["event"], r["step"]) for r in log(run)]
    assert len(steps) == len(set(steps))


def assert_same_training(a: Path, b: Path) -> None:
    """Compare the models and losses of two runs to the bit; `b` may have been resumed."""
    assert_same_weights(a, b)
    assert losses(a) == losses(b)
    assert_no_step_twice(b)
