"""Every option of every recipe is listed with what it means: `l2rec recipes NAME`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.command import Call
from tests.support.runs import Finished

from l2rec.config import (
    BackboneConfig,
    RunConfig,
    SplitConfig,
    TrainingConfig,
    load_recipe,
    method_class,
    recipe_names,
)
from l2rec.options import as_recipe, options_of


@pytest.mark.parametrize("name", recipe_names())
def test_every_option_of_a_recipe_is_listed(name: str, tmp_path: Path) -> None:
    config = load_recipe(name)
    method = method_class(config.method)
    groups = {"model": method.Config, "split": SplitConfig, "training": TrainingConfig}
    if method.uses_backbone:
        groups["backbone"] = BackboneConfig
    options = {option.key: option for option in options_of(config)}
    fields = {f"{group}.{field}" for group, kind in groups.items() for field in kind.model_fields}
    assert options.keys() == {"method", "seed"} | fields
    assert all(option.meaning and option.allowed for option in options.values())
    plain = RunConfig(method=config.method)
    for key, option in options.items():
        group, _, field = key.rpartition(".")
        assert option.changed == (
            getattr(getattr(config, group, config), field)
            != getattr(getattr(plain, group, plain), field)
        )
    file = tmp_path / "mine.yaml"
    file.write_text(as_recipe(name, list(options.values())))
    assert load_recipe(str(file)) == config


def test_an_option_says_what_it_may_be() -> None:
    allowed = {one.key: one.allowed for one in options_of(load_recipe("fdsa"))}
    assert allowed["model.dropout"] == "number from 0, below 1"
    assert allowed["model.features"] == "text, or list of any text"
    assert allowed["training.max_minutes"] == "number above 0, or null"
    assert allowed["training.schedule"] == "cosine | constant"
    assert allowed["training.shard"] == "true or false"
    assert allowed["split.users"] == "whole number from 1, or null"


def test_the_command_prints_a_recipe(call: Call, tmp_path: Path) -> None:
    outcome = call("recipes", "scientific/sasrec")
    assert outcome.code == 0 and outcome.err == ""
    assert (
        "# Width of item vectors and states.\n  dim: 300  # whole number from 1; default 64\n"
        in outcome.out
    )
    assert "; default 0.0001\n" in outcome.out and "training.lr" in outcome.out.split("\n\n")[0]
    mine = tmp_path / "mine.yaml"
    mine.write_text(outcome.out)
    assert load_recipe(str(mine)) == load_recipe("scientific/sasrec")
    mine.write_text("extends: sasrec\nmodel: {dim: 8}\n")
    assert "  dim: 8  # whole number from 1; default 64\n" in call("recipes", mine).out
    found = json.loads(call("recipes", mine, "--json").out)
    (dim,) = (one for one in found["options"] if one["key"] == "model.dim")
    assert dim == {
        "key": "model.dim",
        "value": 8,
        "default": 64,
        "allowed": "whole number from 1",
        "meaning": "Width of item vectors and states.",
    }
    assert json.loads(call("recipes", "--json").out) == {"recipes": recipe_names()}
    missed = call("recipes", "sasrek")
    assert missed.code == 2 and "did you mean 'sasrec'" in missed.err


def test_the_config_of_a_run_is_a_recipe_too(call: Call, catalog_run: Finished) -> None:
    out = call("recipes", catalog_run.run / "config.yaml").out
    assert f"name: {catalog_run.backbone}" in out


def test_a_method_of_a_file_is_listed_by_the_strings_in_it(call: Call) -> None:
    example = Path(__file__).parents[2] / "examples" / "own_method.py"
    outcome = call("recipes", f"{example}:Fading")
    assert outcome.code == 0
    assert "  # Width of the vectors.\n  dim: 64  # whole number from 1\n" in outcome.out
