"""The grid of an experiment: its cells, what stands of them, what the rest will take, and what a
budget leaves out.

A cell is a row on a data set with a seed, in a folder of its own:

    DIR/cells/DATASET/ROW-sSEED           a run folder, or a report and ranks made of other cells
    DIR/cells/DATASET@SPLIT/ROW-sSEED     where the experiment has several splits

Nothing is remembered beside the folders but the experiment's title, what failed and what was taken
(``state.json``), so a grid that was stopped goes on from what stands.
"""

from __future__ import annotations

__all__ = [
    "Cell",
    "Data",
    "LeftOut",
    "Plan",
    "Planned",
    "State",
    "below",
    "check_limits",
    "claim",
    "fitted",
    "look_at",
    "looked_again",
    "plan",
    "read_state",
    "seconds_of",
    "write_state",
]

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from l2rec.config import RunConfig, load_recipe, method_class, recipe_names
from l2rec.data.dataset import open_dataset
from l2rec.disk import LOCK, read_json, write_json
from l2rec.errors import CheckpointError, ConfigError, L2RecError
from l2rec.runs.folder import (
    MODEL,
    RANKS,
    finished_report,
    load_run_config,
    read_report,
    resumed_from,
)
from l2rec.runs.loop import SELECT
from l2rec.runs.numbers import as_duration
from l2rec.studies.experiment.definition import BLENDED, Experiment, Row, folder_of

STATE = "state.json"
CELLS = "cells"


class State(StrEnum):
    """What stands of a cell."""

    FINISHED = "finished"
    FOUND = "found elsewhere"
    """Finished in another folder, and to be taken from there."""
    BEGUN = "begun"
    MISSING = "missing"
    OTHER = "in the way"
    """Its folder holds something else, which is left as it is."""


@dataclass(frozen=True)
class Data:
    """A data set of the grid, as the command line named it."""

    name: str
    path: Path
    fingerprint: str
    events: int


@dataclass(frozen=True, eq=False)
class Cell:
    """One training, or one thing made of trainings. Two cells are never equal.

    line: name of the row, with its ending where it is the blend. seeds: one, or those averaged.
    config: what is trained; None for what is made of others. needs: cells it is made of.
    """

    row: Row
    line: str
    data: Data
    split: str
    seeds: tuple[int, ...]
    path: Path
    recipe: str = ""
    overrides: tuple[str, ...] = ()
    config: RunConfig | None = None
    needs: tuple[Cell, ...] = ()

    @property
    def grid(self) -> str:
        """Name of the data set and of the way it is split."""
        return f"{self.data.name}@{self.split}" if self.split else self.data.name

    @property
    def key(self) -> str:
        """Name of the cell: where it lies below ``cells``."""
        return f"{self.grid}/{self.path.name}"

    @property
    def blended(self) -> bool:
        """Whether it is the blend of another cell."""
        return self.line.endswith(BLENDED)

    @property
    def trained(self) -> list[RunConfig]:
        """What it trains or, made of others, what these do."""
        if self.config is not None:
            return [self.config]
        return [config for need in self.needs for config in need.trained]

    @property
    def arguments(self) -> list[str]:
        """Arguments of `l2rec` that make it, without ``--resume``."""
        data, out = ["--data", str(self.data.path)], ["--out", str(self.path)]
        if self.config is not None:
            init = [word for need in self.needs for word in ("--init", str(need.path))]
            seed = f"seed={self.seeds[0]}"
            return ["train", self.recipe, *data, *out, *init, *self.overrides, seed]
        bases = [str(need.path) for need in self.needs]
        if self.row.fusion is not None:
            fusion = self.row.fusion
            order = [] if fusion.dominant is None else ["--dominant", fusion.dominant]
            weight = ["--alpha", f"{fusion.alpha:g}", *order]
            return ["fusion", *bases, *weight, "--split", "test", *data, "--json"]
        return ["blend" if self.blended else "average", *bases, *out, *data]


