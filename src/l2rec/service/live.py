"""The versions that are live, their exchange, and live.json, which names them.

    DIR/live.json   {"current": RUN, "previous": [RUN, ...], "shadow": RUN or null,
                     "weights": {RUN: hash},
                     "steps": [{"at", "by", "action", "run", "version"}, ...]}   newest first

`l2rec deploy` and `l2rec rollback` write it whole or not at all, one after the other: each reads it
anew once the run is checked, which takes a while. A server of DIR follows it. A candidate is loaded
and checked beside the live version and only then takes its place; one that fails is refused, and
the live version stays. No path comes from a request.
"""

from __future__ import annotations

__all__ = [
    "Deployment",
    "Live",
    "Step",
    "Version",
    "by_name",
    "deploy",
    "end_shadow",
    "read_deployment",
    "rollback",
]

import getpass
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from l2rec.disk import locked, read_json, write_json
from l2rec.errors import CheckpointError, ConfigError, L2RecError
from l2rec.service.gains import gains
from l2rec.service.loading import check_version, load_version, read_served
from l2rec.service.version import Version

FILE = "live.json"
PREVIOUS = 10
"""Runs that can be rolled back to."""
STEPS = 50
"""Deployments and roll-backs that are remembered."""
Action = Literal["deploy", "rollback", "shadow", "end shadow"]


@dataclass
class Live:
    """The versions that a server has loaded.

    A request takes `current` (or `of_arm`) once and uses that version to its end. Versions are
    exchanged in the event loop, in one assignment, so that no request sees half of a change.
    """

    version: Version
    """Version that serves everybody, or the treatment arm."""
    control: Version | None = None
    """Version that serves the control arm of the experiment, if not the live one."""
    shadow: Version | None = None
    """Version that ranks the same requests for comparison, and serves nobody."""
    folder: Path | None = None
    """Folder of live.json."""
    refused: dict[str, Any] | None = None
    """The last candidate that was refused, until what is deployed is live: run, reason, at (unix
    seconds)."""

    def current(self) -> Version:
        """Return the live version; a request calls this once."""
        return self.version

    def of_arm(self, arm: str | None) -> Version:
        """Return the version that serves an arm; the live one without an arm."""
        return self.control if arm == "control" and self.control is not None else self.version

    def all(self) -> dict[str, Version]:
        """Return the loaded versions by role: live, control, shadow."""
        roles: dict[str, Version | None] = {
            "live": self.version,
            "control": self.control,
            "shadow": self.shadow,
        }
        return {role: version for role, version in roles.items() if version is not None}

    def swap(self, role: str, version: Version | None) -> None:
        """Put a version into a role: live, control or shadow."""
        if role == "live":
            assert version is not None
            self.version = version
        elif role == "control":
            self.control = version
        else:
            assert role == "shadow", role
            self.shadow = version

    def refuse(self, run: Path, reason: str) -> None:
        """Remember a candidate that was refused."""
        self.refused = {"run": run.name, "reason": by_name(reason, run), "at": time.time()}

    def status(self) -> dict[str, Any]:
        """Describe the versions for people: names, hashes, times, and the last refusal."""

        def shown(version: Version | None) -> dict[str, Any] | None:
            if version is None:
                return None
            return {
                "name": version.name,
                "version": version.version,
                "loaded_at": version.loaded_at,
                "items": len(version) - len(version.deleted),
                "index": None if version.index is None else version.index.kind,
                "method": version.report.get("method"),
            }

        return {
            "live": shown(self.version),
            "control": shown(self.control),
            "shadow": shown(self.shadow),
            "refused": self.refused,
        }


def by_name(text: str, *paths: Path) -> str:
    """Return a text with these paths by their names alone: whoever asks a server is not told where
    they lie.
    """
    for path in paths:
        if path.name:
            text = text.replace(str(path), path.name)
    return text


