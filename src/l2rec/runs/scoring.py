"""Scores on test, as reports hold them: by the run's own split, tied-day where events tie, and of
cold and warm targets apart where items are held out of training.
"""

from __future__ import annotations

__all__ = [
    "PARTS",
    "Scores",
    "compared",
    "is_part",
    "rank",
    "score",
    "summed_up",
    "with_cold_items",
]

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from l2rec.data.dataset import Dataset
from l2rec.data.ragged import Ragged
from l2rec.data.splits import Cases, Split
from l2rec.errors import ConfigError
from l2rec.evaluation.ranking import Evaluation, evaluate
from l2rec.evaluation.ranks import protocol_of, write_ranks
from l2rec.evaluation.significance import paired_values_test
from l2rec.evaluation.tied_day import PROTOCOL as TIED_DAY
from l2rec.evaluation.tied_day import ranked_as_sets
from l2rec.protocols import Progress, Recommender, Scorer, TakesNewItems
from l2rec.runs.folder import RANKS, TIED_RANKS, UserIds
from l2rec.runs.numbers import MAIN
from l2rec.runs.predictor import Predictor

PARTS = ("cold", "warm")
"""Parts of the targets where items are held out of training."""


@dataclass(frozen=True)
class Scores:
    """Evaluations on test: by the run's own split, and tied-day beside it (None without ties).

    warm: items from this one on are cold; None: none are.
    """

    own: Evaluation
    tied: Evaluation | None
    warm: int | None = None

    @property
    def parts(self) -> dict[str, Evaluation]:
        """Evaluations of cold and of warm targets; empty where no item is cold."""
        if self.warm is None:
            return {}
        targets = self.own.targets
        return {part: self.own.of_targets(is_part(part, targets, self.warm)) for part in PARTS}

    def write(self, run: Path, dataset: Dataset, split: Split) -> None:
        """Write the ranks of both into a run folder."""
        ids, fingerprint = UserIds(dataset), dataset.fingerprint
        protocol = protocol_of(split.protocol)
        write_ranks(
            run / RANKS,
            self.own,
            ids,
            fingerprint=fingerprint,
            protocol=protocol,
            warm=self.warm,
        )
        if self.tied is not None:
            write_ranks(
                run / TIED_RANKS, self.tied, ids, fingerprint=fingerprint, protocol=TIED_DAY
            )


def is_part(part: str, targets: npt.NDArray[np.integer], warm: int) -> npt.NDArray[np.bool_]:
    """Mark the targets of one of `PARTS`: [T] bool."""
    cold: npt.NDArray[np.bool_] = np.asarray(targets) >= warm
    return cold if part == "cold" else ~cold


class _Unknown:
    """A recommender that does not take new items: those from its last on are below all others that
    it scores.
    """

    def __init__(self, recommender: Recommender, n_items: int) -> None:
        self._recommender, self.n_items = recommender, n_items

    def scorer(self) -> Scorer:
        """Return histories -> scores [B, N], -inf for what it does not know."""
        scorer, missing = self._recommender.scorer(), self.n_items - self._recommender.n_items

        def scores(histories: Ragged) -> Tensor:
            known = scorer(histories)
            return torch.nn.functional.pad(known, (0, missing), value=-torch.inf)

        return scores


def with_cold_items(recommender: Any, dataset: Dataset) -> Any:
    """Return a trained model or `Predictor` as one of all items: cold ones are added by their
    texts, for good, or ranked below all others where the method takes no new ones.
    """
    if not dataset.n_cold:
        return recommender
    cold = dataset.catalog.slice(dataset.n_warm)
    texts = cold["text"].to_pylist()
    try:
        if isinstance(recommender, Predictor):
            recommender.add_items(dict(zip(cold["item_id"].to_pylist(), texts, strict=True)))
        elif isinstance(recommender, TakesNewItems):
            recommender.add_items(texts)
        else:
            return _Unknown(recommender, dataset.n_items)
    except ConfigError:  # some methods can, but not in every design
        return _Unknown(recommender, dataset.n_items)
    return recommender


def score(recommender: Recommender, split: Split, sets: Cases | None, progress: Progress) -> Scores:
    """Rank the test cases, and the ``sets`` of `beside_leave_one_out`."""

    def ranked(cases: Cases) -> Evaluation:
        return rank(recommender, cases, progress)

    own = ranked(split.test)
    tied = None if sets is None else ranked_as_sets(own, split, sets, ranked)
    return Scores(own, tied, split.warm)


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
    protocol, where there is one; under ``parts`` those of cold and warm targets, where items are
    cold.
    """
    own = {name: each.own for name, each in scores.items()}
    tied = {name: each.tied for name, each in scores.items() if each.tied is not None}
    found = _metrics(own)
    if tied:
        of_sets = _metrics(tied)
        left_out = found["users_tested"] - of_sets["users_tested"]
        found["tied_day"] = {"protocol": TIED_DAY, "users_left_out": left_out, **of_sets}
    parts = {name: each.parts for name, each in scores.items()}
    if all(parts.values()):
        found["parts"] = {
            part: _metrics({name: each[part] for name, each in parts.items()}) for part in PARTS
        }
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