@dataclass(frozen=True)
class Planned:
    """A cell, what stands of it and what it takes.

    seconds: measured of a finished cell, estimated of others, None if nothing is known. basis:
    what the estimate rests on. note: why a folder is in the way, or where a run was found.
    """

    cell: Cell
    state: State
    seconds: float | None
    basis: str
    note: str = ""

    @property
    def done(self) -> bool:
        """Whether nothing is left to do but perhaps to take it."""
        return self.state in (State.FINISHED, State.FOUND)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "row": self.cell.line,
            "data": self.cell.grid,
            "seeds": list(self.cell.seeds),
            "state": str(self.state),
            "minutes": None if self.seconds is None else round(self.seconds / 60, 1),
            "basis": self.basis,
            "note": self.note,
            "folder": str(self.cell.path),
        }


@dataclass(frozen=True)
class LeftOut:
    """A cell that is not run, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """The cells of an experiment in the order in which they are run.

    No cell stands before one that it is made of. left_out: from the least important on.
    """

    experiment: Experiment
    out: Path
    data: tuple[Data, ...]
    cells: tuple[Planned, ...]
    left_out: tuple[LeftOut, ...] = ()

    @property
    def unfinished(self) -> list[Planned]:
        """Return the cells that have to be run."""
        return [one for one in self.cells if one.state in (State.BEGUN, State.MISSING)]

    def summary(self) -> str:
        """Say how many cells are done, and what the others take as far as it is known."""
        if not self.cells:
            return "nothing is trained"
        states = [one.state for one in self.cells]
        counts = ", ".join(f"{states.count(state)} {state}" for state in State if state in states)
        known = [one.seconds for one in self.unfinished if one.seconds is not None]
        text = f"{len(states)} cells: {counts}"
        if known:
            text += f"; {len(known)} take about {as_duration(sum(known))}"
        if unknown := len(self.unfinished) - len(known):
            text += f"; the time of {unknown} is not known"
        return text

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "title": self.experiment.title,
            "cells": [one.to_json() for one in self.cells],
            "left_out": {one.key: one.reason for one in self.left_out},
        }


# -- planning ------------------------------------------------------------------------------------


def plan(
    experiment: Experiment,
    data: Sequence[Path],
    out: Path,
    *,
    source: Path | None = None,
    overrides: Sequence[str] = (),
    take: Path | None = None,
    seeds: int | None = None,
) -> Plan:
    """Lay out the cells of an experiment and look at what stands of them. Nothing is written.

    Args:
        data: data set folders.
        out: folder of the experiment.
        source: data set that rows with ``pretraining`` are trained on; without it, they and what
            starts from them are left out.
        overrides: ``key=value`` of all rows, after their own.
        take: folder of other runs, in which finished ones are looked for.
        seeds: the first so many of each row's seeds (or averages of seeds); None: all.

    Raises:
        ConfigError: a recipe or override that cannot be, no seed, or two data sets of one name.
        DataError: a data set that cannot be opened.
    """
    if any(override.startswith("seed=") for override in overrides):
        raise ConfigError("seeds are those of the experiment; leave the override seed= out")
    if seeds is not None and seeds < 1:
        raise ConfigError(f"--seeds {seeds}: one or more")
    sets = [_data(path) for path in data]
    names = [one.name for one in (*sets, *([] if source is None else [_data(source)]))]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two data sets are called {name!r}; give each once")
    start = None if source is None else _data(source)
    grid = _Grid(experiment, out, tuple(overrides), start, seeds)
    cells, left_out = grid.cells(sets)
    found = () if take is None else _runs_below(take)
    looked = [look_at(cell, found) for cell in cells]
    models = [run for run in found if not _numbers_alone(run.path)]
    needed = {base for one in looked if not one.done for base in one.cell.needs}
    looked = [look_at(one.cell, models) if one.cell in needed else one for one in looked]
    return Plan(experiment, out, tuple(sets), _estimated(looked), tuple(left_out))


def _data(path: Path) -> Data:
    dataset = open_dataset(path)
    return Data(dataset.name, path, dataset.fingerprint, dataset.n_events)


@dataclass
class _Grid:
    """What builds cells of: rows by name are built once for each data set, split and seeds."""

    experiment: Experiment
    out: Path
    overrides: tuple[str, ...]
    source: Data | None
    seeds: int | None
    built: dict[tuple[str, str, tuple[int, ...]], Cell] = field(default_factory=dict)
    configs: dict[tuple[str, str], tuple[str, tuple[str, ...], RunConfig]] = field(
        default_factory=dict
    )

    def cells(self, sets: Sequence[Data]) -> tuple[list[Cell], list[LeftOut]]:
        """Return all cells by importance: more seeds come after more data sets, and these after
        more rows; and those that are left out: without the ``source`` they need, or beyond the
        ``seeds`` that are wanted.
        """
        rows = self.experiment.ordered()
        places: dict[Cell, tuple[int, ...]] = {}
        left_out: list[LeftOut] = []
        beyond: list[Cell] = []
        for at_row, row in enumerate(rows):
            if row.pretraining:
                continue  # built for those that start from it
            if self.source is None and self._starts_from_source(row):
                left_out += [
                    LeftOut(f"{one.name}/{row.name}", "its start needs a data set: --source")
                    for one in sets
                ]
                continue
            for at_data, (data, split) in enumerate(self._grids(sets)):
                for at_seed, seeds in enumerate(self.experiment.groups_of(row)):
                    cell = self.cell(row, data, split, seeds)
                    if self.seeds is not None and at_seed >= self.seeds:
                        beyond += [cell, self._blend(cell)] if row.blend else [cell]
                        continue
                    places[cell] = (at_seed, at_data, at_row, 0)
                    if row.blend:
                        places[self._blend(cell)] = (at_seed, at_data, at_row, 1)
        for cell in list(places):  # a base is as important as the most important made of it
            for base in below(cell):
                places[base] = min(places.get(base, places[cell]), places[cell])
        left_out += [  # an average may need more seeds of a row than are wanted of it
            LeftOut(cell.key, f"--seeds {self.seeds}") for cell in beyond if cell not in places
        ]
        order = sorted(places, key=lambda cell: (places[cell], len(list(below(cell)))))
        return order, left_out

    def _grids(self, sets: Sequence[Data]) -> Iterator[tuple[Data, str]]:
        for data in sets:
            for split in self.experiment.splits or {"": ()}:
                yield data, split

    def _starts_from_source(self, row: Row) -> bool:
        rows = {one.name: one for one in self.experiment.rows}
        return row.pretraining or any(self._starts_from_source(rows[n]) for n in row.bases)

    def cell(self, row: Row, data: Data, split: str, seeds: tuple[int, ...]) -> Cell:
        """Build the cell of a row, and those it is made of."""
        if row.pretraining and self.source is not None:
            data, split = self.source, ""
        known = self.built.get((row.name, f"{data.name}@{split}", seeds))
        if known is not None:
            return known
        rows = {one.name: one for one in self.experiment.rows}
        needs = tuple(
            self.cell(rows[name], data, split, (seed,)) for name in row.bases for seed in seeds
        )
        cell = Cell(row, row.name, data, split, seeds, Path(), needs=needs)
        cell = replace(cell, path=self._folder(cell))
        if row.recipe is not None:
            recipe, overrides, config = self._config(row, data, split)
            config = config.model_copy(update={"seed": seeds[0]})
            cell = replace(cell, recipe=recipe, overrides=overrides, config=config)
        self.built[row.name, f"{data.name}@{split}", seeds] = cell
        return cell

    def _blend(self, cell: Cell) -> Cell:
        blend = replace(cell, line=cell.line + BLENDED, config=None, needs=(cell,))
        return replace(blend, path=self._folder(blend))

    def _folder(self, cell: Cell) -> Path:
        seeds = "+".join(map(str, cell.seeds))
        return self.out / CELLS / cell.grid / f"{folder_of(cell.line)}-s{seeds}"

    def _overrides(self, row: Row, recipe: str, split: str) -> tuple[str, ...]:
        """Return the overrides of a row: its own, and those of all rows that are for its method."""
        splits = self.experiment.splits.get(split, ())
        reads = method_class(load_recipe(recipe).method).uses_backbone

        def of_all(words: Sequence[str]) -> list[str]:
            return [word for word in words if reads or not word.startswith("backbone.")]

        shared, last = of_all(self.experiment.overrides), of_all(self.overrides)
        return (*shared, *row.overrides, *splits, *last)

    def _config(self, row: Row, data: Data, split: str) -> tuple[str, tuple[str, ...], RunConfig]:
        """Return the name of a row's recipe on a data set, its overrides, and what it is with them.

        Raises:
            ConfigError: it cannot be, by the name of the row.
        """
        at = (row.name, f"{data.name}@{split}")
        if at not in self.configs:
            recipe = self._recipe(row, data)
            try:
                overrides = self._overrides(row, recipe, split)
                self.configs[at] = recipe, overrides, load_recipe(recipe, overrides)
            except ConfigError as error:
                raise ConfigError(f"row {row.name!r}: {error}") from None
        return self.configs[at]

    def _recipe(self, row: Row, data: Data) -> str:
        if data.name in row.recipes:
            return row.recipes[data.name]
        recipe, shipped = str(row.recipe), recipe_names()
        owners = [data.name, self.experiment.recipes_of.get(data.name, data.name)]
        own = (f"{owner}/{recipe}" for owner in owners)
        return next((name for name in own if name in shipped), recipe)


def below(cell: Cell) -> Iterator[Cell]:
    """Yield all cells that a cell is made of."""
    for need in cell.needs:
        yield need
        yield from below(need)


# -- what stands ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """A finished run that was trained from no other, or a blend of one."""

    path: Path
    fingerprint: str
    config: RunConfig
    blended: bool


def _runs_below(folder: Path) -> list[_Run]:
    """Find the finished runs below a folder whose best step was chosen as now, also those of which
    the numbers alone were kept.

    Raises:
        ConfigError: there is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"--take {folder}: no such folder")
    found = []
    for path in sorted(folder.rglob("config.yaml")):
        try:
            config, identity = load_run_config(path.parent)
            if not _finished(path.parent) or identity.get("init") is not None:
                continue
            if resumed_from(identity):
                continue  # its config is that of its end
            report = read_report(path.parent)
        except L2RecError:
            continue
        if report.get("selected_by") == SELECT:
            of = identity["dataset"]["fingerprint"]
            found.append(_Run(path.parent, of, config, "blend" in report))
    return found


