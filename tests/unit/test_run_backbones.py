"""Whole runs on backbones in 8 and 4 bits, on GGUF files, and with gradient checkpointing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tests.support import gguf_files, runs
from tests.support.errors import one_line
from tests.support.runs import Finished, Quiet
from transformers import AutoModel, LlamaConfig

from l2rec.config import RunConfig, resolve
from l2rec.data.dataset import Dataset
from l2rec.errors import CheckpointError
from l2rec.runs.embed import embed_run
from l2rec.runs.predictor import load
from l2rec.runs.train import train_run
from l2rec.studies.doctor.study import doctor


def config_of(backbone: Path, items: str = "paper", quantize: str = "none", **training: Any) -> Any:
    values = runs.recipe_values(backbone, items, **{"max_steps": 4, **training})
    values["backbone"]["quantize"] = quantize
    return resolve(values, where="test")


def activations(config: RunConfig, data: Path) -> int:
    report = doctor(config, data, measure=False, progress=Quiet())
    row: dict[str, int] = report["backbones"][0]["shapes"]["memory"][0]
    return row["activations"]


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_run_on_quantised_weights(
    bits: str, backbone_folder: Path, chains: Dataset, tmp_path: Path
) -> None:
    config = config_of(backbone_folder, quantize=bits)
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train_run(config, chains.path, run, progress=Stopped(2))
    train_run(config, chains.path, run, progress=Quiet(), resume=True)
    whole = runs.finished(config, chains.path, tmp_path / "whole")
    runs.assert_same_weights(whole.run, run)
    predictor = load(run)
    assert predictor.model.backbone.quantized == bits
    assert len(predictor.recommend(["i1", "i2"], 3).items) == 3
    embed_run(run, tmp_path / "vectors", Quiet())
    fresh = predictor.model.encode_items(np.arange(5, dtype=np.int32))
    torch.testing.assert_close(predictor.vectors[:5], fresh, rtol=0, atol=1e-6)
    with pytest.raises(CheckpointError, match=f"backbone.quantize was '{bits}', is 'none'"):
        train_run(config_of(backbone_folder), chains.path, run, progress=Quiet(), resume=True)
    identity = yaml.safe_load((run / "config.yaml").read_text())
    identity["config"]["backbone"]["quantize"] = "none"
    (run / "config.yaml").write_text(yaml.safe_dump(identity))
    held = (
        f"trained on {bits[0]}-bit weights of .*, and these are unquantised weights; set backbone"
    )
    with pytest.raises(CheckpointError, match=held) as error:
        load(run)
    one_line(error)


class Stopped(Quiet):
    """Progress that ends a training before its end, as Ctrl-C does."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def training(self, epoch: float, step: int, total: int, text: str) -> None:
        super().training(epoch, step, total, text)
        if step >= self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("items", ["paper", "catalog"])
def test_checkpointing_trains_the_same_model_from_less_memory(
    items: str, backbone_folder: Path, chains: Dataset, tmp_path: Path
) -> None:
    plain = runs.finished(config_of(backbone_folder, items), chains.path, tmp_path / "plain")
    config = config_of(backbone_folder, items, checkpointing=True)
    run = runs.finished(config, chains.path, tmp_path / "run")
    assert runs.losses(run.run) == runs.losses(plain.run)
    runs.assert_same_weights(run.run, plain.run)
    less = activations(config, chains.path)
    assert less < activations(config_of(backbone_folder, items), chains.path)


def test_a_run_finds_a_gguf_file_that_moved_with_it(
    chains: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    (there / "models").mkdir(parents=True)
    monkeypatch.chdir(there)
    torch.manual_seed(0)
    shape = gguf_files.SHAPE | {"vocab_size": len(gguf_files.PIECES)}
    model = AutoModel.from_config(LlamaConfig(**shape))
    gguf_files.write(Path("models/a.gguf"), model, "Q8_0")
    done: Finished = runs.finished(config_of(Path("models/a.gguf")), chains.path, Path("runs/a"))
    expected = load(done.run).recommend(["i1", "i2"], 3).items
    monkeypatch.chdir(tmp_path)
    there.rename(elsewhere)
    assert load(elsewhere / "runs/a").recommend(["i1", "i2"], 3).items == expected
