"""Recipes, overrides, and errors that say what was meant."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from tests.support.errors import one_line
from tests.support.runs import Finished

from l2rec.config import (
    RunConfig,
    TrainingConfig,
    find_recipe,
    load_recipe,
    method_class,
    recipe_names,
    resolve,
)
from l2rec.errors import ConfigError
from l2rec.methods.l2rec import L2Rec, L2RecConfig
from l2rec.runs.folder import load_run_config

RECIPES = Path(str(resources.files("l2rec"))) / "recipes"
NAMES = recipe_names()
OWN = Path(__file__).parents[2] / "examples" / "own_method.py"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "my recipe.yaml"
    path.write_text("seed: 3\nmodel: {rank: 4}\ntraining: {lr: 2.0e-4}\n")
    return path


# ------------------------------------------------------------------------------- recipes


def test_a_bare_method_name_is_its_defaults() -> None:
    assert find_recipe("l2rec").name == "l2rec.yaml"
    config = load_recipe("l2rec")
    assert config.backbone.name == "Qwen/Qwen3-0.6B"
    assert config.model == L2RecConfig()
    assert config.training == TrainingConfig()


def test_a_file_holds_what_differs(recipe: Path) -> None:
    config = load_recipe(str(recipe))
    assert (config.seed, config.model.rank, config.training.lr) == (3, 4, 2e-4)
    assert config.model.alpha == L2RecConfig().alpha


def test_every_shipped_recipe_is_found() -> None:
    files = {p.relative_to(RECIPES).as_posix() for p in RECIPES.rglob("*.y*ml")}
    assert {f"{name}.yaml" for name in NAMES} == files


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_recipe_parses(name: str) -> None:
    path = find_recipe(name)
    assert path.is_file() and path.with_suffix("").as_posix().endswith(f"/recipes/{name}")
    config = load_recipe(name)
    assert isinstance(config.model, method_class(config.method).Config)
    assert load_recipe(str(path)) == config


def test_shipped_recipes_for_all_positions_never_run_out_of_tokens() -> None:
    """Else the length of later texts would decide what earlier positions still read."""
    models = {name: load_recipe(name).model for name in NAMES}
    needed = {
        name: (model.semantic_items * (model.item_tokens + 2), model.max_tokens)
        for name, model in models.items()
        if isinstance(model, L2RecConfig) and model.form == "catalog" and "semantic" in model.views
    }
    assert {"l2rec-plus", "scientific/l2rec-plus"} <= needed.keys()
    for name, (tokens, allowed) in needed.items():
        assert tokens <= allowed, name


def test_a_resolved_config_reads_back(tmp_path: Path) -> None:
    config = load_recipe("l2rec", ["model.form=catalog", "model.views=[behavioral]", "seed=7"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_recipe(str(path)) == config


# ------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("training.epochs=3", lambda c: c.training.epochs, 3),
        ("training.lr=1e-3", lambda c: c.training.lr, 1e-3),
        ("model.views=[behavioral]", lambda c: c.model.views, ("behavioral",)),
        ("model.adapt=false", lambda c: c.model.adapt, False),
        ("backbone.name=/a/b=c", lambda c: c.backbone.name, "/a/b=c"),
        ("training.max_steps=null", lambda c: c.training.max_steps, None),
        ("training.max_steps=None", lambda c: c.training.max_steps, None),
        ("backbone.revision=None", lambda c: c.backbone.revision, None),
        ('backbone.revision="1234567"', lambda c: c.backbone.revision, "1234567"),
        ("backbone.name='1e5'", lambda c: c.backbone.name, "1e5"),
        ("training.lr='1e-4'", lambda c: c.training.lr, 1e-4),
        ("seed=0", lambda c: c.seed, 0),
        ("method=l2rec.methods.l2rec:L2Rec", lambda c: method_class(c.method), L2Rec),
    ],
)
def test_overrides(recipe: Path, override: str, read: Any, expected: Any) -> None:
    assert read(load_recipe(str(recipe), [override])) == expected


def test_overrides_go_over_the_file_in_order(recipe: Path) -> None:
    config = load_recipe(str(recipe), ["model.rank=5", "model.rank=6", "model.top_n=1"])
    assert (config.model.rank, config.model.top_n, config.training.lr) == (6, 1, 2e-4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs", r"override 'epochs': write key=value, such as training\.epochs=3"),
        ("=3", "write key=value"),
        ("seed.deep=3", r"'seed' is not a group of keys"),
        ("model.views=[", "the value is not YAML"),
    ],
)
def test_bad_overrides(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(recipe), [override])


# ------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("override", "key", "offered"),
    [
        ("sede=1", "sede", "seed"),
        ("trainning.lr=1", "trainning", "training"),
        ("training.epoch=3", "training.epoch", "epochs"),
        ("backbone.nam=x", "backbone.nam", "name"),
        ("model.topn=2", "topn", "top_n"),
        ("model.matrice=[q]", "matrice", "matrices"),
    ],
)
def test_an_unknown_key_offers_the_nearest_and_names_the_override(
    recipe: Path, override: str, key: str, offered: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(recipe), [override])
    message = str(caught.value)
    assert f"{key}'; did you mean '{offered}'?" in message
    assert message.startswith(f"override {override!r}: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("override", "offered"),
    [
        ("max_steps=3", "training.max_steps"),
        ("name=x", "backbone.name"),
        ("rank=3", "model.rank"),
        ("model.lr=1", "training.lr"),
        ("training.rank=3", "model.rank"),
        ("training.seed=3", "seed"),
        ("model.seed=3", "seed"),
        ("top_nn=3", "model.top_n"),
    ],
)
def test_a_key_of_another_group_is_offered_there(recipe: Path, override: str, offered: str) -> None:
    with pytest.raises(ConfigError, match=f"; did you mean '{offered}'\\? `l2rec rec"):
        load_recipe(str(recipe), [override])


def test_an_error_names_the_file_or_the_override_that_it_comes_from(tmp_path: Path) -> None:
    base, good, child = tmp_path / "base.yaml", tmp_path / "good.yaml", tmp_path / "child.yaml"
    base.write_text("training: {epochs: 0}\n")
    good.write_text("training: {epochs: 1}\n")
    child.write_text("extends: " + json.dumps(str(base)) + "\nseed: 1\n")
    for overrides in ([], ["seed=2"]):
        with pytest.raises(ConfigError, match=r"^\S+/base\.yaml: training\.epochs=0"):
            load_recipe(str(child), overrides)
    assert load_recipe(str(child), ["training.epochs=2"]).training.epochs == 2
    child.write_text("extends: " + json.dumps(str(good)) + "\ntraining: {epochs: 0}\n")
    with pytest.raises(ConfigError, match=r"^\S+/child\.yaml: training\.epochs=0"):
        load_recipe(str(child))
    # Two overrides that need each other are not blamed for a third.
    together = ["model.text_dropout=0.1", "model.form=catalog", "training.epochs=0", "seed=3"]
    with pytest.raises(ConfigError, match=r"^override 'training\.epochs=0': training\.epochs=0"):
        load_recipe("l2rec", together)


def test_extends_is_looked_up_from_the_folder_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("seed: 5\n")
    child = tmp_path / "child.yaml"
    child.write_text("extends: base.yaml\n")
    assert load_recipe(str(child)).seed == 5
    child.write_text("extends: elsewhere.yaml\n")
    with pytest.raises(
        ConfigError, match=r"child\.yaml: extends='elsewhere\.yaml': .*no such file"
    ):
        load_recipe(str(child))
    child.write_text("extends: child.yaml\n")
    with pytest.raises(ConfigError, match="is no other recipe"):
        load_recipe(str(child))


def test_a_group_without_keys_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("seed: 3\ntraining:\n  # epochs: 5\nbackbone:\nmodel:\n")
    assert load_recipe(str(recipe)) == load_recipe("l2rec.methods.l2rec:L2Rec", ["seed=3"])


def test_the_config_of_a_run_is_a_recipe(catalog_run: Finished) -> None:
    config, _ = load_run_config(catalog_run.run)
    assert load_recipe(str(catalog_run.run / "config.yaml")) == config


@pytest.mark.parametrize(
    ("recipe", "override", "keys", "listed"),
    [
        ("l2rec-plus", "model.qqqqq=1", "model has form, views, ", "l2rec"),
        ("games/sasrec", "training.qqqqq=1", "training has epochs, max_steps, ", "sasrec"),
        ("sasrec", "qqqqq=1", "a recipe has method, seed, ", "sasrec"),
        (f"{OWN}:Fading", "model.qqqqq=1", "model has dim, max_items: ", f"{OWN}:Fading"),
    ],
)
def test_an_unknown_key_like_no_other_lists_those_of_its_group(
    recipe: str, override: str, keys: str, listed: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, [override])
    message = str(caught.value)
    assert f"'; {keys}" in message
    assert message.endswith(f": `l2rec recipes {listed}` says what each is")


def test_a_backbone_that_the_method_does_not_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"^override 'backbone\.name=x': backbone\.name changes nothing: SASRec reads no lang",
    ):
        load_recipe("sasrec", ["seed=1", "backbone.name=x", "training.epochs=1"])
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: sasrec\nbackbone: {dtype: float32}\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: backbone\.dtype changes nothing.*leave it"):
        load_recipe(str(mine))
    mine.write_text("extends: sasrec\nbackbone:\n")
    assert load_recipe(str(mine)) == load_recipe("sasrec")
    # As runs of earlier versions have it.
    config = load_recipe("sasrec").model_dump(mode="json")
    config["backbone"]["name"] = "zzz"
    mine.write_text(yaml.safe_dump({"run_version": 1, "config": config}))
    assert load_recipe(str(mine)) == load_recipe("sasrec")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epochs=0", r"training\.epochs=0: .*greater than or equal to 1"),
        ("training.lr=fast", r"training\.lr='fast'"),
        ("model.temperature=-1", "temperature=-1: .*greater than 0"),
        ("model.top_n=9", "top_n=9 exceeds view_experts=8"),
        ("model.supervision=all", "supervision=all is no option any more; train without it"),
        ("model.views=[]", "once each"),
        ("model.views=[semantic,semantic]", "once each"),
        ("model.views=[visual]", "visual"),
        ("model.item_tokens=1024", "item_tokens=1024 leaves no room"),
        ("model.text_dropout=0.1", "text_dropout needs form=catalog"),
        ("model.matrices=q", "matrices"),
        ("model=3", "model=3 is not a group of keys"),
        ("backbone.dtype=int8", r"backbone\.dtype='int8'"),
        ("method=l2rec.methods.nothing:X", "cannot be imported"),
        ("method=l2rec.methods.l2rec:X", "cannot be imported"),
        ("method=nonsense", "cannot be imported"),
    ],
)
def test_bad_values(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(str(recipe), [override])
    assert one_line(caught)


def test_unknown_recipes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no recipe 'l2rek'"):
        load_recipe("l2rek")
    with pytest.raises(ConfigError, match=r"no such file"):
        load_recipe(str(tmp_path / "none.yaml"))
    if NAMES:
        with pytest.raises(ConfigError, match=f"did you mean '{NAMES[0]}'"):
            load_recipe(NAMES[0][:-1])


@pytest.mark.parametrize("content", ["model: [", "- a\n- b\n", "seed", "\xff"])
def test_files_that_are_no_recipe(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(
        ConfigError, match=r"bad\.yaml: (not readable as YAML|a recipe is a mapping)"
    ):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("seed: 1\nmethod: sasrec\nseed: 2\n", r"'seed' stands there twice.* line 1"),
        (
            "model: {dim: 8}\ntraining: {lr: 1, epochs: 2, lr: 2}\n",
            r"'lr' stands there twice.* line 2",
        ),
        ("3: 4\n", "3 is no key of a recipe"),
    ],
)
def test_keys_are_words_and_stand_once(tmp_path: Path, content: str, says: str) -> None:
    """Of a key that stands twice, YAML would silently take the last."""
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=rf"bad\.yaml: .*{says}") as error:
        load_recipe(str(path))
    assert "\n" not in str(error.value)


def test_anchors_and_merges_of_yaml_are_read(tmp_path: Path) -> None:
    path = tmp_path / "merged.yaml"
    path.write_text("training: &usual {lr: 0.5, epochs: 2}\n")
    plain = load_recipe(str(path))
    path.write_text("training: {<<: {lr: 0.1, epochs: 2}, lr: 0.5}\n")
    assert load_recipe(str(path)) == plain


def test_an_empty_file_and_empty_groups_are_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    assert load_recipe(str(path)) == RunConfig()
    path.write_text("model:\n")
    assert load_recipe(str(path), ["model.rank=2"]).model.rank == 2


def test_configs_are_frozen() -> None:
    config = resolve({}, "here")
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.model.rank = 1
