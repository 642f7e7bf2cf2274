"""fit and recommend: the same training and the same scores as the command's, as tables."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from sklearn.base import clone
from tests.support.errors import one_line
from tests.support.runs import Quiet, assert_same_weights

import l2rec
from l2rec import L2Rec
from l2rec.config import load_recipe, method_class
from l2rec.data.cold import hold_out_items
from l2rec.data.dataset import Dataset
from l2rec.errors import CheckpointError, ConfigError, DataError
from l2rec.methods.sasrec import SASRec
from l2rec.runs.folder import load_run_config
from l2rec.runs.train import train_run

QUICK = {"max_steps": 4}
OWN = '''
from l2rec.methods.sasrec import SASRec

class Mine(SASRec):
    """SASRec under another name."""
'''


@pytest.fixture(scope="module")
def fitted(one_thread: None, chains: Dataset, tmp_path_factory: pytest.TempPathFactory) -> L2Rec:
    run = tmp_path_factory.mktemp("runs") / "fitted"
    return L2Rec("sasrec", training=QUICK, out=run, progress=False).fit(chains)


def test_fit_is_the_training_of_the_command(fitted: L2Rec, chains: Dataset, tmp_path: Path) -> None:
    config = load_recipe("sasrec", ["training.max_steps=4"])
    report = train_run(config, chains.path, tmp_path / "run", progress=Quiet(), recipe="sasrec")
    assert_same_weights(fitted.run_, tmp_path / "run")
    assert fitted.report_["scores"] == report["scores"]
    assert fitted.report_["recipe"] == "sasrec"


def test_recommend_gives_each_user_what_the_predictor_does(fitted: L2Rec, chains: Dataset) -> None:
    found = fitted.recommend(k=5)
    assert found.columns == ["user_id", "item_id", "score", "rank"]
    assert found["user_id"].unique(maintain_order=True).to_list() == chains.user_ids.to_pylist()
    ids = chains.item_ids.to_pylist()
    for number in (0, 7, chains.n_users - 1):
        user = chains.user_ids[number].as_py()
        history = [ids[i] for i in chains.sequences[number]]
        expected = fitted.predictor_.recommend(history, 5).items
        rows = found.filter(pl.col("user_id") == user)
        assert rows["item_id"].to_list() == [item["id"] for item in expected]
        np.testing.assert_allclose(
            rows["score"], [i["score"] for i in expected], rtol=1e-5, atol=1e-6
        )
        assert rows["rank"].to_list() == [1, 2, 3, 4, 5]


def test_viewed_items_and_candidates(fitted: L2Rec, chains: Dataset) -> None:
    user, ids = chains.user_ids[0].as_py(), chains.item_ids.to_pylist()
    history = {ids[i] for i in chains.sequences[0]}
    everything = fitted.recommend([user], chains.n_items, filter_viewed=False)
    assert set(everything["item_id"]) == set(ids)
    unseen = fitted.recommend([user], chains.n_items)
    assert set(unseen["item_id"]) == set(ids) - history
    some = [*sorted(history)[:2], *sorted(set(ids) - history)[:3]]
    allowed = fitted.recommend([user], 10, items_to_recommend=some)
    assert set(allowed["item_id"]) == set(some[2:])
    assert allowed["rank"].to_list() == [1, 2, 3]
    order = [item for item in unseen["item_id"] if item in some]
    assert allowed["item_id"].to_list() == order


def test_cold_items_are_no_part_of_a_history(
    one_thread: None, chains: Dataset, tmp_path: Path
) -> None:
    cold = hold_out_items(chains.path, tmp_path / "cold", 0.25)
    model = L2Rec("sasrec", training=QUICK, progress=False).fit(cold)
    found = model.recommend(k=1)
    known = [user for user in range(cold.n_users) if len(cold.warm_items(user))]
    assert found["user_id"].to_list() == [cold.user_ids[user].as_py() for user in known]
    assert set(found["item_id"]) <= set(cold.warm_catalog["item_id"].to_pylist())


def test_numbers_stand_for_the_ids_they_are_written_as(one_thread: None, chains: Dataset) -> None:
    events = pl.DataFrame(
        {
            "user_id": np.repeat(np.arange(12), 4),
            "item_id": [100 + (user + step) % 7 for user in range(12) for step in range(4)],
            "timestamp": np.tile(np.arange(4), 12),
        }
    )
    dataset = Dataset.from_frames(events, progress=False)
    model = L2Rec("sasrec", training=QUICK, progress=False).fit(dataset)
    of_texts = model.recommend({"5": ["101", "105"]}, 3, items_to_recommend=["100", "102", "103"])
    numbers = np.array([101, 105])
    of_numbers = model.recommend({5: numbers}, 3, items_to_recommend=[100, 102, 103])  # type: ignore
    assert of_numbers.equals(of_texts)
    alone = model.predictor_.recommend(numbers, 3)  # type: ignore[arg-type]
    assert alone.items == model.predictor_.recommend(["101", "105"], 3).items
    with pytest.raises(DataError, match=r"unknown item ids: '1011'; did you mean '101'"):
        model.recommend({"new": [1011]})  # type: ignore[list-item]


def test_a_loaded_model_has_the_recipe_of_its_run(fitted: L2Rec) -> None:
    loaded = L2Rec.load(fitted.run_)
    assert loaded.config == fitted.config
    assert L2Rec(**loaded.get_params()).config == fitted.config


def test_a_loaded_model_has_the_start_and_the_data_set_of_its_run(
    fitted: L2Rec, chains: Dataset, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(chains.path, tmp_path / "data"))
    model = L2Rec("sasrec", training=QUICK, init=fitted.run_, out=tmp_path / "run", progress=False)
    model.fit(data)
    assert L2Rec.load(tmp_path / "run").get_params()["init"] == str(fitted.run_)
    data.rename(tmp_path / "moved")
    assert L2Rec.load(tmp_path / "run", tmp_path / "moved").recommend(k=2).height
    with pytest.raises(CheckpointError, match=r"give its folder with data$") as e:
        L2Rec.load(tmp_path / "run")
    one_line(e)


def test_histories_of_people_who_are_not_in_the_data(fitted: L2Rec) -> None:
    found = fitted.recommend({"new": ["i1", "i2"], "other": ["i3"]}, 2)
    assert found["user_id"].to_list() == ["new", "new", "other", "other"]
    expected = fitted.predictor_.recommend(["i1", "i2"], 2).items
    assert found["item_id"].to_list()[:2] == [item["id"] for item in expected]


def test_other_tables(fitted: L2Rec, chains: Dataset) -> None:
    user = chains.user_ids[3].as_py()
    ours = fitted.recommend([user], 3)
    pandas = fitted.recommend([user], 3, frame="pandas")
    assert type(pandas).__module__.startswith("pandas")
    assert list(pandas["item_id"]) == ours["item_id"].to_list()
    assert fitted.recommend([user], 3, frame="arrow").column_names == ours.columns
    seen = fitted.recommend({"u": ["i1"]}, 3, items_to_recommend=["i1"])
    assert seen.shape == (0, 4) and seen.schema["item_id"] == pl.String


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"users": ["nobody"]}, "user 'nobody' is not among the 40 users"),
        ({"users": {"u": []}}, "user 'u' has an empty history"),
        ({"users": {"u": ["x"]}}, "unknown item ids: 'x'"),
        ({"k": 0}, r"k=0: the catalog has 30 items; choose 1\.\.30"),
        ({"items_to_recommend": []}, "items_to_recommend is empty"),
        ({"items_to_recommend": ["x"]}, "unknown item ids: 'x'"),
        ({"frame": "spark"}, "frame='spark': choose polars, pandas or arrow"),
        ({"users": "u1"}, "users='u1': give a list of user ids"),
        ({"users": 3}, "users=3: give a list of user ids"),
        ({"users": {"u": None}}, "history=None: give a list of item ids"),
        ({"users": {"u": "i1"}}, "history='i1': give a list of item ids"),
        ({"items_to_recommend": "i1"}, "items_to_recommend='i1': give a list of item ids"),
        ({"k": 2.0}, "k=2.0 is no whole number"),
    ],
)
def test_what_cannot_be_recommended(
    fitted: L2Rec, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises((DataError, ConfigError), match=message) as e:
        fitted.recommend(**arguments)
    one_line(e)


def test_a_finished_run_is_loaded_again(fitted: L2Rec) -> None:
    again = L2Rec.load(fitted.run_)
    assert again.recommend(k=3).equals(fitted.recommend(k=3))
    assert again.report_ == fitted.report_


def test_keys_of_the_recipe_are_its_groups(tmp_path: Path) -> None:
    model = L2Rec(
        "l2rec-plus",
        model={"views": ["semantic"], "table_lr": 1e-05},
        backbone="org/name",
        split="tied-day",
        seed=7,
    )
    config = model.config
    assert config.model.views == ("semantic",) or list(config.model.views) == ["semantic"]
    assert (config.backbone.name, config.split.kind, config.seed) == ("org/name", "tied-day", 7)
    assert config.model.table_lr == 1e-05
    with pytest.raises(ConfigError, match=r"unknown key 'training.epoch'; did you mean 'epochs'"):
        _ = L2Rec("sasrec", training={"epoch": 1}).config
    with pytest.raises(ConfigError, match="give a dictionary of the recipe's keys"):
        _ = L2Rec("sasrec", model="big").config  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no recipe 'sasrek'; did you mean 'sasrec'"):
        _ = L2Rec("sasrek").config


def test_parameters_are_those_of_scikit_learn() -> None:
    model = L2Rec("sasrec", training=QUICK, seed=3)
    copy = clone(model)
    assert copy is not model and copy.get_params() == model.get_params()
    assert copy.set_params(seed=4).config.seed == 4
    with pytest.raises(ConfigError, match="L2Rec has no parameter 'sed'"):
        copy.set_params(sed=4)


def test_what_is_not_fitted_says_so(chains: Dataset, fitted: L2Rec) -> None:
    with pytest.raises(ConfigError, match=r"not fitted: call fit\(dataset\) first"):
        L2Rec("sasrec").recommend()
    with pytest.raises(CheckpointError, match="holds a run already; add resume=True to go on") as e:
        L2Rec("sasrec", out=fitted.run_, progress=False).fit(chains)
    assert "--" not in one_line(e)


def test_what_is_no_recipe_and_no_data_set_says_so(chains: Dataset, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: sasrec\nmodel: {dim: 8}\n")
    assert L2Rec(file).config == L2Rec(str(file)).config
    for recipe in (SASRec, 3, None):
        with pytest.raises(
            ConfigError, match=r"^recipe=.*: give a name or a file; a class is"
        ) as e:
            L2Rec(recipe).fit(chains)  # type: ignore[arg-type]
        one_line(e)
    for data in (pl.DataFrame({"user_id": ["u"]}), 3, None):
        with pytest.raises(
            DataError, match=r"l2rec\.Dataset\.from_frames makes one of tables"
        ) as d:
            L2Rec("sasrec", progress=False).fit(data)  # type: ignore[arg-type]
        one_line(d)


def test_a_file_of_a_run_is_no_run(fitted: L2Rec) -> None:
    for call in (l2rec.load, L2Rec.load):
        with pytest.raises(CheckpointError, match=r"model\.safetensors is not a run folder") as e:
            call(fitted.run_ / "model.safetensors")
        one_line(e)


def test_loading_draws_nothing(fitted: L2Rec) -> None:
    before = torch.get_rng_state()
    l2rec.load(fitted.run_)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_without_a_folder_goes_with_its_model(chains: Dataset) -> None:
    model = L2Rec("sasrec", training=QUICK, progress=False).fit(str(chains.path))
    run = model.run_
    assert (run / "report.json").is_file()
    del model
    assert not run.exists()


# -- a method of one's own -----------------------------------------------------------------------


def test_a_method_in_a_file_is_trained_and_loaded(
    chains: Dataset, fitted: L2Rec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    model = L2Rec("mine.py:Mine", training=QUICK | {"lr": 1e-3}, out="run", progress=False)
    model.fit(chains)
    monkeypatch.chdir("/")
    assert load_run_config(tmp_path / "run")[0].method == f"{tmp_path}/mine.py:Mine"
    again = l2rec.load(tmp_path / "run")
    assert type(again.model).__name__ == "Mine"
    assert again.recommend(["i1"], 3).items == model.predictor_.recommend(["i1"], 3).items
    with pytest.raises(ConfigError, match="put it into a package that others can install") as e:
        again.save_pretrained(tmp_path / "published")
    one_line(e)


def test_a_file_that_was_edited_is_read_again(chains: Dataset, tmp_path: Path) -> None:
    """Within a second, and to the same size: what is edited in a notebook is fitted at once."""
    file = tmp_path / "mine.py"
    model = L2Rec(f"{file}:Mine", training=QUICK, progress=False)
    for note in ("one", "two"):
        file.write_text(f"{OWN}    note = {note!r}\n")
        assert type(model.fit(chains).predictor_.model).note == note
    assert method_class(f"{file}:Mine") is method_class(f"{file}:Mine")


def test_a_recipe_names_a_file_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "mine.py").write_text(OWN)
    (folder / "mine.yaml").write_text(yaml.safe_dump({"method": "mine.py:Mine"}))
    (tmp_path / "other.yaml").write_text("extends: recipes/mine.yaml\nmodel: {dim: 8}\n")
    monkeypatch.chdir("/")
    for recipe in (folder / "mine.yaml", tmp_path / "other.yaml"):
        assert load_recipe(str(recipe)).method == f"{folder}/mine.py:Mine"
    with pytest.raises(ConfigError, match="unknown key 'dims'; did you mean 'dim'"):
        load_recipe(f"{folder}/mine.py:Mine", ["model.dims=8"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("class Mine:\n", "expected an indented block"),
        ("import nowhere_at_all", "No module named 'nowhere_at_all'"),
        ("x = undefined", "name 'undefined' is not defined"),
        ("x = 1", "has no attribute 'Mine'"),
        ("class Mine: pass", "is no method: it has no Config"),
    ],
)
def test_a_file_that_is_no_method(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ConfigError, match=reason) as e:
        load_recipe(f"{tmp_path}/mine.py:Mine")
    one_line(e)
    with pytest.raises(ConfigError, match="cannot be imported"):
        load_recipe(f"{tmp_path}/none.py:Mine")


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "polars", "pandas", "pyarrow", "huggingface_hub", "rich"}
    code = f"import sys, l2rec; print({heavy} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"


def test_loading_a_local_run_does_not_import_the_hub_client(sasrec_run: Path) -> None:
    code = (
        "import sys, l2rec; l2rec.load(sys.argv[1]).recommend(['i1'], 2); "
        "print({'huggingface_hub', 'httpx2', 'jinja2'} & set(sys.modules))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code, sasrec_run], capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "set()"