# -- live.json -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A change of what is served: when (unix seconds), by whom, what, and the run that it was
    about. version: hash of the run's tensors; None where it is not known.
    """

    at: float
    by: str
    action: Action
    run: str
    version: str | None


@dataclass(frozen=True)
class Deployment:
    """Content of live.json. ``previous``: newest first. ``weights``: hash of each run's tensors
    when it was deployed. ``steps``: newest first, at most `STEPS`; none of earlier versions.
    """

    current: Path
    previous: tuple[Path, ...] = ()
    shadow: Path | None = None
    weights: Mapping[str, str] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()

    def expected(self, run: Path) -> str | None:
        """Return the hash that a run was deployed with, if it is known."""
        return self.weights.get(str(run))


def read_deployment(folder: Path) -> Deployment:
    """Read live.json of a folder.

    Raises:
        CheckpointError: missing, torn, or not of this form.
    """
    path = folder / FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {FILE}; make it with: l2rec deploy RUN --to {folder}"
        )
    again = f"delete it, and name what is served again: l2rec deploy RUN --to {folder}"
    try:
        value = read_json(path)
    except L2RecError as error:
        raise CheckpointError(f"{error}; {again}") from error
    current, previous = value.get("current"), value.get("previous", [])
    shadow, weights = value.get("shadow"), value.get("weights", {})
    fits = (
        isinstance(current, str)
        and isinstance(previous, list)
        and all(isinstance(run, str) for run in previous)
        and (shadow is None or isinstance(shadow, str))
        and isinstance(weights, dict)
        and all(isinstance(text, str) for pair in weights.items() for text in pair)
    )
    if not fits:
        raise CheckpointError(
            f'{path}: expected {{"current": RUN, "previous": [RUN, ...], "shadow": RUN or null}}; '
            + again
        )
    assert isinstance(current, str)
    return Deployment(
        Path(current),
        tuple(Path(run) for run in previous),
        None if shadow is None else Path(shadow),
        weights,
        _steps(value.get("steps", []), f"{path}: steps: not a list of steps; {again}"),
    )


def _steps(value: Any, unlike: str) -> tuple[Step, ...]:
    """Read the steps.

    Raises:
        CheckpointError: ``unlike``, where they are not of the form of `Step`.
    """
    try:
        return tuple(TypeAdapter(list[Step]).validate_python(value))
    except ValidationError:
        raise CheckpointError(unlike) from None


def _write(
    folder: Path, deployment: Deployment, action: Action, run: Path, by: str | None
) -> Deployment:
    """Write live.json, and return the deployment with a step more, and without the hashes of runs
    that it no longer names.
    """
    step = Step(time.time(), by or _whoever(), action, str(run), deployment.expected(run))
    runs = [deployment.current, *deployment.previous]
    runs += [] if deployment.shadow is None else [deployment.shadow]
    known = deployment.weights
    weights = {str(run): known[str(run)] for run in runs if str(run) in known}
    steps = (step, *deployment.steps)[:STEPS]
    deployment = replace(deployment, weights=weights, steps=steps)
    write_json(
        folder / FILE,
        {
            "current": str(deployment.current),
            "previous": [str(run) for run in deployment.previous],
            "shadow": None if deployment.shadow is None else str(deployment.shadow),
            "weights": weights,
            "steps": [asdict(step) for step in steps],
        },
        remedy="free some space",
    )
    return deployment


def _whoever() -> str:
    """Name who runs this process, and where."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no such user, as in many containers
        user = f"user {os.getuid()}"
    return f"{user}@{platform.node()}"


def deploy(
    run: Path,
    folder: Path,
    *,
    shadow: bool = False,
    allow_loss: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Deployment:
    """Check a run as a server would, then make it the current (or shadow) one of a folder.

    Args:
        allow_loss: also deploy a run that lacks items of the current one.
        say: receives the items, users and events that are gained and lost, line by line.

    Raises:
        L2RecError: the run cannot be served, or its catalog has shrunk; live.json is left as it is.
    """
    run = run.resolve()
    if (folder / FILE).is_file():
        read_deployment(folder)  # one that is torn is said before the run is loaded
    elif shadow:
        raise ConfigError(
            f"{folder} has nothing that a shadow could be compared with; deploy a current run "
            f"first: l2rec deploy RUN --to {folder}"
        )
    version = load_version(run)
    check_version(version)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be made ({error.strerror}); choose another folder for --to"
        ) from error
    with locked(folder):
        return _deploy(run, version.version, folder, shadow, allow_loss, say)


