"""The search: what it finds and refuses, and that a kill changes nothing."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support import runs
from tests.support.errors import one_line

from l2rec.config import RunConfig, load_recipe
from l2rec.data.dataset import Dataset
from l2rec.errors import CheckpointError, ConfigError, TrainingError
from l2rec.runs import train as training
from l2rec.runs.loop import TrainingResult
from l2rec.studies import tune

SEARCH = ["training.lr=[1e-4, 1e-1, log]", "model.dim={choose: [8, 16]}", "model.inner=[8, 9]"]
FIXED = ["training.epochs=2", "model.max_items=6", "training.batch_users=16"]


def search(data: Path, out: Path, trials: int, **changes: Any) -> tune.Tuned:
    given: dict[str, Any] = {"overrides": FIXED, "search": SEARCH} | changes
    progress = given.pop("progress", runs.Quiet())
    recipe = given.pop("recipe", "sasrec")
    return tune.tune(recipe, data, out, trials=trials, progress=progress, **given)


def test_the_best_becomes_a_recipe(chains: Dataset, tmp_path: Path) -> None:
    found = search(chains.path, tmp_path / "s", 3)
    assert len(found.trials) == 3 and {t.state for t in found.trials} == {"epochs"}
    scores = [t.score for t in found.trials]
    assert None not in scores and scores == sorted(scores, reverse=True)
    best = found.trials[0].options
    assert best.keys() == {"training.lr", "model.dim", "model.inner"}
    assert 1e-4 <= best["training.lr"] <= 1e-1 and best["model.dim"] in (8, 16)
    config = load_recipe(str(found.recipe))
    assert config.training.lr == best["training.lr"] and config.model.dim == best["model.dim"]
    assert config.model.max_items == 6 and config.training.epochs == 2
    assert yaml.safe_load(found.recipe.read_text())["extends"] == "sasrec"
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["best.yaml", "study.db"]
    # Trained alone, it is what the search said it is.
    alone = training.validate_run(config, chains.path, tmp_path / "alone", progress=runs.Quiet())
    assert alone.valid["ndcg@10_masked"] == found.trials[0].score


def test_more_trials_go_on_with_what_is_there(chains: Dataset, tmp_path: Path) -> None:
    whole = search(chains.path, tmp_path / "whole", 3)
    search(chains.path, tmp_path / "parts", 1)
    progress = runs.Quiet()
    parts = search(chains.path, tmp_path / "parts", 3, progress=progress)
    assert [line[:12] for line in progress.lines if line.startswith("trial")] == [
        "trial 2 of 3",
        "trial 3 of 3",
    ]
    assert [(t.options, t.score) for t in parts.trials] == [
        (t.options, t.score) for t in whole.trials
    ]


def test_a_killed_trial_is_taken_up_again(
    chains: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = search(chains.path, tmp_path / "whole", 2)

    class Killed(BaseException):
        pass

    def killed(*arguments: Any, **named: Any) -> TrainingResult:
        asked = 0

        def until(score: float, number: int, done: float) -> bool:
            nonlocal asked
            asked += 1
            if asked == 2:
                raise Killed
            return bool(named["hopeless"](score, number, done))

        return training.validate_run(*arguments, **{**named, "hopeless": until})

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(tune, "validate_run", killed)
        search(chains.path, tmp_path / "cut", 2)
    assert len(list((tmp_path / "cut").glob("trial-*"))) == 1
    again = search(chains.path, tmp_path / "cut", 2)
    assert again.trials == whole.trials  # by number too, as the progress lines have it
    assert compared_at(tmp_path / "whole") == [[0, 1], [0, 1]]
    assert compared_at(tmp_path / "cut") == [[0], [1], [0, 1]]


def compared_at(out: Path) -> list[list[int]]:
    """Return the numbers of the validations at which each trial was compared with others."""
    import optuna

    study = optuna.load_study(study_name=None, storage=f"sqlite:///{out / 'study.db'}")
    return [sorted(trial.intermediate_values) for trial in study.trials]


def test_a_trial_that_trails_is_stopped(
    chains: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scripted trials, each worse than those before it from the first validation on: from the
    fourth on they are stopped, at a third of their 12 validations.
    """
    number = 0

    def scripted(*arguments: Any, hopeless: Any, **named: Any) -> TrainingResult:
        nonlocal number
        number += 1
        score = 0.9 - 0.1 * number
        stopped = next((at for at in range(12) if hopeless(score, at, (at + 1) / 12)), None)
        ended = "epochs" if stopped is None else f"pruned at {stopped}"
        return TrainingResult(1, 1, {"ndcg@10_masked": score}, {}, 0, 0, 0, ended)

    monkeypatch.setattr(tune, "validate_run", scripted)
    found = search(chains.path, tmp_path / "s", 8)
    assert [t.state for t in found.trials] == ["epochs"] * 3 + ["pruned at 3"] * 5