def _finished(run: Path) -> bool:
    return _numbers_alone(run) or finished_report(run) is not None


def _numbers_alone(run: Path) -> bool:
    """Check for what `results/collect.py` keeps of a finished run: scores and ranks, no model, of
    which nothing else can be made.
    """
    return (
        all((run / name).is_file() for name in ("report.json", RANKS))
        and not (run / MODEL).exists()
    )


def look_at(cell: Cell, found: Iterable[_Run] = ()) -> Planned:
    """Say what stands of a cell, in its folder or among the runs ``found``."""
    try:
        state, note = _state(cell)
        if state is State.FINISHED:
            return Planned(cell, state, seconds_of(read_report(cell.path)), "measured")
    except L2RecError as error:
        state, note = State.OTHER, str(error)
    trained = cell.needs[0] if cell.blended else cell
    if state is State.MISSING and trained.config is not None and not trained.needs:
        sought = cell.data.fingerprint, trained.config, cell.blended
        for run in found:
            if (run.fingerprint, run.config, run.blended) == sought:
                seconds = seconds_of(read_report(run.path))
                return Planned(cell, State.FOUND, seconds, "measured", str(run.path))
    return Planned(cell, state, None, "unknown", note)


def _state(cell: Cell) -> tuple[State, str]:
    """Look into the folder of a cell.

    Raises:
        CheckpointError: what is there cannot be read.
    """
    if cell.config is None and not cell.blended:
        if not (cell.path / "report.json").is_file():
            return State.MISSING, ""
        report = read_json(cell.path / "report.json")
        if _made_of(report) != _made_of(_recipe_of(cell)):
            return State.OTHER, "made of other runs, or with another weight"
        if report["dataset"]["fingerprint"] != cell.data.fingerprint:
            return State.OTHER, f"made on data {report['dataset']['fingerprint']}"
        for need in cell.needs:  # the report names folders, not what was in them
            if _state(need)[0] is not State.FINISHED:
                return State.OTHER, f"made of {need.key}, which is gone or another now"
        return State.FINISHED, ""
    if not (cell.path / "config.yaml").is_file():
        return State.MISSING, ""
    config, identity = load_run_config(cell.path)
    trained = cell.needs[0] if cell.blended else cell
    if identity["dataset"]["fingerprint"] != cell.data.fingerprint:
        return State.OTHER, f"a run on data {identity['dataset']['fingerprint']}"
    if config != trained.config:
        return State.OTHER, "a run of another recipe"
    if not _started_from(trained.needs, identity.get("init")):
        return State.OTHER, "a run with another start"
    if resumed_from(identity):
        return State.OTHER, "a run whose training options were changed when it was resumed"
    if cell.blended != ("blend" in identity):
        return State.OTHER, "blended" if "blend" in identity else "not blended"
    return (State.FINISHED if _finished(cell.path) else State.BEGUN), ""


