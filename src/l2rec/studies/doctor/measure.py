"""A few real steps and a sample of validation, in a process of its own: time and peak memory."""

from __future__ import annotations

__all__ = ["measured"]

import itertools
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from l2rec.config import RunConfig
from l2rec.data.batches import Batch
from l2rec.data.catalog import Catalog
from l2rec.data.dataset import open_dataset
from l2rec.data.ragged import Ragged
from l2rec.data.splits import Cases, Split, warm_targets
from l2rec.errors import TrainingError
from l2rec.methods.floors import floors_of
from l2rec.protocols import Costed, EpochBatches, Recommender, Stage
from l2rec.runs.checkpoint import trained_tensors
from l2rec.runs.folder import training_split
from l2rec.runs.loop import try_steps, validation_of
from l2rec.runs.machine import hardware, peak_memory_mb
from l2rec.runs.predictor import backbone_of, build_model, catalog_vectors
from l2rec.runs.scoring import rank

WARM = 2
"""Steps before the first that counts: memory is still being taken."""
STEPS, SECONDS = (8, 150), 20.0
"""Fewest and most steps of a stage that count, and seconds after which there are enough."""
SLOW_STEPS, SLOW_SECONDS = 4, 60.0
"""As many are enough, if they took so long."""
USERS, USERS_SECONDS = 128, 25.0
"""Users of the first validation; each next one is of twice as many, until it takes so long."""


class Silent:
    """Nobody watches."""

    def training(self, epoch: float, step: int, total: int, text: str) -> None: ...

    def validating(self, done: int, total: int) -> None: ...

    def line(self, text: str) -> None: ...


def measured(config: RunConfig, data: Path) -> dict[str, Any]:
    """Measure in a fresh process, whose peak memory is that of this training alone.

    Returns:
        Seconds of reading the texts, of a step and an epoch by stage and of a validation; the peak
        memory in MB; tokens a second of the backbone (as `Costed` counts them), the device.

    Raises:
        L2RecError: what training would raise. TrainingError: the process was killed.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_measure, config, data).result()
        except BrokenProcessPool:
            raise TrainingError(
                "the measuring process was killed, probably for want of memory; lower "
                "training.batch_tokens, or give --no-measure"
            ) from None


def _measure(config: RunConfig, data: Path) -> dict[str, Any]:
    started = time.monotonic()
    dataset = open_dataset(data)
    split = training_split(config, dataset)
    backbone = backbone_of(config)
    model = build_model(config, Catalog(dataset.warm_catalog), backbone, dataset.path / "cache")
    training = config.training
    stages = model.stages(training.lr, training.weight_decay)
    reading = time.monotonic() - started
    stages_of = {}
    validation, users = _validation(model, split, stages)
    for stage in stages:
        stages_of[stage.name] = _stage(model, split, config, stage)
    _rest(model, split, users, dataset.n_warm)
    return {
        "seconds_reading": reading,
        "stages": stages_of,
        "seconds_validation": validation,
        "peak_memory_mb": peak_memory_mb(),
        "hardware": hardware(),
    }


def largest(model: Any, batches: EpochBatches) -> tuple[Batch, npt.NDArray[np.int64]]:
    """Return the batch of an epoch that costs most, and what each costs: tokens, or padded cells
    where the method does not tell.
    """
    costs, worst, chosen = [], -1, None
    for batch in batches.iterate():
        costs.append(cost_of(model, batch.histories))
        if costs[-1] > worst:
            worst, chosen = costs[-1], batch
    if chosen is None:
        raise TrainingError("no user has two training events: there is nothing to train on")
    return chosen, np.asarray(costs, dtype=np.int64)


def cost_of(model: Any, histories: Ragged) -> int:
    """Return the tokens of histories, or their cells on a padded grid."""
    if isinstance(model, Costed):
        return int(model.costs(histories).sum())
    return len(histories) * int(histories.lengths.max(initial=0))


def epoch_of(config: RunConfig, split: Split, stage: Stage, batch_tokens: int = 0) -> EpochBatches:
    """Return the batches of a stage's first epoch."""
    return stage.batches(
        split.train,
        seed=config.seed,
        epoch=0,
        batch_users=config.training.batch_users,
        batch_tokens=batch_tokens or config.training.batch_tokens,
    )


