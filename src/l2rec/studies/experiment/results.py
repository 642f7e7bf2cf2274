"""What the finished cells of an experiment say: scores over seeds, and the named comparisons."""

from __future__ import annotations

__all__ = ["Compared", "Done", "Results", "compared", "part_of", "read_results", "score_of"]

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from l2rec.data.dataset import open_dataset
from l2rec.errors import DataError, L2RecError
from l2rec.evaluation.ranks import Ranks, aligned, read_ranks
from l2rec.evaluation.significance import SeededTest, holm, seeded_test
from l2rec.runs.folder import RANKS, read_report
from l2rec.runs.machine import without_threads
from l2rec.runs.remarks import is_leaky
from l2rec.runs.scoring import PARTS, is_part
from l2rec.studies.compare import Score, over_seeds, ranked_users
from l2rec.studies.experiment.definition import MASKED, Comparison
from l2rec.studies.experiment.plan import Cell, Plan, State, below, read_state

NO_COLD = "no item is cold: l2rec cold makes such data"
"""Why a comparison on cold or warm targets has no result."""


@dataclass(frozen=True)
class Done:
    """A finished cell: its report, and its ranks if it has any.

    part: cold or warm, where it stands for these targets alone.
    """

    cell: Cell
    report: Mapping[str, Any]
    ranks: Ranks | None
    part: str = ""

    @property
    def scores(self) -> Mapping[str, Mapping[str, float]]:
        """Test scores of the method and of what needs no training, by name."""
        of_part: Mapping[str, Any] = self.report["parts"][self.part] if self.part else self.report
        return of_part["scores"]  # type: ignore[no-any-return]

    @property
    def is_leaky(self) -> bool:
        """Whether what it was trained on has held-out items."""
        return is_leaky(self.cell.trained)

    def score(self, metric: str) -> float | None:
        """Return its test score; None if it has none of this metric."""
        value = self.scores[self.report["method"]].get(metric)
        return None if value is None else float(value)

    def of_targets(self, part: str) -> Done:
        """Return it as of cold or of warm targets alone."""
        ranks = self.ranks
        if ranks is not None and ranks.warm is not None:
            ranks = ranks.of_targets(is_part(part, ranks.targets, ranks.warm))
        return Done(self.cell, self.report, ranks, part)


Ranked = tuple[list[str], npt.NDArray[np.int64]]
"""Users whose ranks are stored, and their targets."""
Results = Mapping[str, Mapping[str, Sequence[Done]]]
"""Finished cells by data set (and split), and by row."""


def read_results(planned: Plan) -> Results:
    """Read the finished cells of a plan that belong into tables, in the order of the rows; of data
    with cold items, cold and warm targets also apart.
    """
    found: dict[str, dict[str, list[Done]]] = {}
    ranked: dict[str, Ranked] = {}
    lines = [n for row in planned.experiment.rows for n in planned.experiment.lines_of(row)]
    standing = [one.cell for one in planned.cells if one.state is State.FINISHED]
    for cell in sorted(standing, key=lambda cell: (lines.index(cell.line), cell.seeds)):
        if not cell.row.pretraining:
            by_line = found.setdefault(cell.grid, {})
            by_line.setdefault(cell.line, []).append(_read(cell, ranked))
    order = list(dict.fromkeys(one.cell.grid for one in planned.cells))
    results: dict[str, dict[str, list[Done]]] = {}
    for grid in (grid for grid in order if grid in found):
        results[grid] = found[grid]
        apart = {n: [d for d in done if "parts" in d.report] for n, done in found[grid].items()}
        for part in PARTS:
            if any(apart.values()):
                results[part_of(grid, part)] = {
                    n: [one.of_targets(part) for one in done] for n, done in apart.items() if done
                }
    return results


def part_of(grid: str, targets: str) -> str:
    """Return the name of a grid's results on all targets, or on the cold or warm ones alone."""
    return grid if targets in ("", "all") else f"{grid}, {targets} targets"


def _read(cell: Cell, ranked: dict[str, Ranked]) -> Done:
    """Read a cell. ``ranked``: users whose ranks were kept without them, by data and split."""
    trained = cell.needs[0] if cell.blended else cell

    def everyone() -> Ranked:
        assert trained.config is not None  # an average keeps whose ranks it has
        key = f"{cell.data.path} {trained.config.split}"
        if key not in ranked:
            ranked[key] = ranked_users(trained.config, open_dataset(cell.data.path))
        return ranked[key]

    path = cell.path / RANKS
    ranks = read_ranks(path, everyone) if path.is_file() else None
    return Done(cell, read_report(cell.path), ranks)


def score_of(done: Sequence[Done], metric: str) -> Score | None:
    """Compute mean and standard deviation over seeds; None if a cell lacks the metric."""
    scores = [one.score(metric) for one in done]
    known = [score for score in scores if score is not None]
    return over_seeds(known) if known and len(known) == len(scores) else None


