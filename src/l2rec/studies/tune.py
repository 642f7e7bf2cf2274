"""Search for the options of a recipe on validation: `l2rec tune`.

A trial is a training with drawn options, selected by validation NDCG@10 over all users; the test
split is never looked at. The first trial is the recipe as it is, where the spaces hold it: a search
ends no worse than it began. Some follow that cover the spaces evenly (a Sobol sequence), then
options are drawn by TPE, and a trial that stands below the median of the others at the same
validation is stopped (Optuna's `TPESampler` and `MedianPruner`).

The folder holds the study (``study.db``), a folder for each trial while it runs, and ``best.yaml``,
a recipe. A search that was killed goes on: with the finished trials as they are, and with the trial
that was running from its last checkpoint.
"""

from __future__ import annotations

__all__ = ["Trial", "Tuned", "tune"]

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from l2rec.config import RunConfig, find_recipe, load_recipe, override_values
from l2rec.data.dataset import open_dataset
from l2rec.disk import write_text
from l2rec.errors import CheckpointError, ConfigError, TrainingError
from l2rec.protocols import Progress
from l2rec.runs.train import validate_run

if TYPE_CHECKING:
    import optuna

STUDY = "l2rec"
STARTUP = 5
"""Trials before TPE, and finished before any is stopped."""


@dataclass(frozen=True)
class Trial:
    """``number``: its place in the search, from 1. ``options``: what was drawn. ``score``: best
    validation NDCG@10, None if it failed.
    """

    number: int
    options: dict[str, Any]
    score: float | None
    state: str


@dataclass(frozen=True)
class Tuned:
    """``trials``: best first. ``recipe``: the file of the best."""

    trials: list[Trial]
    recipe: Path


def tune(
    recipe: str,
    data: Path,
    out: Path,
    *,
    trials: int,
    progress: Progress,
    overrides: Sequence[str] = (),
    search: Sequence[str] = (),
    seed: int = 0,
) -> Tuned:
    """Finish ``trials`` trials, those of an earlier call included.

    Args:
        recipe, overrides: what all trials have in common, as `load_recipe` takes them.
        search: ``key=space``, a space being ``[low, high]``, ``[low, high, log]`` or
            ``{choose: [a, b]}``; by default the learning rate and the dropout of the recipe.
        seed: of what is drawn; trials themselves are trained with the seed of the recipe.

    Raises:
        ConfigError: Optuna is not installed, or a space cannot be read.
        CheckpointError: the folder holds the search of something else.
    """
    try:
        import optuna
    except ImportError:
        raise ConfigError("l2rec tune needs Optuna: pip install 'l2rec[tune]'") from None
    if trials < 1:
        raise ConfigError(f"--trials {trials}: at least one")
    base = load_recipe(recipe, overrides)
    spaces = _spaces(search) if search else _default_spaces(base)
    about = {
        "recipe": recipe,
        "overrides": list(overrides),
        "search": spaces,
        "seed": seed,
        "data": open_dataset(data).fingerprint,
    }
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = _study(out, about)
    first = [_own(base, spaces), *_even(spaces, STARTUP - 1, seed)]
    taken_up_again = _take_up_again(study)
    while (done := len(_told(study))) < trials:
        # What is drawn depends on what is finished alone, so that a killed search draws the same.
        if done < STARTUP and not taken_up_again:
            study.enqueue_trial(first[done])
        taken_up_again = False
        study.sampler = optuna.samplers.TPESampler(seed=seed + done, n_startup_trials=STARTUP)
        trial = study.ask()
        drawn = {key: _draw(trial, key, space) for key, space in spaces.items()}
        shown = ", ".join(f"{key}={value}" for key, value in drawn.items())
        progress.line(f"trial {done + 1} of {trials}: {shown}")
        config = load_recipe(recipe, [*overrides, *_assignments(drawn)])
        _run(study, trial, config, data, out / _folder(drawn), progress)
    found = _told(study)
    if found[0].score is None:
        raise TrainingError(f"none of {len(found)} trials came to an end")
    return Tuned(found, _write_best(out, recipe, overrides, found[0]))


def _run(
    study: optuna.Study,
    trial: optuna.Trial,
    config: RunConfig,
    data: Path,
    folder: Path,
    progress: Progress,
) -> None:
    """Train one trial and tell the study."""
    import optuna

    resume = (folder / "config.yaml").is_file()
    validations = _validations(folder)

    def hopeless(score: float) -> bool:
        nonlocal validations
        trial.report(score, validations)
        validations += 1
        return bool(trial.should_prune())

    try:
        result = validate_run(
            config, data, folder, progress=progress, resume=resume, hopeless=hopeless
        )
    except TrainingError as error:  # such as a learning rate too high
        progress.line(f"failed: {error}")
        trial.set_user_attr("stopped", "failed")
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
    else:
        trial.set_user_attr("stopped", result.stopped)
        study.tell(trial, result.valid["ndcg@10"])
        progress.line(f"validation ndcg@10 {result.valid['ndcg@10']:.4f} ({result.stopped})")
    shutil.rmtree(folder, ignore_errors=True)


# -- spaces --------------------------------------------------------------------------------------


