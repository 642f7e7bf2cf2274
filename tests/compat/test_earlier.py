"""What an earlier version wrote opens, answers to the last digit, and resumes.

``earlier/`` was made by l2rec at commit 114fdeb: `make.sh` has the commands.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from starlette.testclient import TestClient
from typer.testing import CliRunner

from l2rec.cli import app
from l2rec.errors import ConfigError
from l2rec.runs.checkpoint import without_gone
from l2rec.runs.folder import read_report

EARLIER = Path(__file__).parent / "earlier"
GONE = "l2rec-plus"
"""The run of a form that is gone."""
RUNS = sorted(path.name for path in (EARLIER / "finished").iterdir() if path.name != GONE)
REFUSED = "items=table is no option any more; train without it, such as recipe l2rec-plus"
EXPECTED: dict[str, dict[str, Any]] = json.loads((EARLIER / "expected.json").read_text())


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(one_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that may be changed; runs name their backbone by a path that is relative to it."""
    copy = tmp_path / "earlier"
    shutil.copytree(EARLIER, copy)
    monkeypatch.chdir(copy)
    return copy


def l2rec(*words: str) -> str:
    done = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def assert_close(found: Any, wanted: Any, where: str = "") -> None:
    """Equal but for the last bits of a number, which processors disagree on."""
    if isinstance(wanted, dict):
        assert found.keys() >= wanted.keys(), where
        for key, value in wanted.items():
            assert_close(found[key], value, f"{where}.{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
            assert_close(a, b, f"{where}[{number}]")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-6), where
    else:
        assert found == wanted, where


@pytest.mark.parametrize("name", RUNS)
def test_scores(folder: Path, name: str) -> None:
    for split in ("valid", "test"):
        found = l2rec("evaluate", f"finished/{name}", "--split", split, "--data", "data", "--json")
        assert_close(json.loads(found), EXPECTED[name][split], f"{name}.{split}")


@pytest.mark.parametrize("name", RUNS)
def test_recommendations(folder: Path, name: str) -> None:
    found = l2rec(
        *("recommend", f"finished/{name}", "--history", "i1,i2,i3"),
        *("-k", "24", "--include-seen", "--json"),
    )
    assert_close(json.loads(found), EXPECTED[name]["recommend"], name)


@pytest.mark.parametrize("name", ["l2rec", "sasrec"])
def test_vectors(folder: Path, name: str) -> None:
    import pyarrow.parquet as pq

    l2rec("embed", f"finished/{name}", "--out", "again", "--data", "data")
    for kind in ("items", "users"):
        found, wanted = (pq.read_table(f"{f}/{kind}.parquet") for f in ("again", f"vectors/{name}"))
        assert found.schema.equals(wanted.schema) and found["id"].equals(wanted["id"])
        a, b = (np.stack(table["vector"].to_numpy()) for table in (found, wanted))
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_training_ends_as_if_it_had_never_been(folder: Path, name: str) -> None:
    killed, finished = folder / "killed" / name, folder / "finished" / name
    l2rec("train", f"recipes/{name}.yaml", "--data", "data", "--out", str(killed), "--resume")
    a, b = (load_file(run / "model.safetensors") for run in (killed, finished))
    b = without_gone(b, a)
    assert a.keys() == b.keys()
    for key, tensor in b.items():
        torch.testing.assert_close(
            a[key], tensor, atol=1e-5, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}"
        )
    reports = [read_report(run) for run in (killed, finished)]  # floors by today's names
    assert_close(reports[0]["scores"], reports[1]["scores"], name)
    assert reports[0]["best_step"] == reports[1]["best_step"]


@pytest.mark.parametrize(
    "words",
    [
        ("evaluate", "finished/l2rec-plus", "--data", "data"),
        ("recommend", "finished/l2rec-plus", "--history", "i1,i2"),
        ("deploy", "finished/l2rec-plus", "--to", "there"),
    ],
    ids=lambda words: words[0],
)
def test_a_run_of_a_form_that_is_gone_is_refused(folder: Path, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=rf"finished/l2rec-plus/config\.yaml: {REFUSED}$"):
        CliRunner().invoke(app, list(words), catch_exceptions=False)


def test_a_killed_training_of_a_form_that_is_gone_is_refused(folder: Path) -> None:
    recipe, run = folder / "recipes" / "l2rec-plus.yaml", folder / "killed" / "l2rec-plus"
    words = ["train", str(recipe), "--data", "data", "--out", str(run), "--resume"]
    with pytest.raises(ConfigError, match=rf"recipes/l2rec-plus\.yaml: {REFUSED}$"):
        CliRunner().invoke(app, words, catch_exceptions=False)
    recipe.write_text((folder / "recipes" / "l2rec.yaml").read_text())
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with pytest.raises(ConfigError, match=rf"killed/l2rec-plus/config\.yaml: {REFUSED}$"):
        CliRunner().invoke(app, words, catch_exceptions=False)
    assert before == {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}


def test_an_index(folder: Path) -> None:
    import pyarrow.parquet as pq

    from l2rec import index

    opened, ids, version = index.load(folder / "index")
    table = pq.read_table("vectors/l2rec/items.parquet")
    assert list(ids) == table["id"].to_pylist() and version == table["version"][0].as_py()
    vectors = np.stack(table["vector"].to_numpy())
    rows, scores = opened.search(vectors, 1)
    np.testing.assert_allclose(scores[:, 0], 1.0, atol=1e-5)
    assert rows[:, 0].tolist() == list(range(len(vectors)))


def test_a_service_goes_on_with_its_events_and_items(folder: Path) -> None:
    from l2rec.service.app import create_app
    from l2rec.service.events import EventLog
    from l2rec.service.server import load_live
    from l2rec.service.settings import Settings

    state = folder / "serving" / "live.json"
    state.write_text(state.read_text().replace("/earlier/", f"{folder}/"))
    log = EventLog(f"sqlite:///{folder}/serving/events.db")
    live, _ = load_live(folder / "serving", log, Settings(), None)
    with TestClient(create_app(Settings(rate=0), live, log), base_url="http://localhost") as client:
        wanted = json.loads((folder / "answers.json").read_text())
        asked: dict[str, dict[str, Any]] = {  # as traffic.py did
            "user": {"user": "served", "k": 24},
            "history": {"history": ["i7", "n2"], "k": 24},
        }
        for name, body in asked.items():
            assert_close(client.post("/v1/recommend", json=body).json(), wanted[name], name)
        ids = [item["id"] for item in wanted["history"]["items"]]
        assert "n1" in ids and "i5" not in ids  # put and deleted
