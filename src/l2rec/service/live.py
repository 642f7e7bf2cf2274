"""What is live: the versions that are served, how one takes the place of another, and live.json.

    DIR/live.json   {"current": RUN, "previous": [RUN, ...], "shadow": RUN or null,
                     "weights": {RUN: hash}}

`l2rec deploy` and `l2rec rollback` write it whole or not at all; a server of DIR follows it. A
candidate is loaded and checked beside what is live and only then takes its place; one that fails is
refused, and what was live stays. No path comes from a request.
"""

from __future__ import annotations

__all__ = [
    "Deployment",
    "Live",
    "Version",
    "deploy",
    "end_shadow",
    "read_deployment",
    "rollback",
]

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from l2rec.disk import read_json, write_json
from l2rec.errors import CheckpointError, ConfigError
from l2rec.service.loading import check_version, load_version
from l2rec.service.version import Version

FILE = "live.json"
PREVIOUS = 10


@dataclass
class Live:
    """The versions that a server holds now.

    A request takes `current` (or `control`) once and keeps it to its end. All are exchanged in the
    event loop, in one assignment, so that no request sees half of a change.
    """

    version: Version
    """Serves everybody, or the treatment arm."""
    control: Version | None = None
    """Serves the control arm of the experiment, if another version than the live one does."""
    shadow: Version | None = None
    """Ranks what the live version does, for comparison, and serves nobody."""
    folder: Path | None = None
    """Where live.json lies."""
    refused: dict[str, Any] | None = None
    """The last candidate that was refused: run, reason, at (unix seconds)."""

    def current(self) -> Version:
        """The live version. Take it once."""
        return self.version

    def of_arm(self, arm: str | None) -> Version:
        """Who serves an arm of the experiment; without one, the live version."""
        return self.control if arm == "control" and self.control is not None else self.version

    def all(self) -> dict[str, Version]:
        """Whatever is held, by its role."""
        held: dict[str, Version | None] = {
            "live": self.version,
            "control": self.control,
            "shadow": self.shadow,
        }
        return {role: version for role, version in held.items() if version is not None}

    def swap(self, role: str, version: Version | None) -> None:
        """One version takes the place of another. ``role``: live, control or shadow."""
        if role == "live":
            assert version is not None
            self.version = version
        elif role == "control":
            self.control = version
        else:
            assert role == "shadow", role
            self.shadow = version

    def refuse(self, run: str, reason: str) -> None:
        """Remember a candidate that was not taken."""
        self.refused = {"run": run, "reason": reason, "at": time.time()}

    def status(self) -> dict[str, Any]:
        """What is held, for people: names, versions, times, the last refusal."""

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

        refused = self.refused and {**self.refused, "run": Path(self.refused["run"]).name}
        return {
            "live": shown(self.version),
            "control": shown(self.control),
            "shadow": shown(self.shadow),
            "refused": refused,
        }


# -- live.json -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deployment:
    """What live.json says. ``previous``: newest first. ``weights``: hash of each run's tensors
    when it was deployed.
    """

    current: Path
    previous: tuple[Path, ...] = ()
    shadow: Path | None = None
    weights: Mapping[str, str] = field(default_factory=dict)

    def expected(self, run: Path) -> str | None:
        """The hash that a run was deployed with."""
        return self.weights.get(str(run))


def read_deployment(folder: Path) -> Deployment:
    """live.json of a folder.

    Raises:
        CheckpointError: missing, torn, or not of this form.
    """
    path = folder / FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {FILE}; make it with: l2rec deploy RUN --to {folder}"
        )
    value = read_json(path)
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
            f'{path}: expected {{"current": RUN, "previous": [RUN, ...], "shadow": RUN or null}}'
        )
    assert isinstance(current, str)
    return Deployment(
        Path(current),
        tuple(Path(run) for run in previous),
        None if shadow is None else Path(shadow),
        weights,
    )


def _write(folder: Path, deployment: Deployment) -> Deployment:
    runs = [deployment.current, *deployment.previous]
    runs += [] if deployment.shadow is None else [deployment.shadow]
    known = deployment.weights
    weights = {str(run): known[str(run)] for run in runs if str(run) in known}
    deployment = replace(deployment, weights=weights)
    write_json(
        folder / FILE,
        {
            "current": str(deployment.current),
            "previous": [str(run) for run in deployment.previous],
            "shadow": None if deployment.shadow is None else str(deployment.shadow),
            "weights": weights,
        },
    )
    return deployment


def deploy(run: Path, folder: Path, *, shadow: bool = False) -> Deployment:
    """Check a run as a server would, then make it the current (or shadow) one of a folder.

    Raises:
        L2RecError: the run cannot be served; live.json is left as it is.
    """
    run = run.resolve()
    known = read_deployment(folder) if (folder / FILE).is_file() else None
    version = load_version(run)
    check_version(version)
    weights = {**({} if known is None else known.weights), str(run): version.version}
    if known is None:
        if shadow:
            raise ConfigError(
                f"{folder} has nothing that a shadow could be compared with; deploy a current "
                f"run first: l2rec deploy RUN --to {folder}"
            )
        return _write(folder, Deployment(run, weights=weights))
    if shadow:
        return _write(folder, Deployment(known.current, known.previous, run, weights))
    older = [known.current, *known.previous]
    previous = tuple(other for other in older if other != run)[:PREVIOUS]
    left = None if known.shadow == run else known.shadow
    return _write(folder, Deployment(run, previous, left, weights))


def rollback(folder: Path) -> Deployment:
    """Make the newest previous run of a folder the current one again.

    Raises:
        ConfigError: there is none. CheckpointError: it cannot be served any more.
    """
    known = read_deployment(folder)
    if not known.previous:
        raise ConfigError(f"{folder}: nothing was deployed before {known.current}")
    back, *older = known.previous
    check_version(load_version(back, expected=known.expected(back)))
    return _write(folder, Deployment(back, tuple(older), known.shadow, known.weights))


def end_shadow(run: Path, folder: Path) -> Deployment:
    """The run is no longer compared.

    Raises:
        ConfigError: it is not the shadow.
    """
    known = read_deployment(folder)
    if known.shadow != run.resolve():
        raise ConfigError(f"{run} is not the shadow of {folder}: {known.shadow or 'none'} is")
    return _write(folder, Deployment(known.current, known.previous, None, known.weights))
