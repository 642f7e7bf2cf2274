"""Tiny backbones, data and finished runs that several files look at and none changes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tests.unit import tiny_run

from l2rec.data.dataset import Dataset
from l2rec.data.synthetic import chain_dataset


class Finished(NamedTuple):
    run: Path
    data: Path
    backbone: Path


@pytest.fixture(scope="session")
def one_thread() -> None:
    """Two threads only get in each other's way on matrices this small."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def backbone_folder(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.save_backbone(tmp_path_factory.mktemp("backbones") / "bert")


@pytest.fixture(scope="session")
def chains(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return chain_dataset(tmp_path_factory.mktemp("data") / "chains", 40, 30, 8, seed=0)


def _finished(
    items: str, backbone: Path, chains: Dataset, factory: pytest.TempPathFactory
) -> Finished:
    from l2rec.runs.train import train_run

    run = factory.mktemp("runs") / items
    config = tiny_run.config(backbone, items)
    train_run(config, chains.path, run, progress=tiny_run.Quiet(), recipe="tiny", command="test")
    return Finished(run, chains.path, backbone)


@pytest.fixture(scope="session")
def table_run(
    backbone_folder: Path, chains: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    """A run with items=table. Copy the folder before changing anything in it."""
    return _finished("table", backbone_folder, chains, tmp_path_factory)


@pytest.fixture(scope="session")
def encode_run(
    backbone_folder: Path, chains: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    """A run with items=encode. Copy the folder before changing anything in it."""
    return _finished("encode", backbone_folder, chains, tmp_path_factory)
