"""Experiments as they are served: their plan in the event log, and popularity as a control arm."""

from __future__ import annotations

__all__ = ["POPULARITY", "popular", "record_arms", "record_plan"]

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from l2rec.data.catalog import ID
from l2rec.errors import CheckpointError
from l2rec.protocols import Scorer
from l2rec.runs.folder import load_run_config, open_run_dataset, read_catalog, training_split
from l2rec.runs.predictor import Predictor
from l2rec.service.attributes import Attributes
from l2rec.service.events import EventLog, Served
from l2rec.service.loading import next_serial
from l2rec.service.settings import Experiment
from l2rec.service.version import ItemState, Version
from l2rec.studies.arms import CONTROL, TREATMENT

POPULARITY = "popularity"
"""Name of the control arm that needs no run."""


def record_plan(log: EventLog, experiment: Experiment) -> None:
    """Store salt and share of an experiment, so that its log is enough to analyse it.

    Raises:
        ConfigError: this log has the experiment with another salt or share.
        StorageError: the database is away.
    """
    log.plan(experiment.name, salt=experiment.salt, treatment=experiment.treatment, at=time.time())


def record_arms(log: EventLog, experiment: Experiment, live: Mapping[str, Version]) -> None:
    """Store which version serves each arm; ``live``: versions by role, as of `Live.all`.

    Raises:
        StorageError: the database is away.
    """
    arms = {TREATMENT: live["live"], CONTROL: live.get("control", live["live"])}
    now = time.time()
    log.serve_arms(
        experiment.name,
        [Served(arm, version.name, version.version, now) for arm, version in arms.items()],
    )


class Counts:
    """Training events of N items as a model that ranks: everybody gets the most popular ones."""

    def __init__(self, counts: npt.NDArray[np.int64]) -> None:
        self.counts = counts

    @property
    def n_items(self) -> int:
        """N, with the items that came later."""
        return len(self.counts)

    def scorer(self) -> Scorer:
        """Return histories of B users -> [B, N] float32."""
        from l2rec.methods.floors import Popularity  # only this arm needs what trains

        return Popularity(self.counts).scorer()

    def add_items(self, texts: Sequence[str]) -> npt.NDArray[np.int32]:
        """Add items that nobody has taken yet."""
        first = self.n_items
        self.counts = np.append(self.counts, np.zeros(len(texts), dtype=np.int64))
        return np.arange(first, self.n_items, dtype=np.int32)


class Popular(Predictor):
    """Predictor of `Counts`; an item whose text is changed stays as popular as it was."""

    def with_items(self, items: Mapping[str, str]) -> Predictor:
        grown = super().with_items(items)
        taken: Counts = self.model
        for item in items:
            before, row = self.row_of(item), grown.row_of(item)
            if before is not None:
                taken.counts[row] = taken.counts[before]
        return grown


def popular(run: Path, items: ItemState) -> Version:
    """Return a version of a run's items that ranks them by how often the run was trained on them.

    items: those of the event log.

    Raises:
        CheckpointError: the data set of the run is no longer there.
    """
    from l2rec.methods.floors import Popularity

    config, _ = load_run_config(run)
    dataset = open_run_dataset(run, None)
    train = training_split(config, dataset).train
    counts = Popularity.from_sequences(train, dataset.n_items).counts
    catalog = read_catalog(run)
    ids = catalog.table[ID].to_pylist()
    if ids != dataset.item_ids.to_pylist():
        raise CheckpointError(f"{run}: its catalog is not that of its data set {dataset.path}")
    digest = hashlib.sha256(counts.tobytes()).hexdigest()[:16]
    version = Version(
        predictor=Popular(Counts(counts), ids, list(catalog.texts), None, digest),
        index=None,
        indexed=len(ids),
        attributes=Attributes.of_catalog(catalog),
        deleted=frozenset(n for n, item in enumerate(ids) if not item),
        name=POPULARITY,
        report={"method": POPULARITY},
        loaded_at=time.time(),
        serial=next_serial(),
        run=run,
        same_for_all=True,
    ).brought_to(items)
    return replace(version, loaded=len(version))
