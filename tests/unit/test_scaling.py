"""The plan on paper counts what the models compute, and its page is what its command writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.benchmarks import FOLDER, script
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, Qwen3Config

from l2rec.data.prepare import PrepareConfig, prepare
from l2rec.data.synthetic import industrial_log

scaling = script("scaling")


def model_of(shape: Any, device: str = "meta") -> Any:
    """Build a model of these shapes, by default without weights."""
    config = Qwen3Config(
        vocab_size=shape.words,
        hidden_size=shape.dim,
        intermediate_size=shape.wide,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.shared_heads,
        head_dim=shape.head,
        attn_implementation="eager",
    )
    with torch.device(device):
        return AutoModel.from_config(config)


@pytest.mark.parametrize("shape", [scaling.SMALL, scaling.LARGE], ids=lambda shape: shape.name)
def test_parameters_are_those_of_the_shapes(shape: Any) -> None:
    counted = sum(p.numel() for name, p in model_of(shape).named_parameters() if "norm" not in name)
    assert shape.parameters == counted


def test_operations_are_those_that_torch_counts() -> None:
    shape, row = scaling.Shape("tiny", 3, 32, 4, 2, 8, 48, 64), 11
    model = model_of(shape, "cpu")
    x = torch.zeros(1, row, shape.dim)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs_embeds=x, use_cache=False)
    assert counter.get_total_flops() == row * shape.forward(row)


def test_the_page_is_the_one_that_its_command_writes() -> None:
    """Nobody edits it by hand, and measurements that change come with it."""
    assert scaling.page(scaling.documents()) == scaling.PAGE.read_text(encoding="utf-8")


def test_measured_sizes_come_in_powers_of_ten() -> None:
    """Measurements are in 2^20 bytes, all of them, and the page is not."""
    found = scaling.documents()
    unit, free = scaling.costs(found), scaling.row(found["industrial"], step="free")
    assert unit["free_peak"].value == pytest.approx(free["peak_mb"] * 2**20 / 1e9)
    log = scaling.row(found["preparation"], step="prepare")
    assert unit["peak"].value == pytest.approx(log["peak_mb"] * 2**20 / 1e9)
    columns, rows = [("peak_mb", "peak MB"), ("disk_mb", "disk MB")], [{"peak_mb": 1e3}]
    text = scaling.industrial({"columns": columns, "rows": [*rows, {"disk_mb": 100.0}]})
    assert "1,049" in text and "105" in text


def test_an_index_is_measured_in_the_unit_of_the_rest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    industrial = script("industrial")
    facts = {"rows": 2, "megabytes": 1.048576, "recall@10": 1.0}
    monkeypatch.setattr(industrial, "build_folder", lambda *_, **__: facts)
    assert industrial.indexed(tmp_path, 0, 0, kind="int8")[0]["disk_mb"] == pytest.approx(1)
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    assert industrial.size_mb(tmp_path) == pytest.approx(1)


@pytest.mark.parametrize(
    ("value", "text"), [(1.5e9, "1.50 GB"), (2e13, "20.0 TB"), (512e6, "512 MB"), (4e3, "4.00 kB")]
)
def test_sizes_are_written_with_units(value: float, text: str) -> None:
    assert scaling.shown_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (30.0, "30 s"),
        (3.6, "3.6 s"),
        (90.0, "1.50 min"),
        (5400, "1.50 hours"),
        (3 * 86_400, "3.00 days"),
    ],
)
def test_times_are_written_with_units(value: float, text: str) -> None:
    assert scaling.shown_time(value) == text


@pytest.mark.slow
def test_a_log_goes_through_every_step(tmp_path: Path) -> None:
    log = industrial_log(tmp_path / "log", 6000, 400, 300, seed=0)
    prepare(log, tmp_path / "data", PrepareConfig(event_type="event_type"), progress=False)
    file = tmp_path / "industrial.json"
    command = [sys.executable, FOLDER / "industrial.py", "--keep", tmp_path, "--steps", "6"]
    subprocess.run([*command, "--users", "10", "--json", file], env=os.environ, check=True)
    rows = {row["step"]: row for row in json.loads(file.read_text())["rows"]}
    searches = ["search exact", "search int8", "search binary"]
    made = ["texts", "train", "items", "users", "index int8", "index binary"]
    assert list(rows) == [*made, *searches, "free"]
    assert rows["train"]["done"] == 6 and rows["users"]["done"] == 200
    assert all(row["each"] > 0 and row["peak_mb"] > 0 for row in rows.values())
    assert rows["index int8"]["recall"] > 0.9