def _stage(model: Any, split: Split, config: RunConfig, stage: Stage) -> dict[str, Any]:
    """Time steps that are spread over an epoch, after one of the largest batch."""
    batches = epoch_of(config, split, stage)
    biggest, costs = largest(model, batches)
    if stage.begin_epoch is not None:
        stage.begin_epoch(0)
    places = np.random.default_rng(0).permutation(len(batches))[: STEPS[1]]

    def chosen() -> Iterator[Batch]:
        yield from [biggest] * WARM
        for place in places:
            yield next(iter(batches.iterate(int(place))))

    seconds: list[float] = []
    steps = try_steps(model, split, config.training, stage, chosen(), progress=Silent())
    for taken in itertools.islice(steps, WARM, None):
        seconds.append(taken)
        if len(seconds) >= STEPS[0] and sum(seconds) > SECONDS:
            break
        if len(seconds) >= SLOW_STEPS and sum(seconds) > SLOW_SECONDS:
            break
    share = float(costs[places[: len(seconds)]].mean() / costs.mean())
    step = float(np.mean(seconds)) / share
    return {
        "steps_an_epoch": len(batches),
        "seconds_step": step,
        "seconds_epoch": step * len(batches),
        "costs_a_second": float(costs.mean()) / step,
        "epochs": stage.epochs or config.training.epochs,
        "validated": stage.select,
        "eval_every": stage.eval_every or config.training.eval_every,
    }


def _validation(model: Any, split: Split, stages: Sequence[Stage]) -> tuple[float, int]:
    """Estimate the seconds of a validation of all users from samples of them, each of twice as many
    as the one before; also return how many the last one was of.
    """
    ranked: Recommender = model
    if stages and stages[-1].validates is not None:
        ranked = stages[-1].validates
    total = len(split.valid)
    if not total:
        raise TrainingError("there is nothing to validate on: no user has enough events")
    tokens, seconds, users = [0], [0.0], USERS
    _validate(ranked, split, USERS)  # warms up
    while True:
        taken, cases = _validate(ranked, split, users)
        tokens.append(_tokens(model, cases.histories))
        seconds.append(taken)
        if users >= total or taken > USERS_SECONDS:
            break
        users *= 2
    slope = (seconds[-1] - seconds[-2]) / max(1, tokens[-1] - tokens[-2])
    left = _tokens(model, split.valid.histories) - tokens[-1]
    return seconds[-1] + max(0.0, slope) * left, users


def _validate(ranked: Recommender, split: Split, users: int) -> tuple[float, Cases]:
    """Validate on some users, evenly spread; return the seconds and who they were."""
    cases = _some(split.valid, users)
    started = time.monotonic()
    validation_of(ranked, replace(split, valid=cases))
    return time.monotonic() - started, cases


def _some(cases: Cases, users: int) -> Cases:
    chosen = np.linspace(0, len(cases) - 1, min(users, len(cases))).astype(np.int64)
    return cases.take(np.unique(chosen))


def _tokens(model: Any, histories: Ragged) -> int:
    """Return what scoring histories costs: tokens, or how many there are."""
    return int(model.costs(histories).sum()) if isinstance(model, Costed) else len(histories)


def _rest(model: Any, split: Split, users: int, n_items: int) -> None:
    """Do on some users what a run does after training, which takes memory too: score the test and
    the floors, encode the catalog.
    """
    cases = split.test if split.warm is None else warm_targets(split.test, split.warm)
    test = _some(cases, users)
    kept = catalog_vectors(model)
    floors = floors_of(split.train, n_items)
    before = {name: tensor.clone() for name, tensor in trained_tensors(model).items()}
    for ranked in (model, *floors.values(), model):
        rank(ranked, test, Silent())
    del kept, before
