"""Several processes that train one run: the same gradients, losses and ranks as one, any number
may go on with it, and nothing is written twice.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tests.support import methods, processes, runs, tiny

from l2rec.data.batches import Batch
from l2rec.data.dataset import Dataset
from l2rec.data.ragged import Ragged
from l2rec.errors import BackboneError, ConfigError
from l2rec.modules import sharding
from l2rec.modules.layers import layers_of
from l2rec.modules.processes import World
from l2rec.runs import launch
from l2rec.runs.checkpoint import load_tensors
from l2rec.runs.launch import rows_of
from l2rec.runs.train import train_run

pytestmark = pytest.mark.usefixtures("one_thread")

IN_BATCH = ("L2Rec", "L2Rec paper", "LEARN", "UniSRec: pretrain", "FamouSRec")
"""What compares with the rows of the others."""
DRAWS = ("BERT4Rec: train", "ESASRec: train", "S3Rec: pretrain", "LETTER: codes")
"""Losses that draw what they hide or compare with: each process draws for its own rows."""


def gradients(tmp_path: Path, names: list[str]) -> dict[str, Any]:
    processes.together(2, "-m", "tests.support.processes", tmp_path, *names)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    return dict(first)


def test_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    names = [name.partition(":")[0] for name in IN_BATCH]
    found = gradients(tmp_path, names)
    assert len(found) == len(names) + 2  # UniSRec has two stages
    assert "one row, L2Rec: train" in found  # too few to deal out
    for stage, differences in found.items():
        assert differences["loss"] < 1e-5 and differences["gathered"] < 1e-4, stage
        if stage.startswith(IN_BATCH):  # or the gathering would be for nothing
            assert differences["apart"] > 1e-2, stage


@pytest.mark.slow
def test_gradients_of_every_method(tmp_path: Path) -> None:
    found = gradients(tmp_path, sorted(methods.METHODS))
    assert {stage.partition(":")[0] for stage in found} == set(methods.METHODS)
    for stage, differences in found.items():
        if stage not in DRAWS:
            assert differences["loss"] < 1e-5 and differences["gathered"] < 1e-4, stage


def test_rows_are_dealt_out_once() -> None:
    lengths = [3, 1, 4, 1, 5]
    histories = Ragged.from_rows([np.full(n, row) for row, n in enumerate(lengths)])
    users = np.arange(5)
    negatives = np.arange(10, dtype=np.int32).reshape(5, 2)
    whole = Batch(users, histories, histories.values + 10, negatives)
    parts = [whole.take(rows_of(histories.lengths, rank, 2)) for rank in range(2)]
    assert [part.users.tolist() for part in parts] == [[1, 3, 4], [0, 2]]
    for part in parts:
        assert part.targets.tolist() == (part.histories.values + 10).tolist()
        assert part.histories.lengths.tolist() == [lengths[user] for user in part.users]
        assert part.negatives.tolist() == negatives[part.users].tolist()
    assert sum(part.terms for part in parts) == whole.terms == sum(lengths)
    newest = Batch(users, histories, whole.targets, negatives, 2)
    assert newest.terms == 8 and newest.take(np.array([2, 4])).terms == 4
    last = Batch(users, histories, users + 20, negatives).take(np.array([4, 1]))
    assert last.targets.tolist() == [24, 21] and last.terms == 2


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_all_read_about_as_many_tokens(size: int) -> None:
    lengths = np.random.default_rng(size).integers(1, 50, 64)
    dealt = [rows_of(lengths, rank, size) for rank in range(size)]
    assert sorted(np.concatenate(dealt).tolist()) == list(range(64))
    assert all((np.diff(rows) > 0).all() for rows in dealt)
    rows = [len(some) for some in dealt]
    tokens = [int(lengths[some].sum()) for some in dealt]
    assert max(rows) - min(rows) <= 2
    assert max(tokens) - min(tokens) <= lengths.max()


def train(recipe: Path, data: Path, out: Path) -> tuple[object, ...]:
    return ("-m", "l2rec", "train", recipe, "--data", data, "--out", out, "--resume")


@pytest.fixture(scope="module")
def recipe(backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the paper's form, which has no dropout of its own."""
    values = runs.recipe_values(backbone_folder, "paper", log_every=1, epochs=2)
    return runs.write_recipe(tmp_path_factory.mktemp("recipe") / "paper.yaml", values)


