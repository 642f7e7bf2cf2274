"""What a training would take: parameters and memory by shapes, against the real thing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import tiny
from tests.support.command import Call
from tests.support.runs import Finished, Quiet, config
from torch import nn

from l2rec.config import BackboneConfig, RunConfig, load_recipe, recipe_names
from l2rec.data.catalog import Catalog
from l2rec.data.dataset import Dataset
from l2rec.errors import BackboneError, ConfigError
from l2rec.methods.l2rec import L2Rec
from l2rec.studies.doctor.backbones import BUILT_IN, shape_backbone, weights_at_hand
from l2rec.studies.doctor.shapes import ShapesOnly
from l2rec.studies.doctor.study import _course, doctor, parts_of


def shapes_of(recipe: RunConfig, data: Dataset, *backbones: str, **options: Any) -> Any:
    report = doctor(
        recipe, data.path, backbones=backbones, measure=False, progress=Quiet(), **options
    )
    return [patient["shapes"] for patient in report["backbones"]]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "qwen3", "llama"])
@pytest.mark.parametrize("form", ["paper", "catalog"])
def test_parameters_are_those_of_the_real_model(
    family: str, form: str, chains: Dataset, tmp_path: Path
) -> None:
    options = {"form": form, "item_residual": form == "catalog"}
    real = L2Rec(
        tiny.small(**options), Catalog(chains.catalog), tiny.random_backbone(family), cache=None
    )
    tiny.CONFIGS[family]().save_pretrained(tmp_path)  # a config.json and nothing else
    recipe = RunConfig(backbone=BackboneConfig(name=str(tmp_path)), model=tiny.small(**options))
    (shapes,) = shapes_of(recipe, chains)
    assert shapes["trained_parameters"] == sum(
        p.numel() for p in real.parameters() if p.requires_grad
    )
    assert shapes["parts"] == parts_of(real)
    assert {"experts", "routers", "projections", "gate"} <= shapes["parts"].keys()
    assert ("table" in shapes["parts"]) == (form == "catalog")
    frozen = sum(p.numel() for p in real.backbone.parameters())
    assert shapes["frozen_parameters"] == frozen
    assert shapes["tokens_are"] == "estimated"
    half, eight, four = shapes["memory"]
    assert half["weights"] == "bfloat16" and half["frozen"] == 2 * frozen
    linear = [m.weight for m in real.backbone.modules() if isinstance(m, nn.Linear)]
    others = 2 * (frozen - sum(w.numel() for w in linear))
    made = 2 * max(w.numel() for w in linear)  # one matrix at a time, in bfloat16
    assert [row["weights"] for row in (eight, four)] == ["8-bit", "4-bit"]
    assert eight["frozen"] == others + made + sum(w.numel() + 4 * len(w) for w in linear)
    blocks = sum(-(-w.numel() // 64) for w in linear)
    assert four["frozen"] == others + made + 36 * blocks
    trained = half["trained_with_moments"]
    assert trained == 16 * shapes["trained_parameters"]
    parts = ("frozen", "trained_with_moments", "buffers", "item_vectors", "activations")
    assert half["total"] == sum(half[part] for part in parts)
    assert half["fits"] and half["unlimited"]


def test_the_default_recipe_trains_32_million_on_qwen3(chains: Dataset) -> None:
    recipe = load_recipe("l2rec")
    backbone, _ = shape_backbone(recipe.backbone)
    with torch.device("meta"), ShapesOnly():
        model = L2Rec(recipe.model, Catalog(chains.catalog), backbone, cache=None)
    assert sum(parts_of(model).values()) == 32_135_041
    assert sum(p.numel() for p in backbone.parameters()) == 596_049_920


@pytest.mark.slow
def test_a_larger_batch_takes_more_and_a_smaller_card_takes_less(
    chains: Dataset, tmp_path: Path
) -> None:
    tiny.qwen3_config().save_pretrained(tmp_path)
    recipe = RunConfig(backbone=BackboneConfig(name=str(tmp_path)), model=tiny.small())
    (shapes,) = shapes_of(recipe, chains)
    whole = shapes["memory"][0]
    small = recipe.model_copy(
        update={"training": recipe.training.model_copy(update={"batch_tokens": 256})}
    )
    (less,) = shapes_of(small, chains)
    assert less["memory"][0]["activations"] < whole["activations"]
    assert less["stages"]["train"]["steps"] > shapes["stages"]["train"]["steps"]
    between = (less["memory"][0]["total"] + whole["total"]) / 2 / 1e9 / 0.92
    (tight,) = shapes_of(recipe, chains, gpu_memory=between)
    row = tight["memory"][0]
    assert not row["fits"] and not row["unlimited"] and 256 <= row["largest_batch_tokens"] < 8192
    (none,) = shapes_of(recipe, chains, gpu_memory=1e-6)
    assert none["memory"][0]["largest_batch_tokens"] is None and not none["memory"][0]["unlimited"]


def test_memory_is_what_lives_at_once() -> None:
    weight = torch.ones(100, 100, device="meta", requires_grad=True)
    with ShapesOnly() as seen:
        x = torch.zeros(50, 100)  # 20 kB
        assert x.is_meta and seen.now == 20_000
        hidden = x @ weight
        y = hidden.relu()
        assert seen.now == 60_000
        assert seen.operations == 2 * 50 * 100 * 100
        del hidden  # relu keeps its own output alone
        assert seen.now == 40_000
        y.sum().backward()
    assert weight.grad is not None and weight.grad.is_meta
    assert seen.peak >= 60_000 + 40_000


def test_integers_are_real_among_shapes() -> None:
    with ShapesOnly():
        counts = torch.from_numpy(np.array([2, 3])).to("meta")
        rows = torch.repeat_interleave(torch.arange(2, device=counts.device), counts)
        picked = torch.zeros(5, 7)[rows == 1]
        assert rows.tolist() == [0, 0, 1, 1, 1] and picked.shape == (3, 7)
        assert float(picked.sum()) == 1.0, "a number that is not there"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [name for name in recipe_names() if "/" not in name])
def test_every_recipe_has_shapes(recipe: str, chains: Dataset) -> None:
    chosen = load_recipe(recipe)
    if "max_items" in type(chosen.model).model_fields and chosen.backbone.name != "minilm":
        chosen = load_recipe(recipe, ["model.max_items=2", "training.batch_users=2"])
    (shapes,) = shapes_of(chosen, chains)
    assert shapes["trained_parameters"] == sum(shapes["parts"].values()) > 0
    assert shapes["disk"]["run"] > 4 * shapes["trained_parameters"]


def test_backbones_by_the_names_of_the_hub() -> None:
    for name, frozen in {
        "Qwen/Qwen3-8B": 7_568_405_504,
        "meta-llama/Llama-2-7b-hf": 6_607_343_616,
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": 7_504_924_672,
        "baichuan-inc/Baichuan2-7B-Base": 6_991_122_432,
    }.items():
        backbone, own = shape_backbone(BackboneConfig(name=name))
        assert sum(p.numel() for p in backbone.parameters()) == frozen and not own
        assert backbone.causal and backbone.dtype == torch.bfloat16
        assert not weights_at_hand(BackboneConfig(name=name))
    with pytest.raises(BackboneError, match=rf"'no/such'.*{', '.join(BUILT_IN)}"):
        shape_backbone(BackboneConfig(name="no/such"))


def test_what_it_refuses(chains: Dataset) -> None:
    with pytest.raises(ConfigError, match="--gpu-memory 0: give GB"):
        shapes_of(load_recipe("sasrec"), chains, gpu_memory=0)
    with pytest.raises(ConfigError, match=r"--backbone minilm: .* reads no backbone"):
        shapes_of(load_recipe("sasrec"), chains, "minilm")


def test_a_training_takes_no_longer_than_its_limits() -> None:
    stage = {"epochs": 10, "steps_an_epoch": 4, "seconds_epoch": 60.0, "validated": True}
    stage["eval_every"] = 1.0
    found = {"seconds_reading": 5.0, "seconds_validation": 6.0, "stages": {"train": stage}}

    def at_most(*options: str) -> float:
        config = load_recipe("l2rec.methods.sasrec:SASRec", list(options))
        seconds: float = _course(config, found)["seconds_at_most"]
        return seconds

    assert at_most() == 5 + 600 + 11 * 6
    assert at_most("training.max_steps=20") == 5 + 300 + 6 * 6
    assert at_most("training.max_minutes=2") == 5 + 120 + 3 * 6
    assert at_most("training.max_minutes=60") == at_most()


@pytest.mark.slow
def test_the_command_measures_what_can_be_loaded(
    call: Call, catalog_run: Finished, tmp_path: Path
) -> None:
    recipe, chosen = tmp_path / "r.yaml", config(catalog_run.backbone, "catalog")
    recipe.write_text(json.dumps(chosen.model_dump(mode="json")), encoding="utf-8")
    arguments = ["doctor", recipe, "--data", catalog_run.data]
    outcome = call(*arguments, "--json")
    assert outcome.code == 0, outcome.err
    (patient,) = json.loads(outcome.out)["backbones"]
    measured = patient["measured"]
    assert measured["stages"]["train"]["seconds_epoch"] > 0 < measured["seconds_validation"]
    assert measured["peak_memory_mb"] > 100
    stage, one = measured["stages"]["train"], measured["seconds_validation"]
    validations = 1 + stage["epochs"] / chosen.training.eval_every  # the untrained model
    expected = measured["seconds_reading"] + stage["epochs"] * stage["seconds_epoch"]
    assert measured["seconds_at_most"] == pytest.approx(expected + validations * one)
    shown = call(*arguments, "--no-measure")
    assert shown.code == 0 and "nothing was measured" in shown.out and "experts" in shown.out