def _started_from(needs: Sequence[Cell], init: str | None) -> bool:
    """Say whether a run's start, where it has one, is what the cell it needs is now."""
    if init is None or not needs:
        return init is None and not needs
    (need,) = needs
    start = Path(init)
    if not start.exists() and start.parts[-2:] == need.path.parts[-2:]:
        start = need.path  # folders may have moved
    if not (start / "config.yaml").is_file():
        return False
    config, identity = load_run_config(start)
    if resumed_from(identity):
        return False
    return (config, identity["dataset"]["fingerprint"]) == (need.config, need.data.fingerprint)


def _recipe_of(cell: Cell) -> dict[str, Any]:
    fusion = cell.row.fusion
    if fusion is not None:
        return {"fusion": {"alpha": fusion.alpha, "dominant": fusion.dominant}}
    return {"averaged": [str(need.path) for need in cell.needs]}


def _made_of(report: Mapping[str, Any]) -> Any:
    """Return what a report says of its making that has to be the same: folders may have moved."""
    return report.get("fusion") or [Path(path).name for path in report.get("averaged", ())]


def seconds_of(report: Mapping[str, Any]) -> float | None:
    """Return what a cell took: of a blend, the choice of its weights; None if it is not known."""
    if "blend" in report:
        return float(report.get("blend_seconds") or 0.0)
    if "averaged" in report or "fusion" in report:
        return float(report["wall_seconds"])
    work = sum(float(report.get(f"{what}_seconds") or 0.0) for what in ("training", "validation"))
    # A resumed run knows the wall time of its last part alone.
    return max(work, float(report.get("wall_seconds") or 0.0)) or None


