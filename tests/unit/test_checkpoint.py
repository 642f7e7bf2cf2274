"""Files on disk: whole or not at all, full disks, torn files, and nothing ever unpickled."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.errors import one_line
from torch import nn

from l2rec.disk import read_json, write_json, write_text
from l2rec.errors import CheckpointError
from l2rec.runs import checkpoint
from l2rec.runs.checkpoint import (
    State,
    latest_state,
    load_tensors,
    load_trained,
    optimizer_tensors,
    read_state,
    restore_optimizer,
    save_tensors,
    trained_tensors,
    write_state,
)


def state(step: int, size: int = 4) -> State:
    return State(
        {"w": torch.full((size,), float(step))},
        {"0.exp_avg": torch.full((size,), -float(step)), "rng": torch.get_rng_state()},
        {"step": step, "share": 0.1},
    )


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- files ---------------------------------------------------------------------------------------


def test_tensors_round_trip(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4).T, "b": torch.arange(5), "c": torch.zeros(0, 7)}
    save_tensors(tmp_path / "new" / "x.safetensors", tensors, step="12", note="é")
    loaded, metadata = load_tensors(tmp_path / "new" / "x.safetensors")
    assert metadata == {"step": "12", "note": "é"}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[n], t) and loaded[n].dtype == t.dtype for n, t in tensors.items())
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x.safetensors"]


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def safetensors_full_disk(*_: Any, **__: Any) -> None:
    raise checkpoint.SafetensorError("Error while serializing: I/O error: No space left on device")


@pytest.mark.parametrize(
    ("where", "name", "fault"),
    [
        (checkpoint, "save_file", full_disk),
        (checkpoint, "save_file", safetensors_full_disk),
        (os, "fsync", full_disk),
        (os, "replace", full_disk),
    ],
)
def test_a_full_disk_leaves_the_last_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, fault: Any
) -> None:
    write_state(tmp_path, 1, state(1))
    save_tensors(tmp_path / "model.safetensors", {"w": torch.ones(2)}, step="1")
    before = files(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(where, name, fault)
        with pytest.raises(CheckpointError, match=r"disk is full.*--resume") as error:
            write_state(tmp_path, 2, state(2))
        assert f"{tmp_path}/state/step-00000002: " in one_line(error)
        with pytest.raises(CheckpointError, match="nothing was replaced"):
            save_tensors(tmp_path / "model.safetensors", {"w": torch.zeros(2)}, step="2")
    assert files(tmp_path) == before
    newest = latest_state(tmp_path)
    assert newest is not None and newest.counters["step"] == 1


def test_a_full_disk_for_the_last_file_of_a_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_state(tmp_path, 1, state(1))
    before = files(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full_disk)
        with pytest.raises(CheckpointError, match=r"step-00000002: the disk is full"):
            write_state(tmp_path, 2, state(2))
    assert files(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(["mount", *options], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip("file systems can be mounted by root alone")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_real_full_disk(small_disk: Path) -> None:
    write_state(small_disk, 1, state(1, size=10_000))
    for size in (25_000, 60_000, 400_000):  # in the optimiser, in the model, and at once
        with pytest.raises(CheckpointError, match="disk is full") as error:
            write_state(small_disk, 2, state(2, size=size))
        one_line(error)
        newest = latest_state(small_disk)
        assert newest is not None and newest.counters["step"] == 1
    write_state(small_disk, 3, state(3, size=10_000))
    newest = latest_state(small_disk)
    assert newest is not None and torch.equal(newest.model["w"], torch.full((10_000,), 3.0))


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written") as error:
        write_text(tmp_path / "file" / "below", "x")
    one_line(error)


def test_an_interrupt_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: Any, path: Path, **__: Any) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_tensors(tmp_path / "x.safetensors", {"w": torch.ones(1)})
    with pytest.raises(KeyboardInterrupt):
        write_state(tmp_path, 1, state(1))
    assert files(tmp_path) == {} and latest_state(tmp_path) is None


def test_json(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 0.1, "ü": [1]})
    assert read_json(tmp_path / "x.json") == {"a": 0.1, "ü": [1]}
    with pytest.raises(CheckpointError, match=r"no such file; is this a run folder\?"):
        read_json(tmp_path / "none.json")
    for text in ('{"a": ', "[1]", "\x00"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"bad\.json") as error:
            read_json(tmp_path / "bad.json")
        one_line(error)


class Explosive:
    """An object that leaves a trace if it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("protocol", ["pickle", "torch"])
def test_a_pickle_under_our_name_never_runs(tmp_path: Path, protocol: str) -> None:
    mark, path = tmp_path / "executed", tmp_path / "model.safetensors"
    if protocol == "torch":
        torch.save({"w": Explosive(mark)}, path)
    else:
        path.write_bytes(pickle.dumps(Explosive(mark)))
        pickle.loads(path.read_bytes())
        assert mark.exists()  # the charge is live
        mark.unlink()
    with pytest.raises(CheckpointError, match="torn or not a safetensors file") as error:
        load_tensors(path)
    one_line(error)
    assert not mark.exists()