@pytest.fixture(scope="module")
def alone(backbone_folder: Path, chains: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the same with one process."""
    config = runs.config(backbone_folder, "paper", log_every=1, epochs=2)
    return runs.finished(config, chains.path, tmp_path_factory.mktemp("runs") / "alone").run


def assert_same_run(run: Path, alone: Path) -> None:
    """Compare loss curves, validations and ranks on test."""
    ours, theirs = runs.losses(run), runs.losses(alone)
    assert [step for step, _ in ours] == [step for step, _ in theirs]
    assert [x for _, x in ours] == pytest.approx([x for _, x in theirs], rel=1e-4)
    for mine, other in zip(runs.log(run, "valid"), runs.log(alone, "valid"), strict=True):
        assert mine == pytest.approx(other)
    runs.assert_no_step_twice(run)
    ranks, expected = (pl.read_parquet(folder / "ranks.parquet") for folder in (run, alone))
    assert ranks.equals(expected)


def test_two_processes_train_what_one_does(
    recipe: Path, alone: Path, chains: Dataset, tmp_path: Path
) -> None:
    run = tmp_path / "two"
    printed = processes.together(2, *train(recipe, chains.path, run))
    for line in ("test scores", "validation at step", "next: l2rec recommend"):
        assert line in printed[0] and line not in printed[1]
    assert "Traceback" not in printed[1]
    assert_same_run(run, alone)
    report, expected = (json.loads((r / "report.json").read_text()) for r in (run, alone))
    assert (report["processes"], expected["processes"]) == (2, 1)
    assert report["tokens_seen"] >= 0.9 * expected["tokens_seen"]  # an item is encoded once
    assert report["scores"]["L2Rec"] == pytest.approx(expected["scores"]["L2Rec"])


def test_one_process_goes_on_where_one_of_two_was_killed(
    recipe: Path, chains: Dataset, backbone_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "killed"
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    long = {"epochs": 2000, "patience": 2000, "schedule": "constant", "warmup": 0.0}
    options = [f"training.{name}={value}" for name, value in long.items()]
    started = subprocess.Popen(
        [*launcher, "--nproc-per-node=2", *map(str, train(recipe, chains.path, run)), *options],
        env=os.environ | {"PYTHONPATH": f"{processes.ROOT}/src", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        waited = time.monotonic() + 240
        while not list(run.glob("state/step-*")) and time.monotonic() < waited:
            assert started.poll() is None, started.communicate()[0]
            time.sleep(0.05)
        os.kill(children(started.pid)[1], signal.SIGKILL)
        printed = started.communicate(timeout=120)[0]
    finally:
        started.kill()
    assert started.returncode != 0 and "SIGKILL" in printed
    assert not (run / "report.json").exists()
    (reached, _) = runs.losses(run)[-1]

    long |= {"log_every": 1, "max_steps": reached + 3}
    config = runs.config(backbone_folder, "paper", **long)
    quiet = runs.Quiet()
    train_run(config, chains.path, run, progress=quiet, resume=True)
    assert any(line.startswith("resuming at step") for line in quiet.lines)
    assert_same_run(run, runs.finished(config, chains.path, tmp_path / "alone").run)


def children(process: int) -> list[int]:
    """List the children of a process, in the order in which they were started."""
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True, check=True
    )
    return sorted(int(line) for line in listed.stdout.split())


def test_several_processes_need_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ConfigError, match=r"pip install 'l2rec\[distributed\]'"), launch.joined():
        pass


def test_divided_layers_train_what_whole_ones_do(
    recipe: Path, alone: Path, chains: Dataset, backbone_folder: Path, tmp_path: Path
) -> None:
    """FSDP2: each of two holds a part of the backbone; one goes on with the whole of it."""
    run = tmp_path / "divided"
    printed = processes.together(2, *train(recipe, chains.path, run), "training.shard=true")
    (held, of) = re.search(r"([\d,]+) of ([\d,]+) frozen weights are here", printed[0]).groups()
    assert 0.5 < int(held.replace(",", "")) / int(of.replace(",", "")) < 0.9  # words are whole
    assert_same_run(run, alone)
    ours, theirs = (load_tensors(r / "model.safetensors")[0] for r in (run, alone))
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}

    (run / "report.json").unlink()
    shutil.rmtree(max((run / "state").glob("step-*")))
    config = runs.config(backbone_folder, "paper", log_every=1, epochs=2)
    quiet = runs.Quiet()
    train_run(config, chains.path, run, progress=quiet, resume=True)
    assert any(line.startswith("resuming at step") for line in quiet.lines)
    assert_same_run(run, alone)


def test_what_cannot_be_divided_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bare, alone, here = tiny.random_backbone("qwen3"), World(), torch.device("cpu")
    with monkeypatch.context() as patch:
        patch.setattr(type(bare), "quantized", "4bit")
        with pytest.raises(BackboneError, match=r"quantize=4bit cannot be divided; set training"):
            sharding.shard(bare, alone, here)
    with monkeypatch.context() as patch:
        patch.setattr(bare, "before_pass", print)
        with pytest.raises(BackboneError, match="run packed alone"), bare.unpacked():
            pass
    monkeypatch.setattr(sharding, "call_order", lambda _, blocks: [*blocks, blocks[0]])
    with pytest.raises(BackboneError, match="runs a block of its layers twice"):
        sharding.shard(bare, alone, here)


def test_blocks_are_named_in_the_order_of_a_pass() -> None:
    for family, names in (
        ("qwen3", ["self_attn", "mlp"]),
        ("bert", ["attention", "intermediate", "output"]),
    ):
        bare = tiny.random_backbone(family)
        name, layers = layers_of(bare.model)
        of = {module: path for path, module in bare.model.named_modules()}
        found = [[of[b] for b in blocks] for blocks in sharding._blocks(bare, layers)]
        assert found == [[f"{name}.{n}.{block}" for block in names] for n in range(len(layers))]