def read_state(out: Path) -> dict[str, dict[str, str]]:
    """Read what failed and what was taken from where, by the key of the cell; and the title of the
    experiment.
    """
    path = out / STATE
    state = read_json(path) if path.is_file() else {}
    return {kind: dict(state.get(kind) or {}) for kind in ("experiment", "failed", "taken")}


def write_state(out: Path, state: Mapping[str, Mapping[str, str]]) -> None:
    """Write what `read_state` reads."""
    write_json(out / STATE, state)


def claim(planned: Plan) -> None:
    """Note in its folder which experiment it is of, the first time.

    Raises:
        CheckpointError: the folder holds a run, another study or another experiment, whose pages
            would be replaced.
    """
    out, title = planned.out, planned.experiment.title
    held = {path.name for path in out.iterdir()} if out.is_dir() else set()
    pages = {"report.md", "report.html"}  # an earlier version left no more of counted data sets
    if held - pages - {LOCK} and not held & {STATE, CELLS}:
        raise CheckpointError(f"{out} is not empty and holds no experiment; choose another --out")
    state = read_state(out)
    before = state["experiment"].setdefault("title", title)
    if before != title:
        raise CheckpointError(
            f"{out} holds the experiment {before!r}, this is {title!r}; choose another --out"
        )
    if state != read_state(out):
        write_state(out, state)