@pytest.mark.parametrize("cut", [0, 4, 30, -1])
def test_torn_tensors(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "model.safetensors"
    save_tensors(path, {"w": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: torn") as error:
        load_tensors(path)
    one_line(error)


def test_missing_tensors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such file; was this run ever checkpointed\?"):
        load_tensors(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError):
        load_tensors(tmp_path)


# -- trained tensors -----------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(2, 2)
        self.head = nn.Linear(2, 3)
        self.register_buffer("mean", torch.zeros(2))


def test_only_trained_tensors_are_kept() -> None:
    assert set(trained_tensors(Model())) == {"head.weight", "head.bias", "mean"}


def test_load_trained_is_strict() -> None:
    model, other = Model(), Model()
    good = {n: t.clone() for n, t in trained_tensors(other).items()}
    before = {n: t.clone() for n, t in model.state_dict().items()}
    cases: dict[str, dict[str, torch.Tensor]] = {
        r"missing \['mean'\], unexpected none": {n: t for n, t in good.items() if n != "mean"},
        r"missing none, unexpected \['tail'\]": good | {"tail": torch.ones(1)},
        r"missing none, unexpected \['backbone.weight'\]": good
        | {"backbone.weight": before["backbone.weight"]},
        r"head.weight has shape \(3, 3\).*need \(3, 2\)": good | {"head.weight": torch.ones(3, 3)},
    }
    for message, tensors in cases.items():
        with pytest.raises(CheckpointError, match=message) as error:
            load_trained(model, tensors, "RUN/model.safetensors")
        assert one_line(error).startswith("RUN/model.safetensors: ")
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    load_trained(model, good, "RUN")
    assert torch.equal(model.head.weight, other.head.weight)
    assert torch.equal(model.backbone.weight, before["backbone.weight"])


# -- states --------------------------------------------------------------------------------------


def test_the_newest_two_states_are_kept(tmp_path: Path) -> None:
    assert latest_state(tmp_path) is None
    for step in (1, 9, 10, 123456789):
        write_state(tmp_path, step, state(step))
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == [
        "step-00000010",
        "step-123456789",
    ]
    newest = latest_state(tmp_path)
    assert newest is not None and newest.counters == {"step": 123456789, "share": 0.1}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "counters.json"])
@pytest.mark.parametrize("damage", ["missing", "torn"])
def test_a_torn_state_is_passed_over(tmp_path: Path, name: str, damage: str) -> None:
    write_state(tmp_path, 1, state(1))
    newest = write_state(tmp_path, 2, state(2))
    if damage == "missing":
        (newest / name).unlink()
    else:
        (newest / name).write_bytes((newest / name).read_bytes()[:7])
    with pytest.raises(CheckpointError):
        read_state(newest)
    older = latest_state(tmp_path)
    assert older is not None and older.counters["step"] == 1
    (tmp_path / "state" / "step-00000001" / "counters.json").unlink()
    with pytest.raises(CheckpointError, match=f"step-00000002/{name}"):
        latest_state(tmp_path)


def test_left_overs_are_no_states(tmp_path: Path) -> None:
    write_state(tmp_path, 1, state(1))
    left = tmp_path / "state" / ".step-00000002.part"
    left.mkdir()
    (left / ".model.safetensors.77.part").write_bytes(b"half")
    newest = latest_state(tmp_path)
    assert newest is not None and newest.counters["step"] == 1
    write_state(tmp_path, 2, state(2))  # and in nobody's way
    assert {p.name for p in (tmp_path / "state" / "step-00000002").iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
        "counters.json",
    }


def test_optimizer_round_trip(tmp_path: Path) -> None:
    def build() -> tuple[nn.Linear, torch.optim.AdamW]:
        torch.manual_seed(3)
        layer = nn.Linear(4, 4)
        return layer, torch.optim.AdamW([{"params": [layer.weight]}, {"params": [layer.bias]}])

    def step(layer: nn.Linear, optimizer: torch.optim.AdamW) -> None:
        optimizer.zero_grad()
        nn.functional.dropout(layer(torch.randn(8, 4)), 0.5).square().sum().backward()
        optimizer.step()

    layer, optimizer = build()
    for _ in range(3):
        step(layer, optimizer)
    weights = {n: t.clone() for n, t in layer.state_dict().items()}
    write_state(tmp_path, 3, State(weights, optimizer_tensors(optimizer), {"step": 3}))
    step(layer, optimizer)
    other, second = build()
    newest = latest_state(tmp_path)
    assert newest is not None
    other.load_state_dict(newest.model)
    restore_optimizer(second, newest.optimizer)
    step(other, second)
    assert torch.equal(layer.weight, other.weight) and torch.equal(layer.bias, other.bias)
    with pytest.raises(CheckpointError, match="no random state"):
        restore_optimizer(second, {"0.step": torch.tensor(1.0)})