def _deploy(
    run: Path,
    weights_hash: str,
    folder: Path,
    shadow: bool,
    allow_loss: bool,
    say: Callable[[str], None],
) -> Deployment:
    """Make a run that was checked the current (or shadow) one of a folder that is locked."""
    known = read_deployment(folder) if shadow or (folder / FILE).is_file() else None
    weights = {**({} if known is None else known.weights), str(run): weights_hash}
    if known is None:
        return _write(folder, Deployment(run, weights=weights), "deploy", run, None)
    if run != known.current:
        _check_gains(known.current, run, shadow or allow_loss, say)
    if shadow:
        if run == known.current and known.expected(run) not in (None, weights_hash):
            raise ConfigError(  # one hash stands for a folder: the live version would follow it
                f"{run} is what is served, and was trained anew; a shadow needs a folder of its own"
            )
        return _write(folder, replace(known, shadow=run, weights=weights), "shadow", run, None)
    older = [known.current, *known.previous]
    previous = tuple(other for other in older if other != run)[:PREVIOUS]
    left = None if known.shadow == run else known.shadow
    return _write(
        folder, Deployment(run, previous, left, weights, known.steps), "deploy", run, None
    )


def _check_gains(current: Path, run: Path, allow_loss: bool, say: Callable[[str], None]) -> None:
    """Tell what a run gains and loses against the current one.

    Raises:
        CheckpointError: it has lost items, and ``allow_loss`` is not given.
    """
    try:
        found = gains(current, run)
    except L2RecError as error:
        say(f"not compared with {current}, which cannot be read: {error}")
        return
    for line in found.lines():
        say(line)
    if found.lost and not allow_loss:
        raise CheckpointError(
            f"{run} lacks {len(found.lost):,} items of {current} (such as {found.lost[0]!r}), "
            "which would no longer be recommended; prepare its data with all items (an event log: "
            "--after the data set before it, or --items its catalog), or deploy with --allow-loss"
        )


def rollback(
    folder: Path,
    *,
    leaving: tuple[str, str | None] | None = None,
    by: str | None = None,
    check: bool = True,
) -> Deployment:
    """Make the newest previous run of a folder the current one again.

    Args:
        leaving: name and hash of the run that is expected to be the current one; any by default.
        by: who does it; by default who runs this process.
        check: load the run first; otherwise its files are read. A server of the folder loads it
            anyway, and refuses a bad one.

    Raises:
        ConfigError: there is no previous run, or another one is the current one, or is meanwhile.
        CheckpointError: it can no longer be served.
    """
    known = read_deployment(folder)
    current = (known.current.name, known.expected(known.current))
    if leaving is not None and leaving != current:
        raise ConfigError(
            f"{leaving[0]} (version {leaving[1]}) is no longer what is deployed, {current[0]} "
            f"(version {current[1]}) is: look again"
        )
    if not known.previous:
        raise ConfigError(f"{folder}: nothing was deployed before {known.current}")
    run, *older = known.previous
    if check:
        check_version(load_version(run, expected=known.expected(run)))
    elif not run.is_dir():
        raise CheckpointError(f"{run} was served before {known.current}, and is no longer there")
    else:
        read_served(run, known.expected(run))
    with locked(folder):
        now = read_deployment(folder)
        if (now.current, now.previous) != (known.current, known.previous):
            raise ConfigError(
                f"{folder}: {now.current} was made the current run meanwhile; look again, and roll "
                "back if you still want to"
            )
        return _write(folder, replace(now, current=run, previous=tuple(older)), "rollback", run, by)


def end_shadow(run: Path, folder: Path) -> Deployment:
    """Stop comparing the run that is the shadow of a folder.

    Raises:
        ConfigError: the run is not the shadow.
    """
    read_deployment(folder)  # only a folder that is there can be locked
    with locked(folder):
        known = read_deployment(folder)
        if known.shadow != run.resolve():
            raise ConfigError(f"{run} is not the shadow of {folder}: {known.shadow or 'none'} is")
        assert known.shadow is not None
        return _write(folder, replace(known, shadow=None), "end shadow", known.shadow, None)