# -- what the rest takes -------------------------------------------------------------------------


def _estimated(cells: Iterable[Planned]) -> tuple[Planned, ...]:
    """Estimate what unfinished cells take: by the same row on the same data set with other seeds;
    else by the same row elsewhere and the number of events; else by its time limit.
    """
    cells = tuple(cells)
    known = [one for one in cells if one.done and one.seconds is not None]

    def estimate(one: Planned) -> Planned:
        if one.done or one.state is State.OTHER:
            return one
        cell = one.cell
        alike = [k for k in known if k.cell.line == cell.line]
        here = [k.seconds or 0.0 for k in alike if k.cell.grid == cell.grid]
        if here:
            return replace(one, seconds=sum(here) / len(here), basis="by its other seeds")
        there = [(k.seconds or 0.0) / k.cell.data.events * cell.data.events for k in alike]
        if there:
            names = ", ".join(dict.fromkeys(k.cell.grid for k in alike))
            basis = f"by {names} and the number of events"
            return replace(one, seconds=sum(there) / len(there), basis=basis)
        limit = None if cell.config is None else cell.config.training.max_minutes
        if limit is not None:
            return replace(one, seconds=limit * 60, basis="by its time limit")
        return replace(one, seconds=None, basis="unknown")

    return tuple(estimate(one) for one in cells)


def check_limits(jobs: int, hours: float | None) -> None:
    """Refuse what is no number of jobs, or no time.

    Raises:
        ConfigError: no job, or no hours.
    """
    if jobs < 1:
        raise ConfigError(f"--jobs {jobs}: one or more")
    if hours is not None and not hours > 0:  # not a number is not above it either
        raise ConfigError(f"--hours {hours:g}: a number above 0")


def fitted(planned: Plan, seconds: float, jobs: int = 1, busy: float = 0.0) -> Plan:
    """Leave out cells until the rest takes at most ``seconds`` of ``jobs`` at once: seeds go
    before data sets, data sets before rows, and rows that are compared go last. What takes longer
    than ``seconds`` by itself, or with what it is made of, is left out too. Of cells whose time is
    not known nothing is counted. ``busy``: seconds that the jobs need for what they have begun.
    """
    ends: dict[Cell, float] = {}  # at the earliest
    for one in planned.unfinished:  # no cell stands before one that it is made of
        begins = max((ends.get(need, 0.0) for need in one.cell.needs), default=0.0)
        ends[one.cell] = begins + (one.seconds or 0.0)
    late = {cell for cell, end in ends.items() if end > seconds}
    rest = busy + sum(one.seconds or 0.0 for one in planned.unfinished if one.cell not in late)
    kept = list(planned.cells)
    left_out = []
    for one in reversed(planned.unfinished):
        if one.cell not in late:
            if rest <= seconds * jobs:
                continue
            rest -= one.seconds or 0.0
        kept.remove(one)
        left_out.append(LeftOut(one.cell.key, "the budget ends before it"))
    return replace(planned, cells=tuple(kept), left_out=(*planned.left_out, *left_out))


def looked_again(planned: Plan) -> Plan:
    """Return the plan as it stands now: states and estimates anew."""
    return replace(planned, cells=_estimated(look_at(one.cell) for one in planned.cells))
