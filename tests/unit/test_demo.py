"""The demo on a small data set of the same make: prepared, trained, shown, and not twice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tests.support import runs

from l2rec import demo
from l2rec.config import RunConfig, load_recipe
from l2rec.data.sources import SOURCES
from l2rec.data.synthetic import simple_text
from l2rec.errors import DataError


@pytest.fixture
def movies(tmp_path: Path) -> Path:
    """A copy of MovieLens-100K with 12 users and 15 films, as the download leaves it."""
    folder = tmp_path / "recbole"
    folder.mkdir()
    films = [f"{n}\t{simple_text(37 * n)}\t1990\tDrama" for n in range(15)]
    header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
    (folder / "ml-100k.item").write_text("\n".join([header, *films]) + "\n")
    events = [f"{u}\t{(u + n) % 15}\t4\t{n}" for u in range(12) for n in range(7)]
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    (folder / "ml-100k.inter").write_text("\n".join([header, *events]) + "\n")
    return folder


def test_the_demo(
    movies: Path,
    backbone_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[Any] = []

    def fetch(name: str, cache: Path) -> Path:
        asked.append(name)
        return movies

    def recipe(name: str, overrides: list[str]) -> RunConfig:
        asked.append((name, overrides))
        if name == demo.RIVAL:
            return load_recipe("sasrec", ["model.dim=16", "training.epochs=1"])
        return runs.config(backbone_folder, epochs=1)

    monkeypatch.setattr(demo, "fetch", fetch)
    monkeypatch.setattr(demo, "load_recipe", recipe)
    run, data = tmp_path / "run", tmp_path / "data"
    demo.run_demo(run, data, 3.5)
    limit = ["training.max_minutes=3.5"]
    assert asked == ["movielens-100k", (demo.RECIPE, limit), (demo.RIVAL, limit)]
    out, blended = capsys.readouterr().out, tmp_path / "run-blended"
    assert (blended / "report.html").is_file() and f"{blended}/report.html" in out
    rows = [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")]
    assert rows[: rows.index("SASRec + co-occurrence") + 1] == [
        *("popularity", "last item neighbour", "co-occurrence", "untrained backbone"),
        *("L2Rec", "SASRec", "L2Rec + co-occurrence", "SASRec + co-occurrence"),
    ]
    assert out.count("recommended") == 3
    assert len(re.findall(r"Solaris is rank \d+ of \d+ \(new: known by its text alone\)", out)) == 3
    assert "(1990), Drama" in out  # the texts are made by the template of the source
    assert f"l2rec recommend {blended} --user 0" in out

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("trained or fetched again")

    monkeypatch.setattr(demo, "train_run", never)
    monkeypatch.setattr(demo, "blend_run", never)
    monkeypatch.setattr(demo, "fetch", never)
    demo.run_demo(run, data, 3.5)
    captured = capsys.readouterr()
    assert "is trained already" in captured.err and captured.out == out

    (blended / "model.safetensors").write_bytes(b"another")
    with pytest.raises(DataError, match=r"run-blended was not made of .*run; delete it, or"):
        demo.run_demo(run, data, 3.5)


def test_a_killed_demo_goes_on(
    movies: Path, backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed: list[bool] = []

    def killed(*_: Any, resume: bool, **__: Any) -> None:
        resumed.append(resume)
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "config.yaml").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "fetch", lambda *_: movies)
    monkeypatch.setattr(demo, "train_run", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            demo.run_demo(tmp_path / "run", tmp_path / "data", 1.0)
    assert resumed == [False, True]


def test_a_demo_of_other_data(
    catalog_run: Any, movies: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(demo, "fetch", lambda *_: movies)
    with pytest.raises(DataError, match=r"was made on other data than .*choose another --out"):
        demo.run_demo(catalog_run.run, tmp_path / "data", 1.0)


def test_the_recipe_and_the_source_are_shipped() -> None:
    config = demo.load_recipe(demo.RECIPE, ["training.max_minutes=0.5"])
    assert config.training.max_minutes == 0.5 and demo.SOURCE in SOURCES
    assert demo.load_recipe(demo.RIVAL, []).training.max_minutes is None