def _spaces(search: Sequence[str]) -> dict[str, Any]:
    """``key=space`` by key."""
    spaces: dict[str, Any] = {}
    for one in search:
        key, sep, text = one.partition("=")
        try:
            space = yaml.safe_load(text)
        except yaml.YAMLError:
            space = None
        if isinstance(space, list):
            space = [_number(value) for value in space]
        if not sep or not _readable(space):
            raise ConfigError(
                f"--search {one!r}: write key=[low, high], key=[low, high, log] or "
                "key={choose: [a, b]}"
            )
        spaces[key] = space
    return spaces


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 (no dot) as a string; people who type it mean a number."""
    try:
        return float(value) if isinstance(value, str) and value != "log" else value
    except ValueError:
        return value


def _readable(space: Any) -> bool:
    if isinstance(space, Mapping):
        choices = space.get("choose")
        return len(space) == 1 and isinstance(choices, list) and len(choices) > 0
    if not isinstance(space, list) or len(space) not in (2, 3) or space[2:] not in ([], ["log"]):
        return False
    numbers = all(type(value) in (int, float) for value in space[:2])
    return numbers and space[0] < space[1] and (len(space) == 2 or space[0] > 0)


def _default_spaces(base: RunConfig) -> dict[str, Any]:
    """Around the recipe: what matters for every method."""
    lr = base.training.lr
    spaces: dict[str, Any] = {"training.lr": [lr / 5, lr * 5, "log"]}
    if "dropout" in type(base.model).model_fields:
        spaces["model.dropout"] = [0.0, 0.7]
    return spaces


def _own(base: RunConfig, spaces: Mapping[str, Any]) -> dict[str, Any]:
    """What the recipe itself has of each key, as Optuna keeps it; not what its space lacks."""
    values = base.model_dump(mode="json")
    own: dict[str, Any] = {}
    for key, space in spaces.items():
        value: Any = values
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if isinstance(space, Mapping):
            if value in space["choose"]:
                own[key] = json.dumps(value)
        elif isinstance(value, int | float) and space[0] <= value <= space[1]:
            own[key] = value
    return own


def _even(spaces: Mapping[str, Any], n: int, seed: int) -> list[dict[str, Any]]:
    """``n`` points that cover the spaces evenly, as Optuna keeps them: random ones of so small a
    number leave gaps.
    """
    from scipy.stats import qmc

    sobol = qmc.Sobol(len(spaces), rng=np.random.default_rng(seed))
    places = sobol.random_base2(math.ceil(math.log2(n)))[:n]
    return [
        {key: _at(space, float(x)) for (key, space), x in zip(spaces.items(), place, strict=True)}
        for place in places
    ]


def _at(space: Any, share: float) -> Any:
    """What lies at this share, from 0 to below 1, of a space."""
    if isinstance(space, Mapping):
        choices = space["choose"]
        return json.dumps(choices[int(share * len(choices))])
    low, high, *log = space
    if type(low) is int and type(high) is int and not log:
        return low + int(share * (high - low + 1))
    value = low * (high / low) ** share if log else low + share * (high - low)
    return round(value) if type(low) is int and type(high) is int else value


def _draw(trial: optuna.Trial, key: str, space: Any) -> Any:
    if isinstance(space, Mapping):
        # Optuna takes scalars alone; anything else is drawn by its text.
        texts = [json.dumps(choice) for choice in space["choose"]]
        return json.loads(str(trial.suggest_categorical(key, texts)))
    low, high, *log = space
    if type(low) is int and type(high) is int:
        return trial.suggest_int(key, low, high, log=bool(log))
    return trial.suggest_float(key, low, high, log=bool(log))


def _assignments(drawn: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in drawn.items()]


def _folder(drawn: Mapping[str, Any]) -> str:
    """A name that says what was drawn: a trial that is taken up again finds its own."""
    return "trial-" + hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()[:12]


# -- the study -----------------------------------------------------------------------------------


def _study(out: Path, about: Mapping[str, Any]) -> optuna.Study:
    import optuna

    if out.exists() and any(out.iterdir()) and not (out / "study.db").is_file():
        raise CheckpointError(f"{out} is not empty and holds no search; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name=STUDY,
        storage=f"sqlite:///{(out / 'study.db').resolve()}",
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=3),
        load_if_exists=True,
    )
    held = study.user_attrs.get("about")
    if held is None:
        study.set_user_attr("about", dict(about))
    elif held != about:
        key = next(key for key in about if held.get(key) != about[key])
        raise CheckpointError(
            f"{out} holds a search with {key} {held.get(key)!r}, this is {about[key]!r}; choose "
            "another --out"
        )
    return study


def _take_up_again(study: optuna.Study) -> bool:
    """A trial that was running when the search was killed is asked for again. Was there one?"""
    import optuna

    waiting = bool(study.get_trials(states=(optuna.trial.TrialState.WAITING,)))
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        if trial.params:
            study.enqueue_trial(trial.params)
            waiting = True
    return waiting


def _told(study: optuna.Study) -> list[Trial]:
    """Trials that came to an end, be it a failure of the training; best first."""
    ended = (
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.state.is_finished() and "stopped" in trial.user_attrs
    )
    found = [
        Trial(
            number,
            {k: json.loads(v) if isinstance(v, str) else v for k, v in trial.params.items()},
            trial.value,
            str(trial.user_attrs["stopped"]),
        )
        for number, trial in enumerate(ended, start=1)
    ]
    return sorted(found, key=lambda trial: 1.0 if trial.score is None else -trial.score)


def _validations(folder: Path) -> int:
    """How often a trial that is taken up again was validated before it was killed."""
    log = folder / "metrics.jsonl"
    return log.read_text(encoding="utf-8").count('"event": "valid"') if log.is_file() else 0


def _write_best(out: Path, recipe: str, overrides: Sequence[str], best: Trial) -> Path:
    """A recipe that extends the one searched."""
    values = override_values([*overrides, *_assignments(best.options)])
    base = str(find_recipe(recipe).resolve()) if recipe.endswith((".yaml", ".yml")) else recipe
    path = out / "best.yaml"
    head = f"# The best of a search: validation ndcg@10 {best.score:.4f}.\n"
    write_text(path, head + yaml.safe_dump({"extends": base, **values}, sort_keys=False))
    return path