@dataclass(frozen=True)
class Compared:
    """A named comparison on one data set.

    test: None where a side is not there or they cannot be paired; without a p where a side has one
    seed, or they were not trained on one machine. p_holm: p, adjusted for all tests of the
    experiment. seeds: of either side. notes: what to know when reading it.
    """

    comparison: Comparison
    grid: str
    seeds: tuple[int, int]
    test: SeededTest | None
    p_holm: float | None
    notes: tuple[str, ...]


def compared(planned: Plan, results: Results) -> list[Compared]:
    """Test every comparison of the experiment on every data set; adjust all p by Holm's method.

    Only runs of several seeds on both sides have a p: the users of one run cannot say what another
    seed would do. Nor have runs of several machines: what differs may be the machines.
    """
    taken = read_state(planned.out)["taken"]
    found = [
        _compared(comparison, name, results.get(name, {}), taken)
        for grid in dict.fromkeys(one.cell.grid for one in _cells(results))
        for comparison in planned.experiment.comparisons
        for name in [part_of(grid, comparison.targets)]
    ]
    tested = [one for one in found if one.test is not None and one.test.p is not None]
    ps = [one.test.p for one in tested if one.test is not None and one.test.p is not None]
    adjusted = {id(one): p for one, p in zip(tested, holm(ps), strict=True)}
    return [
        Compared(o.comparison, o.grid, o.seeds, o.test, adjusted.get(id(o)), o.notes) for o in found
    ]


def _cells(results: Results) -> Iterator[Done]:
    return (one for lines in results.values() for done in lines.values() for one in done)


def _compared(
    comparison: Comparison,
    grid: str,
    by_line: Mapping[str, Sequence[Done]],
    taken: Collection[str] = (),
) -> Compared:
    """Test one comparison; ``taken``: keys of cells that were taken from elsewhere."""
    sides = [by_line.get(name, ()) for name in (comparison.a, comparison.b)]
    seeds = (len(sides[0]), len(sides[1]))
    missing = [n for n, side in zip((comparison.a, comparison.b), sides, strict=True) if not side]
    if missing:
        why = f"{missing[0]} has no result" if by_line else NO_COLD
        return Compared(comparison, grid, seeds, None, None, (why,))
    try:
        first, values = _values(comparison.metric, sides)
        users = np.unique(first.users, return_inverse=True)[1]
        test = seeded_test(values[0], values[1], users)
    except L2RecError as error:
        return Compared(comparison, grid, seeds, None, None, (str(error),))
    if len(_machines(sides)) > 1 or _leaky(sides):
        test = replace(test, p=None)
    return Compared(comparison, grid, seeds, test, None, tuple(_notes(sides, taken)))


def _values(
    metric: str, sides: Sequence[Sequence[Done]]
) -> tuple[Ranks, list[npt.NDArray[np.float64]]]:
    """Return what each user adds to a metric, [S, M] of either side, users in one order.

    Raises:
        DataError: they did not rank the same users, or there are no ranks.
    """
    ranks = [[one.ranks for one in side] for side in sides]
    first = ranks[0][0]
    if first is None:
        raise DataError("no ranks of users are stored")
    name, masked = metric.removesuffix(MASKED), metric.endswith(MASKED)
    values = []
    for side in ranks:
        rows = []
        for one in side:
            if one is None:
                raise DataError("no ranks of users are stored")
            rows.append(aligned(first, one).values(name, masked=masked))
        values.append(np.stack(rows))
    return first, values


def _machines(sides: Sequence[Sequence[Done]]) -> set[str]:
    """Return the machines of all runs; the number of threads is no part of one."""
    return {without_threads(str(one.report.get("hardware"))) for side in sides for one in side}


def _leaky(sides: Sequence[Sequence[Done]]) -> bool:
    return any(one.is_leaky for side in sides for one in side)


def _notes(sides: Sequence[Sequence[Done]], taken: Collection[str]) -> list[str]:
    notes = []
    if min(map(len, sides)) < 2:
        notes.append("one seed on a side: no p, as what another seed would do is not known")
    made_of = [{run for one in side for run in (one.cell, *below(one.cell))} for side in sides]
    if made_of[0] & made_of[1]:
        notes.append(
            "the sides share runs, and p takes them for independent: it is too large if anything"
        )
    if _leaky(sides):
        notes.append("no p, as a side is leaky: it was given held-out items")
    machines = [sorted({str(one.report.get("hardware")) for one in side}) for side in sides]
    if machines[0] != machines[1] or len(machines[0]) > 1:
        both = " / ".join(", ".join(of_side) for of_side in machines)
        one = len(_machines(sides)) == 1
        what = "with other numbers of threads" if one else "no p, as not of one machine"
        notes.append(f"{what}: {both}")
    commits = {
        one.cell.key: str((one.report.get("versions") or {}).get("commit", "unknown"))
        for side in sides
        for one in side
    }
    if len(set(commits.values())) > 1:
        notes.append(f"of several commits: {', '.join(sorted(set(commits.values())))}")
        notes += [f"{key} taken, of commit {commits[key]}" for key in commits if key in taken]
    return notes
