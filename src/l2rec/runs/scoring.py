"""Scores on test, as reports hold them: by the run's own split, and tied-day where events tie."""

from __future__ import annotations

__all__ = ["Scores", "compared", "rank", "score", "summed_up"]

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from l2rec.data.dataset import Dataset
from l2rec.data.splits import Cases, Split
from l2rec.evaluation.ranking import Evaluation, evaluate
from l2rec.evaluation.ranks import protocol_of, write_ranks
from l2rec.evaluation.significance import paired_values_test
from l2rec.evaluation.tied_day import PROTOCOL as TIED_DAY
from l2rec.evaluation.tied_day import ranked_as_sets
from l2rec.protocols import Progress, Recommender
from l2rec.runs.folder import RANKS, TIED_RANKS, UserIds
from l2rec.runs.numbers import MAIN


@dataclass(frozen=True)
class Scores:
    """Evaluations on test: by the run's own split, and tied-day beside it (None without ties)."""

    own: Evaluation
    tied: Evaluation | None

    def write(self, run: Path, dataset: Dataset, split: Split) -> None:
        """Write the ranks of both into a run folder."""
        ids, fingerprint = UserIds(dataset), dataset.fingerprint
        protocol = protocol_of(split.protocol)
        write_ranks(run / RANKS, self.own, ids, fingerprint=fingerprint, protocol=protocol)
        if self.tied is not None:
            write_ranks(
                run / TIED_RANKS, self.tied, ids, fingerprint=fingerprint, protocol=TIED_DAY
            )


def score(recommender: Recommender, split: Split, sets: Cases | None, progress: Progress) -> Scores:
    """Rank the test cases, and the ``sets`` of `beside_leave_one_out`."""

    def ranked(cases: Cases) -> Evaluation:
        return rank(recommender, cases, progress)

    own = ranked(split.test)
    return Scores(own, None if sets is None else ranked_as_sets(own, split, sets, ranked))


def rank(recommender: Recommender, cases: Cases, progress: Progress) -> Evaluation:
    """Rank every target of the cases among all items."""
    return evaluate(
        recommender,
        cases.histories,
        cases.targets,
        users=cases.users,
        progress=lambda done: progress.validating(done, len(cases)),
    )


def compared(name: str, scores: Scores, floors: Mapping[str, Scores]) -> dict[str, Any]:
    """Return what a report says of a model and the floors: scores, and paired tests between them;
    under ``tied_day`` the same by that protocol, where there is one.
    """
    found = summed_up({name: scores, **floors})
    found["significance"] = _tests(scores.own, {f: each.own for f, each in floors.items()})
    if scores.tied is not None:
        tied = {f: each.tied for f, each in floors.items() if each.tied is not None}
        found["tied_day"]["significance"] = _tests(scores.tied, tied)
    return found


def summed_up(scores: Mapping[str, Scores]) -> dict[str, Any]:
    """Return the metrics of all that was scored, by name; under ``tied_day`` the same by that
    protocol, where there is one.
    """
    own = {name: each.own for name, each in scores.items()}
    tied = {name: each.tied for name, each in scores.items() if each.tied is not None}
    found = _metrics(own)
    if tied:
        of_sets = _metrics(tied)
        left_out = found["users_tested"] - of_sets["users_tested"]
        found["tied_day"] = {"protocol": TIED_DAY, "users_left_out": left_out, **of_sets}
    return found


def _metrics(evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Return scores by name, and how many users they are of: the same for all."""
    tested = len(next(iter(evaluations.values())))
    return {"users_tested": tested, "scores": {n: e.metrics() for n, e in evaluations.items()}}


def _tests(ours: Evaluation, floors: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Test a model against each floor; nothing where there is one user, whose difference has no
    variance.
    """
    if len(np.unique(ours.users)) < 2:
        return {}
    values = ours.values(MAIN)
    tests = {f: paired_values_test(values, e.values(MAIN), ours.users) for f, e in floors.items()}
    return {f: {"difference": t.difference, "p": t.p} for f, t in tests.items()}
