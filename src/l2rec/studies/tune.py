"""Search for the options of a recipe on validation: `l2rec tune`.

A trial is a training with sampled options, judged as a training judges its steps: by validation
NDCG@10 over all users, the history masked; the test split is never used. The first trial is the
recipe itself, if the search spaces contain it, so a search ends no worse than it began. The next
ones cover the spaces evenly (a Sobol sequence); after that, options are sampled by TPE. A trial
that has a third of its steps behind it and is below the median of the others at the same validation
is stopped (Optuna's `TPESampler` and `MedianPruner`). Of a method with another recommender inside,
such as LLaRA's SASRec, the scores of the method itself count alone.

The folder holds the study (``study.db``), a folder for each trial while it runs, and ``best.yaml``,
a recipe. A search that was killed can be resumed: finished trials count, and the trial that was
running continues from its last checkpoint.
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
from l2rec.disk import LOCK, working_on, write_text
from l2rec.errors import BackboneError, CheckpointError, ConfigError, TrainingError
from l2rec.protocols import Progress
from l2rec.runs.loop import SELECT
from l2rec.runs.train import validate_run

if TYPE_CHECKING:
    import optuna

NAME = SELECT.replace("_", " ")
"""The objective, as it is printed."""
STUDY = "l2rec"
"""Name of the study in the database."""
REASON = "reason"
"""Attribute of a trial that failed: its error."""
STARTUP = 5
"""Number of trials before TPE samples."""
COMPARED = 3
"""Number of trials that must end before any trial is stopped."""
MOST_SEED = 2**31
"""Optuna takes 32 bits, and each trial is drawn by the seed and its number."""
WARMUP = 1 / 3
"""Share of its planned steps, or of its time, that a trial has before it can be stopped."""


@dataclass(frozen=True)
class Trial:
    """One trial of a search.

    ``number``: its place in the search, from 1. ``options``: the sampled values by option.
    ``score``: best validation NDCG@10, the history masked, None if it failed. ``state``: why its
    training ended.
    """

    number: int
    options: dict[str, Any]
    score: float | None
    state: str


@dataclass(frozen=True)
class Tuned:
    """The result of a search. ``trials``: best first. ``recipe``: file of the best trial.
    ``dataset``: identity of the data set.
    """

    trials: list[Trial]
    recipe: Path
    dataset: dict[str, Any]


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
    """Run trials until ``trials`` are finished, those of an earlier call included.

    Args:
        recipe, overrides: options that all trials share, as `load_recipe` takes them.
        data: data set folder.
        out: folder of the search; one that was interrupted is resumed.
        search: ``key=space``, a space being ``[low, high]``, ``[low, high, log]`` or
            ``{choose: [a, b]}``; by default the learning rate and the dropout of the recipe.
        seed: seed of the sampling; trials themselves are trained with the seed of the recipe.

    Raises:
        ConfigError: Optuna is not installed, or a space that cannot be read or is of no option.
        CheckpointError: the folder holds another search, or no search, or another process works
            on it.
        TrainingError: all trials failed.
    """
    try:
        import optuna
    except ImportError:
        raise ConfigError("l2rec tune needs Optuna: pip install 'l2rec[tune]'") from None
    if trials < 1:
        raise ConfigError(f"--trials {trials}: at least one")
    if not 0 <= seed <= MOST_SEED:
        raise ConfigError(f"--seed {seed}: a whole number from 0 to {MOST_SEED}")
    base = load_recipe(recipe, overrides)
    spaces = _spaces(search) if search else _default_spaces(base)
    _check_ends(recipe, overrides, spaces)
    dataset = open_dataset(data)
    about = {
        "recipe": recipe,
        "overrides": list(overrides),
        "options": base.model_dump(mode="json"),
        "search": spaces,
        "seed": seed,
        "data": dataset.fingerprint,
        "metric": SELECT,
    }
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with working_on(out):
        study = _study(out, about)
        first = [_recipe_values(base, spaces), *_even_points(spaces, STARTUP - 1, seed)]
        requeued = _requeue_interrupted(study)
        while (done := len(_ended_trials(study))) < trials:
            # Sampling depends on the finished trials alone, so a resumed search samples the same.
            if done < STARTUP and not requeued:
                study.enqueue_trial(first[done])
            requeued = False
            study.sampler = optuna.samplers.TPESampler(seed=seed + done, n_startup_trials=STARTUP)
            trial = study.ask()
            drawn = {key: _sample(trial, key, space) for key, space in spaces.items()}
            shown = ", ".join(f"{key}={value}" for key, value in drawn.items())
            progress.line(f"trial {done + 1} of {trials}: {shown}")
            options = [*overrides, *_assignments(drawn)]
            _run(study, trial, recipe, options, data, out / _folder(drawn), progress)
        ended = _ended_trials(study)
        if ended[0].score is None:
            raise TrainingError(f"none of {len(ended)} trials succeeded{_last_reason(study)}")
        return Tuned(ended, _write_best(out, recipe, overrides, ended[0]), dataset.identity)


def _run(
    study: optuna.Study,
    trial: optuna.Trial,
    recipe: str,
    overrides: Sequence[str],
    data: Path,
    folder: Path,
    progress: Progress,
) -> None:
    """Train one trial, report its score to the study and delete its folder.

    Options that do not fit together are a trial that failed, as a rate that is too high is: the
    search goes on with others.
    """
    import optuna

    resume = (folder / "config.yaml").is_file()

    def hopeless(score: float, number: int, done: float) -> bool:
        trial.report(score, number)
        return done >= WARMUP - 1e-9 and trial.should_prune()

    try:
        config = load_recipe(recipe, overrides)
        result = validate_run(
            config, data, folder, progress=progress, resume=resume, hopeless=hopeless
        )
    except (BackboneError, ConfigError, TrainingError) as error:
        progress.line(f"failed: {error}")
        trial.set_user_attr(REASON, str(error))
        trial.set_user_attr("stopped", "failed")
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
    else:
        trial.set_user_attr("stopped", result.stopped)
        study.tell(trial, result.valid[SELECT])
        progress.line(f"validation {NAME} {result.valid[SELECT]:.4f} ({result.stopped})")
    shutil.rmtree(folder, ignore_errors=True)


# -- spaces --------------------------------------------------------------------------------------


def _spaces(search: Sequence[str]) -> dict[str, Any]:
    """Parse ``key=space`` options.

    Raises:
        ConfigError: a space that cannot be read.
    """
    spaces: dict[str, Any] = {}
    for one in search:
        key, sep, text = one.partition("=")
        try:
            space = yaml.safe_load(text)
        except yaml.YAMLError:
            space = None
        if isinstance(space, list):
            space = [_number(value) for value in space]
        if isinstance(space, list) and _numbers(space[:2]) and space[2:] in ([], ["log"]):
            low, high = space[:2]
            if low >= high:
                raise ConfigError(
                    f"--search {one!r}: low {low} is {'above' if low > high else 'equal to'} "
                    f"high {high}; write the lower one first: {key}=[low, high]"
                )
            if space[2:] and low <= 0:
                raise ConfigError(
                    f"--search {one!r}: low {low} has no logarithm; choose one above 0, or leave "
                    f"out log"
                )
        if not sep or not _readable(space):
            raise ConfigError(
                f"--search {one!r}: write key=[low, high], key=[low, high, log] or "
                "key={choose: [a, b]}"
            )
        if key in spaces:
            raise ConfigError(f"--search {one!r}: {key} has a space already; give it one")
        if key == "seed" or key.split(".")[0] == "split":
            raise ConfigError(
                f"--search {one!r}: trials are compared on the same users and by their options; "
                f"give {key}=... to all of them"
            )
        spaces[key] = space
    return spaces


def _check_ends(recipe: str, overrides: Sequence[str], spaces: Mapping[str, Any]) -> None:
    """Refuse spaces of which neither the first values nor the last make a recipe, before there is
    a study of them: a misspelt option, or values of another kind.

    Raises:
        ConfigError: neither do.
    """
    errors = []
    for end in (0, -1):
        values = {
            key: (space["choose"] if isinstance(space, Mapping) else space[:2])[end]
            for key, space in spaces.items()
        }
        try:
            load_recipe(recipe, [*overrides, *_assignments(values)])
        except ConfigError as error:
            errors.append(error)
    if len(errors) == 2:
        raise errors[0]


def _number(value: Any) -> Any:
    """Convert numbers such as 1e-4 that YAML 1.1 reads as strings for want of a dot."""
    try:
        return float(value) if isinstance(value, str) and value != "log" else value
    except ValueError:
        return value


def _readable(space: Any) -> bool:
    """Check that a parsed value is a search space."""
    if isinstance(space, Mapping):
        choices = space.get("choose")
        return len(space) == 1 and isinstance(choices, list) and len(choices) > 0
    if not isinstance(space, list) or len(space) not in (2, 3) or space[2:] not in ([], ["log"]):
        return False
    return _numbers(space[:2])


def _numbers(bounds: list[Any]) -> bool:
    """Check that there are two bounds of a range, and that both are finite numbers."""
    return len(bounds) == 2 and all(
        type(value) in (int, float) and math.isfinite(value) for value in bounds
    )


def _default_spaces(base: RunConfig) -> dict[str, Any]:
    """Return spaces around the recipe's learning rate and, where it has one, its dropout."""
    lr = base.training.lr
    spaces: dict[str, Any] = {"training.lr": [lr / 5, lr * 5, "log"]}
    if "dropout" in type(base.model).model_fields:
        spaces["model.dropout"] = [0.0, 0.7]
    return spaces


