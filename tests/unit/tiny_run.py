"""Whole runs in a second or two: a tiny backbone in a folder, chains as data, quiet progress."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from tests import tiny

from l2rec.config import RunConfig, resolve
from l2rec.protocols import Progress

MODEL: dict[str, dict[str, Any]] = {
    "table": {
        "items": "table",
        "supervision": "all",
        "user_pooling": "running",
        "pooling": "blend",
        "last_item_skip": True,
        "table_dropout": 0.3,
        "view_loss": 0.5,
    },
    "encode": {"items": "encode", "negatives": 3},
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


def save_backbone(folder: Path, seed: int = 0) -> Path:
    """A random BERT with its tokenizer, as ``backbone.name`` takes it."""
    tiny.random_model("bert", seed).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def recipe_values(
    backbone: Path, items: str = "table", *, model: dict[str, Any] | None = None, **training: Any
) -> dict[str, Any]:
    return {
        "backbone": {"name": str(backbone), "dtype": "float32"},
        "model": SMALL | MODEL[items] | (model or {}),
        "training": TRAINING | training,
    }


def config(backbone: Path, items: str = "table", **changes: Any) -> RunConfig:
    return resolve(recipe_values(backbone, items, **changes), where="test")


def write_recipe(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


class Quiet(Progress):
    """Remembers the lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[tuple[int, int]] = []

    def training(self, epoch: float, step: int, total: int, text: str) -> None:
        self.steps.append((step, total))

    def validating(self, done: int, total: int) -> None:
        pass

    def line(self, text: str) -> None:
        self.lines.append(text)


def log(run: Path, event: str = "") -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, of one event or all."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if not event or r["event"] == event]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in log(run, "train")]
