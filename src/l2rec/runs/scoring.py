"""Scores on test, as reports hold them: by the run's own split, and tied-day where events tie."""

from __future__ import annotations

__all__ = ["Scores", "compared", "rank", "score"]

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
    found = _tested(name, scores.own, {floor: each.own for floor, each in floors.items()})
    if scores.tied is not None:
        tied = {floor: each.tied for floor, each in floors.items() if each.tied is not None}
        found["tied_day"] = {
            "protocol": TIED_DAY,
            "users_left_out": len(scores.own) - len(scores.tied),
            **_tested(name, scores.tied, tied),
        }
    return found


def _tested(name: str, ours: Evaluation, floors: Mapping[str, Evaluation]) -> dict[str, Any]:
    # One user's difference has no variance: there is nothing to test.
    tested = floors if len(np.unique(ours.users)) > 1 else {}
    values = ours.values(MAIN)
    tests = {
        floor: paired_values_test(values, e.values(MAIN), ours.users) for floor, e in tested.items()
    }
    return {
        "users_tested": len(ours),
        "scores": {name: ours.metrics(), **{f: e.metrics() for f, e in floors.items()}},
        "significance": {f: {"difference": t.difference, "p": t.p} for f, t in tests.items()},
    }
