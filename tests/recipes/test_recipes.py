"""Every shipped recipe parses, says how it is run, and trains."""

from __future__ import annotations

import itertools
import json
import math
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.support import tiny

from l2rec.config import TrainingConfig, find_recipe, load_recipe, method_class, recipe_names
from l2rec.data.catalog import Catalog
from l2rec.data.dataset import Dataset
from l2rec.data.splits import leave_one_out
from l2rec.data.synthetic import chain_dataset
from l2rec.errors import ConfigError
from l2rec.modules.backbone import Backbone
from l2rec.protocols import updates

ROOT = Path(str(resources.files("l2rec") / "recipes"))
FILES = sorted(ROOT.rglob("*.y*ml"))
LOSSES = Path(__file__).parent / "losses.json"
NAMES = [path.relative_to(ROOT).with_suffix("").as_posix() for path in FILES]


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return chain_dataset(tmp_path_factory.mktemp("data") / "chains", 20, 15, 8, seed=0)


def test_no_file_is_overlooked() -> None:
    assert FILES and sorted(recipe_names()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_header_has_the_command(name: str) -> None:
    path = find_recipe(name)
    assert path == ROOT / f"{name}.yaml"
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"l2rec train {name} " in line for line in comments), comments


def test_a_recipe_extends_another() -> None:
    base, one = load_recipe("scientific/hdrec"), load_recipe("hdrec/single-lora", ["seed=3"])
    own = {"adapters": 1, "rank": 16}
    assert one.model == base.model.model_copy(update=own) != base.model
    assert one.training == base.training and one.backbone == base.backbone and one.seed == 3


def test_what_cannot_be_extended(tmp_path: Path) -> None:
    loop, unknown, odd = (tmp_path / f"{name}.yaml" for name in ("loop", "unknown", "odd"))
    loop.write_text(f"extends: {loop}\n")
    unknown.write_text("extends: sasrek\n")
    odd.write_text("extends: [sasrec]\n")
    for path, message in ((loop, "no other recipe"), (unknown, "sasrec"), (odd, "no other")):
        with pytest.raises(ConfigError, match=message):
            load_recipe(str(path))


@pytest.mark.parametrize("name", NAMES)
def test_holds_only_differences(name: str) -> None:
    """Repeat no default, nor anything of the recipe that is extended, so that it cannot rot."""
    path = find_recipe(name)
    assert path == ROOT / f"{name}.yaml"
    assert repeated(path) == []


def repeated(path: Path) -> list[str]:
    """Name the keys of a recipe that change nothing."""
    values, config = yaml.safe_load(path.read_text()), load_recipe(str(path))
    if "extends" in values:
        base = load_recipe(values["extends"])
    else:
        base = config.model_copy(
            update={"model": method_class(config.method).Config(), "training": TrainingConfig()}
        )
    return [
        f"{group}.{key}={value}"
        for group in ("model", "training")
        for key, value in (values.get(group) or {}).items()
        if getattr(getattr(config, group), key) == getattr(getattr(base, group), key)
    ]


@pytest.mark.parametrize(
    ("head", "options", "expected"),
    [
        ("method: l2rec.methods.sasrec:SASRec", {"dim": 64, "heads": 4}, ["model.dim=64"]),
        ("extends: scientific/hdrec", {"adapters": 2, "rank": 16}, ["model.adapters=2"]),
    ],
)
def test_what_changes_nothing_is_noticed(
    head: str, options: dict[str, Any], expected: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{head}\nmodel: {json.dumps(options)}\n")
    assert repeated(path) == expected


def reads_minilm(name: str) -> bool:
    config = load_recipe(name)
    return config.backbone.name == "minilm" and method_class(config.method).uses_backbone


@pytest.mark.parametrize("name", list(filter(reads_minilm, NAMES)))
def test_fits_its_backbone(name: str, chains: Dataset, minilm: Backbone) -> None:
    """Prompts and texts as long as the recipe has them, which the tiny backbone cannot tell."""
    config = load_recipe(name)
    model = method_class(config.method)(config.model, Catalog(chains.catalog), minilm)
    assert model.n_items == chains.n_items


@pytest.mark.parametrize("name", NAMES)
def test_trains_as_it_always_did(name: str, chains: Dataset) -> None:
    """Three batches of every stage have the known losses and move every tensor that is trained."""
    found = three_steps(name, chains)
    known = json.loads(LOSSES.read_text())[name]
    assert found.keys() == known.keys()
    for stage, losses in found.items():
        assert losses == pytest.approx(known[stage], rel=2e-4), stage


def three_steps(name: str, chains: Dataset) -> dict[str, list[float]]:
    """The loss of each update of three batches of every stage, by the stage's name."""
    config = load_recipe(name)
    method = method_class(config.method)
    limits = {"max_tokens": 240, "text_tokens": 64, "item_tokens": 8, "semantic_items": 12}
    limits["curriculum"] = 0  # whose first batches leave some tensors where they are
    options = config.model.model_dump()
    changes = {k: min(v, options[k]) for k, v in limits.items() if k in options}
    torch.manual_seed(0)
    family = "tied" if options.get("head") == "titles" else "bert"
    backbone = tiny.random_backbone(family) if method.uses_backbone else None
    model = method(config.model.model_copy(update=changes), Catalog(chains.catalog), backbone)
    model.train()
    training = config.training
    found: dict[str, list[float]] = {}
    for stage in model.stages(training.lr, training.weight_decay):
        optimizer = torch.optim.AdamW([{"params": g.parameters, "lr": g.lr} for g in stage.groups])
        trained = {p for g in stage.groups for p in g.parameters}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in trained)
        batches = stage.batches(
            leave_one_out(chains.sequences).train,
            seed=0,
            epoch=0,
            batch_users=4,
            batch_tokens=training.batch_tokens,
        )
        if stage.begin_epoch is not None:
            stage.begin_epoch(0)
        before = {n: p.clone() for n, p in model.named_parameters() if p in trained}
        found[stage.name] = []
        for batch in itertools.islice(batches.iterate(), 3):
            for losses in updates(stage.loss(batch)):
                assert all(math.isfinite(float(x)) for x in losses.parts.values()), losses.parts
                assert losses.tokens > 0
                optimizer.zero_grad()
                losses.total.backward()
                optimizer.step()
                found[stage.name].append(float(losses.total.detach()))
        parameters = dict(model.named_parameters())
        still = [n for n in before if torch.equal(parameters[n], before[n])]
        assert not still, (stage.name, still)
    return found


if __name__ == "__main__":  # writes what is known anew: python -m tests.recipes.test_recipes
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        data = chain_dataset(Path(folder) / "chains", 20, 15, 8, seed=0)
        LOSSES.write_text(json.dumps({n: three_steps(n, data) for n in NAMES}, indent=1) + "\n")
