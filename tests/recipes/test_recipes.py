"""Every shipped recipe parses, says how it is run, and trains."""

from __future__ import annotations

import math
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests import tiny

from l2rec.config import find_recipe, load_recipe, method_class, recipe_names
from l2rec.data.dataset import Dataset
from l2rec.data.splits import leave_one_out
from l2rec.data.synthetic import chain_dataset
from l2rec.methods.l2rec import L2Rec

ROOT = Path(str(resources.files("l2rec") / "recipes"))
FILES = sorted(ROOT.rglob("*.y*ml"))
NAMES = [path.relative_to(ROOT).with_suffix("").as_posix() for path in FILES]


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return chain_dataset(tmp_path_factory.mktemp("data") / "chains", 20, 15, 8, seed=0)


def test_no_file_is_overlooked() -> None:
    assert FILES and sorted(recipe_names()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_header_has_the_command(name: str) -> None:
    path = find_recipe(name)
    assert path is not None
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"l2rec train {name} " in line for line in comments), comments


@pytest.mark.parametrize("name", NAMES)
def test_holds_only_differences(name: str) -> None:
    """What equals the default is not repeated, so that it cannot rot."""
    path = find_recipe(name)
    assert path is not None
    values = yaml.safe_load(path.read_text()) or {}
    config = load_recipe(name)
    defaults: dict[str, Any] = {
        "model": method_class(config.method).Config(),
        "training": type(config.training)(),
    }
    for group, default in defaults.items():
        for key, value in (values.get(group) or {}).items():
            assert value != getattr(default, key), f"{group}.{key}={value} is the default"


@pytest.mark.parametrize("name", NAMES)
def test_trains(name: str, chains: Dataset) -> None:
    config = load_recipe(name)
    backbone = tiny.random_backbone("bert")
    limits = {"max_tokens": 128, "text_tokens": 64, "item_tokens": 8, "semantic_items": 12}
    changes = {k: min(v, getattr(config.model, k)) for k, v in limits.items()}
    torch.manual_seed(0)
    model = L2Rec(config.model.model_copy(update=changes), backbone, chains.texts())
    model.train()
    training = config.training
    stages = model.stages(training.lr, training.weight_decay)
    groups = [{"params": g.parameters, "lr": g.lr} for g in stages[0].groups]
    optimizer = torch.optim.AdamW(groups)
    batches = model.batches(
        leave_one_out(chains.sequences).train,
        seed=0,
        epoch=0,
        batch_users=4,
        batch_tokens=training.batch_tokens,
    )
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    for number, batch in enumerate(batches.iterate()):
        losses = model.loss(batch)
        assert all(math.isfinite(float(part)) for part in losses.parts.values()), losses.parts
        assert losses.tokens > 0
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        if number == 1:
            break
    still = [n for n, p in model.named_parameters() if n in before and torch.equal(p, before[n])]
    assert not still, still