def test_a_training_that_fails_is_a_trial(
    chains: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nan(*arguments: Any, **named: Any) -> TrainingResult:
        raise TrainingError("the loss is NaN")

    with monkeypatch.context() as patch:
        patch.setattr(tune, "validate_run", nan)
        with pytest.raises(TrainingError, match="none of 2 trials succeeded; the last: the loss"):
            search(chains.path, tmp_path / "s", 2)
    found = search(chains.path, tmp_path / "s", 3)
    assert [t.state for t in found.trials] == ["epochs", "failed", "failed"]
    assert found.trials[1].score is None


def test_options_that_do_not_fit_together_are_a_trial_that_failed(
    chains: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two heads divide the ends of the space, and no odd width between them."""
    recipe = load_recipe("sasrec")

    def refused(config: RunConfig, *arguments: Any, **named: Any) -> TrainingResult:
        if config.model.dim == recipe.model.dim:
            raise ConfigError("a width that the model alone refuses")
        return TrainingResult(1, 1, {"ndcg@10_masked": 0.1}, {}, 0, 0, 0, "epochs")

    monkeypatch.setattr(tune, "validate_run", refused)
    progress = runs.Quiet()
    found = search(
        chains.path, tmp_path / "s", 4, search=["model.dim=[32, 128]"], progress=progress
    )
    assert len(found.trials) == 4
    for trial in found.trials:
        dim = trial.options["model.dim"]
        fails = dim % recipe.model.heads != 0 or dim == recipe.model.dim
        assert trial.state == ("failed" if fails else "epochs")
    said = " ".join(line for line in progress.lines if line.startswith("failed"))
    assert "heads=2 does not divide" in said and "the model alone refuses" in said


def test_no_misspelt_option_occupies_a_folder(
    chains: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = TrainingResult(1, 1, {"ndcg@10_masked": 0.1}, {}, 0, 0, 0, "epochs")
    monkeypatch.setattr(tune, "validate_run", lambda *arguments, **named: ended)
    with pytest.raises(ConfigError, match="lrr"):
        search(chains.path, tmp_path / "s", 1, search=["training.lrr=[1e-4, 1e-2, log]"])
    assert not (tmp_path / "s").exists()
    search(chains.path, tmp_path / "s", 1, search=["training.lr=[1e-4, 1e-2, log]"])


def test_a_recipe_that_changed_is_another_search(
    chains: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = TrainingResult(1, 1, {"ndcg@10_masked": 0.1}, {}, 0, 0, 0, "epochs")
    monkeypatch.setattr(tune, "validate_run", lambda *arguments, **named: ended)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("extends: sasrec\nmodel: {layers: 2}\n")
    search(chains.path, tmp_path / "s", 1, recipe=str(recipe))
    recipe.write_text("extends: sasrec\nmodel: {layers: 4}\n")
    with pytest.raises(CheckpointError, match=r"mine\.yaml as it was before its options") as error:
        search(chains.path, tmp_path / "s", 2, recipe=str(recipe))
    one_line(error)


def test_what_is_refused(chains: Dataset, tmp_path: Path) -> None:
    for one in ("model.dim", "model.dim=3", "model.dim=[3]", "a=[0, 1, lag]"):
        with pytest.raises(ConfigError, match="write key="):
            search(chains.path, tmp_path / "s", 1, search=[one])
    for one, says in (
        ("a=[1e-2, 1e-4, log]", r"low 0\.01 is above high 0\.0001; write the lower one first"),
        ("a=[3, 3]", "low 3 is equal to high 3"),
        ("a=[0, 1, log]", "low 0 has no logarithm"),
    ):
        with pytest.raises(ConfigError, match=says):
            search(chains.path, tmp_path / "s", 1, search=[one])
    for one in ("model.dim=[8, .inf]", "model.dim=[.nan, 8]"):
        with pytest.raises(ConfigError, match="write key="):
            search(chains.path, tmp_path / "s", 1, search=[one])
    for one in ("seed=[1, 4]", "split.kind={choose: [leave-one-out, time]}"):
        with pytest.raises(ConfigError, match="trials are compared on the same users"):
            search(chains.path, tmp_path / "s", 1, search=[one])
    with pytest.raises(ConfigError, match=r"model\.dim has a space already"):
        search(chains.path, tmp_path / "s", 1, search=["model.dim=[8, 9]", "model.dim=[8, 16]"])
    for seed in (-1, 2**32):
        with pytest.raises(ConfigError, match=rf"--seed {seed}: a whole number from 0") as error:
            search(chains.path, tmp_path / "s", 1, seed=seed)
        one_line(error)
    assert not (tmp_path / "s").exists()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "study.db").write_text("mine")
    with pytest.raises(CheckpointError, match=r"study\.db: not readable as a search") as torn:
        search(chains.path, tmp_path / "torn", 1)
    one_line(torn)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="file is a file; choose a folder"):
        search(chains.path, tmp_path / "file", 1)
    with pytest.raises(ConfigError, match="dimm"):
        search(chains.path, tmp_path / "s1", 1, search=["model.dimm=[8, 9]"])
    with pytest.raises(ConfigError, match="schedule"):  # no number
        search(chains.path, tmp_path / "s3", 1, search=["training.schedule=[1, 2]"])
    with pytest.raises(ConfigError, match="--trials 0"):
        search(chains.path, tmp_path / "s", 0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(CheckpointError, match="holds no search"):
        search(chains.path, tmp_path / "full", 1)
    search(chains.path, tmp_path / "s2", 1)
    with pytest.raises(CheckpointError, match="a search with overrides"):
        search(chains.path, tmp_path / "s2", 1, overrides=FIXED[:2])


@pytest.mark.skipif(sys.platform == "win32", reason="locks of POSIX")
def test_one_search_at_a_time(
    chains: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, refused = tmp_path / "s", []

    def during(*arguments: Any, **named: Any) -> TrainingResult:
        with pytest.raises(CheckpointError, match="another process is working on it") as error:
            search(chains.path, out, 1)
        refused.append(one_line(error))
        return training.validate_run(*arguments, **named)

    monkeypatch.setattr(tune, "validate_run", during)
    search(chains.path, out, 1)
    assert len(refused) == 1 and refused[0].startswith(f"{out}: ")
    assert sorted(p.name for p in out.iterdir()) == ["best.yaml", "study.db"]


def test_without_a_space_rate_and_dropout_are_searched_from_the_recipe_on(
    chains: Dataset, tmp_path: Path
) -> None:
    found = search(chains.path, tmp_path / "s", 2, search=[])
    first, second = (t.options for t in sorted(found.trials, key=lambda t: t.number))
    recipe = load_recipe("sasrec")
    lr = recipe.training.lr
    assert first == {"training.lr": lr, "model.dropout": recipe.model.dropout}
    assert second.keys() == first.keys() and second != first
    assert lr / 5 <= second["training.lr"] <= lr * 5
    assert json.dumps(second)


def test_of_the_recipe_what_the_spaces_hold(chains: Dataset, tmp_path: Path) -> None:
    """Its rate lies outside, its width and layers inside."""
    recipe = load_recipe("sasrec", FIXED)
    low = recipe.training.lr * 2
    spaces = [
        f"training.lr=[{low}, 1.0]",
        f"model.dim={{choose: [{recipe.model.dim}, 8]}}",
        "model.layers=[1, 9]",
    ]
    options = search(chains.path, tmp_path / "s", 1, search=spaces).trials[0].options
    assert options["training.lr"] >= low
    assert options["model.dim"] == recipe.model.dim
    assert options["model.layers"] == recipe.model.layers


def test_the_first_trials_cover_the_spaces(
    chains: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = TrainingResult(1, 1, {"ndcg@10_masked": 0.1}, {}, 0, 0, 0, "epochs")
    monkeypatch.setattr(tune, "validate_run", lambda *arguments, **named: ended)
    spaces = [
        "model.dropout=[0.0, 0.8]",
        "training.lr=[1e-4, 1.0, log]",
        "model.layers=[1, 4]",
        "model.inner=[1, 10000, log]",
        "model.dim={choose: [8, 16]}",
    ]
    found = search(chains.path, tmp_path / "s", tune.STARTUP, search=spaces)
    first = [t.options for t in sorted(found.trials, key=lambda t: t.number)][1:]
    assert sorted(int(t["model.dropout"] * 5) for t in first) == [0, 1, 2, 3]
    assert sorted(int(math.log10(t["training.lr"])) for t in first) == [-3, -2, -1, 0]
    assert sorted(t["model.layers"] for t in first) == [1, 2, 3, 4]
    assert sorted(t["model.dim"] for t in first) == [8, 8, 16, 16]
    assert all(1 <= t["model.inner"] <= 10000 for t in first)
    assert len({t["model.inner"] for t in first}) == 4