def _recipe_values(base: RunConfig, spaces: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe's values, as Optuna stores them, of the keys whose space contains them."""
    values = base.model_dump(mode="json")
    inside: dict[str, Any] = {}
    for key, space in spaces.items():
        value: Any = values
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if isinstance(space, Mapping):
            if value in space["choose"]:
                inside[key] = json.dumps(value)
        elif isinstance(value, int | float) and space[0] <= value <= space[1]:
            inside[key] = value
    return inside


def _even_points(spaces: Mapping[str, Any], n: int, seed: int) -> list[dict[str, Any]]:
    """Return ``n`` points that cover the spaces evenly, as Optuna stores them.

    So few points drawn independently would leave gaps.
    """
    from scipy.stats import qmc

    sobol = qmc.Sobol(len(spaces), rng=np.random.default_rng(seed))
    places = sobol.random_base2(math.ceil(math.log2(n)))[:n]
    return [
        {key: _at(space, float(x)) for (key, space), x in zip(spaces.items(), place, strict=True)}
        for place in places
    ]


def _at(space: Any, share: float) -> Any:
    """Return the value at a share of a space; ``share``: from 0 to below 1."""
    if isinstance(space, Mapping):
        choices = space["choose"]
        return json.dumps(choices[int(share * len(choices))])
    low, high, *log = space
    if type(low) is int and type(high) is int and not log:
        return low + int(share * (high - low + 1))
    value = low * (high / low) ** share if log else low + share * (high - low)
    return round(value) if type(low) is int and type(high) is int else value


def _sample(trial: optuna.Trial, key: str, space: Any) -> Any:
    """Ask Optuna for a value of one option."""
    if isinstance(space, Mapping):
        # Optuna takes only scalars, so choices are passed as JSON text.
        texts = [json.dumps(choice) for choice in space["choose"]]
        return json.loads(str(trial.suggest_categorical(key, texts)))
    low, high, *log = space
    if type(low) is int and type(high) is int:
        return trial.suggest_int(key, low, high, log=bool(log))
    return trial.suggest_float(key, low, high, log=bool(log))


def _assignments(drawn: Mapping[str, Any]) -> list[str]:
    """Write sampled options as ``key=value`` overrides."""
    return [f"{key}={json.dumps(value)}" for key, value in drawn.items()]


def _folder(drawn: Mapping[str, Any]) -> str:
    """Name a trial's folder after its options, so that a resumed trial finds its checkpoint."""
    return "trial-" + hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()[:12]


# -- the study -----------------------------------------------------------------------------------


def _study(out: Path, about: Mapping[str, Any]) -> optuna.Study:
    """Open the study of an existing folder, or create it there.

    ``about``: everything that must be the same to resume a search.

    Raises:
        CheckpointError: the folder holds another search, or no search, or one that is torn.
    """
    import optuna
    from sqlalchemy.exc import DatabaseError  # optuna brings it

    others = [path for path in out.iterdir() if path.name != LOCK]
    if others and not (out / "study.db").is_file():
        raise CheckpointError(f"{out} is not empty and holds no search; choose another --out")
    try:
        study = optuna.create_study(
            study_name=STUDY,
            storage=f"sqlite:///{(out / 'study.db').resolve()}",
            direction="maximize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=COMPARED),
            load_if_exists=True,
        )
    except DatabaseError:
        raise CheckpointError(
            f"{out / 'study.db'}: not readable as a search; choose another --out"
        ) from None
    saved = study.user_attrs.get("about")
    if saved is None:
        study.set_user_attr("about", saved := dict(about))
    # A search of an earlier version did not keep all of it.
    key = next((key for key in saved if saved[key] != about[key]), None)
    if key == "options":
        raise CheckpointError(
            f"{out} holds a search of {about['recipe']} as it was before its options changed; "
            "choose another --out"
        )
    if key is not None:
        raise CheckpointError(
            f"{out} holds a search with {key} {saved[key]!r}, this is {about[key]!r}; choose "
            "another --out"
        )
    return study


def _requeue_interrupted(study: optuna.Study) -> bool:
    """Queue the trial that was running when the search was killed; say whether there was one."""
    import optuna

    waiting = bool(study.get_trials(states=(optuna.trial.TrialState.WAITING,)))
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        if trial.params:
            study.enqueue_trial(trial.params)
            waiting = True
    return waiting


def _ended_trials(study: optuna.Study) -> list[Trial]:
    """List trials that ended, failed trainings included, best first."""
    ended = (
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.state.is_finished() and "stopped" in trial.user_attrs
    )
    trials = [
        Trial(
            number,
            {k: json.loads(v) if isinstance(v, str) else v for k, v in trial.params.items()},
            trial.value,
            str(trial.user_attrs["stopped"]),
        )
        for number, trial in enumerate(ended, start=1)
    ]
    return sorted(trials, key=lambda trial: 1.0 if trial.score is None else -trial.score)


def _last_reason(study: optuna.Study) -> str:
    """Write why the last trial that failed did."""
    attributes = [trial.user_attrs for trial in study.get_trials(deepcopy=False)]
    reasons = [found[REASON] for found in attributes if REASON in found]
    return f"; the last: {reasons[-1]}" if reasons else ""


def _write_best(out: Path, recipe: str, overrides: Sequence[str], best: Trial) -> Path:
    """Write ``best.yaml``, a recipe that extends the one searched with the best options."""
    values = override_values([*overrides, *_assignments(best.options)])
    base = str(find_recipe(recipe).resolve()) if recipe.endswith((".yaml", ".yml")) else recipe
    path = out / "best.yaml"
    head = f"# The best of a search: validation {NAME} {best.score:.4f}.\n"
    write_text(path, head + yaml.safe_dump({"extends": base, **values}, sort_keys=False))
    return path
