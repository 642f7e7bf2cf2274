"""A run blended with co-occurrence: weights from validation alone, scores as written down, and a
run folder like any other.
"""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tests.support.command import Call
from tests.support.runs import Finished, Quiet
from torch import Tensor

from l2rec.data.ragged import Ragged
from l2rec.data.splits import Split
from l2rec.disk import read_json
from l2rec.errors import CheckpointError
from l2rec.metrics import expected_ranks, rank_values
from l2rec.modules import item_text
from l2rec.modules.cooccurrence import Blend, standardised, text_neighbors
from l2rec.runs import scoring
from l2rec.runs.checkpoint import load_trained, save_tensors
from l2rec.runs.folder import load_run_config
from l2rec.runs.predictor import load
from l2rec.runs.train import train_run
from l2rec.studies import blend
from l2rec.studies.blend import blend_run
from l2rec.studies.compare import compare_runs

HISTORIES = [[0, 1], [3]]


def by_hand(near: float, repeat: float, n: int) -> Blend:
    made = Blend(n)
    made.together.count(Ragged.from_rows([[0, 1, 2], [1, 3], [2, 1]]))
    made.near.fill_(near)
    made.repeat.fill_(repeat)
    return made


@pytest.mark.parametrize(("near", "repeat"), [(0.5, -8.0), (0.0, 2.0)])
def test_scores_are_as_written_down(catalog_run: Finished, near: float, repeat: float) -> None:
    model = load(catalog_run.run).model
    made, histories = by_hand(near, repeat, model.n_items), Ragged.from_rows(HISTORIES)
    plain = model.scorer()(histories)
    met = made.together.recall(histories).toarray()
    scores = made.scorer(model)(histories)
    for row, history in enumerate(HISTORIES):
        mean, spread = float(plain[row].mean()), float(plain[row].std())
        for item in range(model.n_items):
            expected = (float(plain[row, item]) - mean) / spread
            expected += repeat if item in history else near * met[row, item]
            assert float(scores[row, item]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("fixture", ["catalog_run", "sasrec_run"])
def test_what_is_recommended_is_what_was_evaluated(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    """Check that inner products plus the prior rank as the scores of the equation do."""
    run = request.getfixturevalue(fixture)
    plain = load(run if isinstance(run, Path) else run.run)
    predictor = plain.blended(by_hand(0.5, -8.0, plain.n_items), "blended")
    rows = Ragged.from_rows([*HISTORIES, [5, 1, 2, 7]])
    evaluated, served = predictor.scorer()(rows), predictor.scores(predictor.encode(rows))
    deviation = plain.scores(plain.encode(rows)).std(1, keepdim=True)
    centred = [x - x.mean(1, keepdim=True) for x in (evaluated * deviation, served)]
    torch.testing.assert_close(*centred, atol=1e-4, rtol=1e-3)
    assert not torch.equal(served.argsort(1), plain.scores(plain.encode(rows)).argsort(1))


def test_items_that_come_later_change_no_score(catalog_run: Finished) -> None:
    predictor = load(catalog_run.run)
    predictor = predictor.blended(by_hand(0.5, -8.0, predictor.n_items), "blended")
    rows, n = Ragged.from_rows(HISTORIES), predictor.n_items
    before = predictor.scores(predictor.encode(rows)), predictor.scorer()(rows)
    grown = predictor.with_items({"new": "small red wood lamp"})
    for was, scores in zip(
        before, (grown.scores(grown.encode(rows)), grown.scorer()(rows)), strict=True
    ):
        assert scores.shape == (2, n + 1)
        torch.testing.assert_close(scores[:, :n], was)
    # It has met nothing yet: what is added to it is 0, or rho for a history that holds it.
    added = grown.encode(Ragged.from_rows([[3, n], [n], [3]])).prior
    assert added is not None and float(added[2, n]) == float(added[1, :n].abs().max()) == 0.0
    assert float(added[0, n]) < 0 and float(added[1, n]) < 0


def test_what_is_saved_is_what_is_loaded(catalog_run: Finished) -> None:
    model = load(catalog_run.run).model
    made, rows = by_hand(0.5, -8.0, model.n_items), Ragged.from_rows(HISTORIES)
    again = Blend(model.n_items)  # its counts have another length
    load_trained(again, made.state_dict(), "here")
    assert torch.equal(again.scorer(model)(rows), made.scorer(model)(rows))


def test_what_a_beam_did_not_reach_is_as_the_last_that_it_reached(
    beam_run: Path, tmp_path: Path
) -> None:
    model = load(beam_run).model
    made, histories = by_hand(0.5, -8.0, model.n_items), Ragged.from_rows(HISTORIES)
    plain = model.scorer()(histories)
    assert plain.isneginf().any(1).all()
    met = made.together.recall(histories).toarray()
    scores = made.scorer(model)(histories)
    for row, history in enumerate(HISTORIES):
        found = plain[row][~plain[row].isneginf()]
        whole = torch.where(plain[row].isneginf(), found.min(), plain[row])
        for item in range(model.n_items):
            expected = float((whole[item] - found.mean()) / found.std(correction=0))
            expected += -8.0 if item in history else 0.5 * met[row, item]
            assert float(scores[row, item]) == pytest.approx(expected, abs=1e-4)
    blend_run(beam_run, tmp_path / "blended", progress=Quiet())
    assert len(load(tmp_path / "blended").recommend(["i3", "i4"], 10).items) == 10
    one = torch.full((1, model.n_items), -torch.inf)
    one[0, 5] = -1.5
    assert standardised(one, model.n_items).eq(0).all(), "one item that was reached tells no scale"


def test_weights_follow_what_validation_says(catalog_run: Finished) -> None:
    """Where the counts tell the target they weigh much, and never more than they are worth."""
    model = load(catalog_run.run).model
    n = int(model.n_items)
    rows = Ragged.from_rows([[i, (i + 1) % n] for i in range(n)] * 3)
    one, follows = Ragged.from_rows([[i] for i in range(n)]), (np.arange(n) + 1) % n
    made = Blend(n)
    made.calibrate(model.scorer(), rows, one, follows)
    assert made.weights.near > 1
    apart = made.scorer(model)(one).argmin(1).numpy()
    made.calibrate(model.scorer(), rows, one, apart)
    chosen = made.scorer(model)(one)
    made.near.fill_(256.0)
    assert ndcg(chosen, apart) >= ndcg(made.scorer(model)(one), apart)


def ndcg(scores: Tensor, targets: np.ndarray) -> float:
    ranks = expected_ranks(scores, torch.from_numpy(targets))
    return float(rank_values(ranks.numpy(), "ndcg@10").mean())


def test_texts_are_among_the_counts_of_a_method_that_reads_them(
    catalog_run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that the run's own backbone finds the neighbours that the model's table has, and reads
    each text once.
    """
    predictor, progress = load(catalog_run.run), Quiet()
    config = load_run_config(catalog_run.run)[0]
    found = blend._alike(config, predictor.texts, tmp_path, progress)
    assert progress.lines == [f"comparing {predictor.n_items} texts"]
    table = predictor.model.items.table
    np.testing.assert_allclose(
        found.toarray(), text_neighbors(table.text).toarray(), rtol=1e-3, atol=1e-5
    )
    monkeypatch.setattr(item_text, "text_vectors", None)
    again = blend._alike(config, predictor.texts, tmp_path, progress)
    np.testing.assert_array_equal(found.toarray(), again.toarray())


def test_a_blend_is_a_run_to_compare(catalog_run: Finished, blended_run: Finished) -> None:
    blended = blended_run.run
    report = read_json(blended / "report.json")
    assert report["recipe"].endswith(" + co-occurrence")
    assert {"L2Rec + co-occurrence", "L2Rec", "popularity"} <= report["scores"].keys()
    # Weight 0 is among what is tried: on validation a blend is never worse than the run.
    assert (
        report["valid"]["ndcg@10"]
        >= read_json(catalog_run.run / "report.json")["valid"]["ndcg@10"] - 1e-9
    )
    found = compare_runs([catalog_run.run, blended])
    assert len(found.entries) == 2, "one recipe, and yet two rows"
    with pytest.raises(CheckpointError, match="is not empty; choose another --out"):
        blend_run(catalog_run.run, blended, progress=Quiet())
    with pytest.raises(CheckpointError, match="is blended already; blend the run it was made of"):
        blend_run(blended, blended / "twice", progress=Quiet())


def test_a_blend_is_a_run_by_every_command(
    catalog_run: Finished, blended_run: Finished, call: Call, tmp_path: Path
) -> None:
    blended = blended_run.run
    report = read_json(blended / "report.json")
    again = json.loads(call("evaluate", blended, "--json").out)
    for metric, value in report["scores"]["L2Rec + co-occurrence"].items():
        assert again[metric] == pytest.approx(value), metric
    assert again["version"] == load(blended).version != load(catalog_run.run).version

    found = json.loads(call("recommend", blended, "--history", "i0,i1", "-k", "30", "--json").out)
    assert found["version"] == again["version"]
    predictor = load(blended)
    ranked = predictor.scorer()(predictor.rows([["i0", "i1"]]))[0]
    expected = [predictor.ids[n] for n in ranked.argsort(descending=True, stable=True).tolist()]
    assert [item["id"] for item in found["items"]] == [i for i in expected if i not in ("i0", "i1")]

    assert call("embed", blended, "--out", tmp_path / "vectors").code == 0
    assert call("embed", catalog_run.run, "--out", tmp_path / "plain").code == 0
    vectors, plain = (pq.read_table(tmp_path / f / "items.parquet") for f in ("vectors", "plain"))
    assert vectors["vector"].equals(plain["vector"]) and not vectors["version"].equals(
        plain["version"]
    )
    assert call("deploy", blended, "--to", tmp_path / "serving").code == 0
    assert (blended / "report.html").is_file() and (blended / "diagnostics.json").is_file()


def test_a_torn_blend_is_noticed(blended_run: Finished, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(blended_run.run, run)
    file = run / "blend.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"blend\.safetensors: torn"):
        load(run)


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to


@pytest.mark.parametrize("command", ["recommend", "evaluate", "embed", "blend"])
def test_a_run_that_lost_its_blend_is_not_taken_for_the_one_before(
    blended_run: Finished, call: Call, tmp_path: Path, command: str
) -> None:
    run = copied(blended_run.run, tmp_path / "run")
    (run / "blend.safetensors").unlink()
    options = {
        "recommend": ["--history", "i0"],
        "evaluate": [],
        "embed": ["--out", tmp_path / "vectors"],
        "blend": ["--out", tmp_path / "again"],
    }
    result = call(command, run, *options[command])
    assert result.code == 2
    assert "blend.safetensors: no such file; blend again the run it was made of" in result.err


def test_a_blend_of_another_run_is_refused(blended_run: Finished, tmp_path: Path) -> None:
    run = copied(blended_run.run, tmp_path / "run")
    other = by_hand(0.5, -8.0, load(run).n_items)
    save_tensors(run / "blend.safetensors", other.state_dict())
    with pytest.raises(CheckpointError, match="not the one that this run was blended with"):
        load(run)


def test_a_blended_run_is_not_trained_on(blended_run: Finished, tmp_path: Path) -> None:
    """Check that nothing is trained under a blend, be its report there or not."""
    run = copied(blended_run.run, tmp_path / "run")
    (run / "report.html").unlink()
    before = {file: file.read_bytes() for file in run.iterdir() if file.is_file()}
    with pytest.raises(CheckpointError, match="is blended: there is nothing to resume"):
        train_run(load_run_config(run)[0], blended_run.data, run, progress=Quiet(), resume=True)
    assert before == {file: file.read_bytes() for file in run.iterdir() if file.is_file()}


@pytest.mark.parametrize("step", ["write_blend", "write_ranks", "write_report"])
def test_a_blend_is_written_whole_or_not_at_all(
    catalog_run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(scoring if step == "write_ranks" else blend, step, full)
        with pytest.raises(CheckpointError, match=r"out: the disk is full; .* and blend again"):
            blend_run(catalog_run.run, tmp_path / "out", progress=Quiet())
    assert not list(tmp_path.iterdir())
    blend_run(catalog_run.run, tmp_path / "out", progress=Quiet())
    assert load(tmp_path / "out").blend is not None


def test_of_two_blends_into_one_folder_the_first_stays(
    catalog_run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, written = tmp_path / "out", blend.write_report

    def another_ends_first(folder: Path) -> None:
        written(folder)
        out.mkdir()
        (out / "report.json").write_text("{}")

    monkeypatch.setattr(blend, "write_report", another_ends_first)
    with pytest.raises(CheckpointError, match="is not empty; choose another --out"):
        blend_run(catalog_run.run, out, progress=Quiet())
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "report.json"]


def test_a_run_without_its_log_can_be_blended(catalog_run: Finished, tmp_path: Path) -> None:
    run = copied(catalog_run.run, tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    blend_run(run, tmp_path / "out", progress=Quiet(), data=catalog_run.data)
    assert load(tmp_path / "out").blend is not None


def test_the_test_split_chooses_nothing(
    catalog_run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that the same blend is chosen whatever the test targets are."""
    first = blend_run(catalog_run.run, tmp_path / "a", progress=Quiet())
    split = blend.training_split

    def other(*of: Any) -> Split:
        real = split(*of)
        return replace(
            real,
            test=replace(
                real.test,
                targets=Ragged(np.zeros_like(real.test.targets.values), real.test.targets.offsets),
            ),
        )

    monkeypatch.setattr(blend, "training_split", other)
    second = blend_run(catalog_run.run, tmp_path / "b", progress=Quiet())
    assert first["blend"] == second["blend"]
    assert first["scores"]["L2Rec + co-occurrence"] != second["scores"]["L2Rec + co-occurrence"]
    assert torch.isfinite(torch.tensor(list(second["valid"].values()))).all()
