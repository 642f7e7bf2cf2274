"""How much L2Rec's vectors improve the models downstream (L2Rec, section 3.6), on a log.

    DATA: exposures, clicks, replies              RUN: trained on clicks before the first day
         |                                              |
         v                                              v
    counters as each day began  <----------------  vectors of items; of users, anew each day
         |
         +--> control     DLRM and two towers on ids, histories, attributes, counters
         +--> treatment   the same, and the frozen vectors, their cosine and product
         |
         v
    days:  ... vectors' past ... | train ........ | choose epoch | test ... test |

Both arms have the same code, options, seeds, order of batches and initial tables, and are trained
from scratch. They are tested on days that neither they nor the vectors have seen. The recommender
of that time chose the exposures, so this measures how well the log is predicted, not what users
would have done with other lists: that takes an A/B test (`l2rec abtest`).
"""

from __future__ import annotations

__all__ = ["run_downstream"]

import datetime
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from torch import Tensor, nn

from l2rec.data.dataset import Dataset, open_dataset
from l2rec.disk import replacing, write_json
from l2rec.errors import ConfigError, DataError
from l2rec.protocols import Progress
from l2rec.runs.folder import open_run_dataset
from l2rec.runs.machine import hardware, versions
from l2rec.studies.downstream.daily import Doubles, Ints, Known, daily_log
from l2rec.studies.downstream.features import Arm, States, Table, as_date, periods
from l2rec.studies.downstream.fit import (
    Watch,
    click_probabilities,
    tower_scores,
    train_matching,
    train_ranking,
)
from l2rec.studies.downstream.metrics import Scored, compared, matching_scores, ranking_scores
from l2rec.studies.downstream.options import ARMS, TASKS, TREATMENT, DownstreamConfig
from l2rec.studies.downstream.vectors import Frozen, vectors_of_files, vectors_of_run
from l2rec.studies.folder import claim_folder

REPORT = "downstream"
"""``kind`` of the report, which tells that a folder holds this study."""


@dataclass(frozen=True)
class ArmResult:
    """One arm after training.

    ``scores``: test metrics of each seed. ``training``: epochs and parameters of each seed.
    ``probabilities``: [n, tasks] float64 of the test exposures, mean over seeds.
    """

    scores: list[dict[str, Scored | None]]
    training: list[dict[str, Any]]
    probabilities: Doubles


Results = Mapping[str, ArmResult]


def run_downstream(
    data: Path,
    out: Path,
    *,
    progress: Progress,
    run: Path | None = None,
    run_data: Path | None = None,
    vectors: Path | None = None,
    until: float | None = None,
    seeds: int = 3,
    config: DownstreamConfig | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Train both stages of both arms, compare the arms, and write the results to ``out``.

    ``out`` gets report.json, which is also returned, and predictions.parquet.

    Args:
        data: folder of a data set of exposures, clicks and replies.
        run, run_data: a finished run that encodes the vectors, and its data set if it was moved.
        vectors, until: instead of a run, a folder of `l2rec embed`, and the time in seconds before
            which all events lie that the vectors know.
        seeds: number of seeds, from 0 on.
        command: the command line, for the report.

    Raises:
        ConfigError: not exactly one source of vectors, no ``until`` for files, no seeds.
        DataError: a log or vectors that cannot be used.
        CheckpointError: ``out`` holds something else, or a damaged run.
        TrainingError: a training that diverges.
    """
    started = time.monotonic()
    config = config or DownstreamConfig()
    _check_request(run, vectors, until, seeds)
    claim_folder(out, REPORT)
    dataset = open_dataset(data)
    if run is not None:
        until, source = _open_run(run, run_data, dataset, config, progress)
    else:
        assert vectors is not None and until is not None
        until = math.nextafter(until, -math.inf)  # the day that begins then is the first to train
        source = vectors_of_files(vectors, dataset)
    table = Table(dataset, config, source, until, progress)
    watch = Watch(progress, 2 * len(ARMS) * seeds, config.epochs)
    results = {name: _train_arm(table, name, seeds, watch) for name in ARMS}
    report = _report(table, dataset, results, seeds)
    report |= {"command": command, "wall_seconds": round(time.monotonic() - started, 1)}
    out.mkdir(parents=True, exist_ok=True)
    _write_predictions(out / "predictions.parquet", dataset, table, results)
    write_json(out / "report.json", report)
    return report


# -- before training -----------------------------------------------------------------------------


def _check_request(run: Path | None, vectors: Path | None, until: float | None, seeds: int) -> None:
    """Refuse options that contradict each other."""
    if (run is None) == (vectors is None):
        raise ConfigError("give either --run RUN, or --vectors DIR of `l2rec embed`")
    if vectors is not None and until is None:
        raise ConfigError(
            "--vectors does not tell what its users had clicked: say with --until DATE which day "
            "began when they were encoded, so that training can begin after it"
        )
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds}: choose 1 or more")


def _open_run(
    run: Path,
    run_data: Path | None,
    dataset: Dataset,
    config: DownstreamConfig,
    progress: Progress,
) -> tuple[float, Callable[[Known], Frozen]]:
    """Return the time of the newest event that a run knows, and the run as a source of vectors.

    Raises:
        DataError: the times of what it was trained on cannot be told as seconds.
    """
    past = open_run_dataset(run, run_data)
    per_second = past.order.per_second
    if per_second is None:
        raise DataError(
            f"{run}: times of {past.path} are of the unit {past.order.unit!r}, so that nobody can "
            "tell which days it knows; embed it, and give --vectors DIR with --until DATE"
        )
    until = float(np.asarray(past.timestamps).max()) / per_second
    periods(until, daily_log(dataset).days[1], config.test_days)  # fails before anything is encoded
    return until, vectors_of_run(run, dataset, config.max_history, progress, run_data)


# -- training and scores -------------------------------------------------------------------------


def _train_arm(table: Table, name: str, seeds: int, watch: Watch) -> ArmResult:
    """Train and test both stages of one arm with every seed."""
    arm = Arm(table, treated=name == TREATMENT)
    clicks, shown = table.clicks["test"], table.shown_in("test")
    all_scores, training, mean = [], [], np.zeros((len(shown), len(TASKS)))
    for seed in range(seeds):
        ranking, ranking_facts = train_ranking(arm, seed, watch)
        probabilities = click_probabilities(ranking, arm, table.parts["test"])
        matching, matching_facts = train_matching(arm, seed, watch)
        ranks = clicks.ranks(tower_scores(matching, arm))
        scores = ranking_scores(probabilities, shown, table.n_users)
        scores |= matching_scores(ranks, clicks, table.n_users, table.config.ks)
        all_scores.append(scores)
        training.append(
            {
                "seed": seed,
                "ranking": {**ranking_facts, "parameters": _size(ranking)},
                "matching": {**matching_facts, "parameters": _size(matching)},
            }
        )
        mean += probabilities / seeds
        watch.progress.line(f"{name}, seed {seed}: " + _short(scores))
    return ArmResult(all_scores, training, mean)


def _size(model: nn.Module) -> int:
    """Count the parameters of a model."""
    return sum(p.numel() for p in model.parameters())


def _short(scores: Mapping[str, Scored | None]) -> str:
    """Write metrics in one line."""
    shown = [f"{name} {s.value:.4f}" for name, s in scores.items() if s is not None]
    return "  ".join(shown)


def _floors(table: Table) -> dict[str, dict[str, float | None]]:
    """Score what needs no training: the items' rates and clicks so far, and the vectors alone."""
    rows, clicks, shown = table.parts["test"], table.clicks["test"], table.shown_in("test")
    names = table.known.names["item"]
    item = table.items.dense[table.item_row[rows]].cpu().numpy().astype(np.float64)
    rates = item[:, [names.index("click rate"), names.index("reply rate")]]
    a, b = Arm(table, treated=True).pair_vectors(rows)
    products = (a * b).sum(1).cpu().numpy().astype(np.float64)
    alone = np.stack((products, products), axis=1)
    n_users, ks = table.n_users, table.config.ks

    def popular(candidates: States) -> Callable[[Ints], Tensor]:
        counts = table.known.item_clicks(candidates.owner, candidates.day)
        row = torch.from_numpy(counts.astype(np.float32))
        return lambda at: row.expand(len(at), -1)

    def vectors(candidates: States) -> Callable[[Ints], Tensor]:
        items = table.item_vectors[candidates.owner].T
        return lambda at: table.user_vectors[table.users.vectors[at]] @ items

    floors = {
        "popularity": ranking_scores(rates, shown, n_users)
        | matching_scores(clicks.ranks(popular), clicks, n_users, ks),
        "vectors alone": ranking_scores(alone, shown, n_users, calibrated=False)
        | matching_scores(clicks.ranks(vectors), clicks, n_users, ks),
    }
    return {
        name: {metric: None if s is None else s.value for metric, s in scores.items()}
        for name, scores in floors.items()
    }


# -- the report ----------------------------------------------------------------------------------


def _report(table: Table, dataset: Dataset, results: Results, seeds: int) -> dict[str, Any]:
    """Collect everything that report.json holds."""
    users = np.unique(table.shown_in("test").user)
    scores = {
        name: [_among(seed, users, table.n_users) for seed in result.scores]
        for name, result in results.items()
    }
    labels = table.shown.labels
    return {
        "kind": REPORT,
        "dataset": {
            **dataset.identity,
            "origin": (dataset.meta.get("source") or {}).get("origin"),
        },
        "vectors": {**table.frozen.about, "dim": table.item_vectors.shape[1]},
        "periods": {
            name: {
                "days": table.days.named()[name],
                "exposures": len(rows),
                "clicks": int(labels[rows, 0].sum()),
                "replies": int(labels[rows, 1].sum()),
                "users": len(np.unique(table.shown.user[rows])),
            }
            for name, rows in table.parts.items()
        },
        "candidates": {
            as_date(day): len(states.owner)
            for day, states in table.clicks["test"].candidates.items()
        },
        "features": {**table.known.names, "attributes": list(table.fields)},
        "options": table.config.model_dump(mode="json"),
        "seeds": list(range(seeds)),
        "metrics": compared(scores, len(users), table.config.alpha),
        "floors": _floors(table),
        "training": {name: result.training for name, result in results.items()},
        "hardware": hardware(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }


def _among(
    scores: Mapping[str, Scored | None], users: Ints, n_users: int
) -> dict[str, Scored | None]:
    """Restrict the influence of ``n_users`` users to the tested ones, the sample of the tests."""
    return {
        metric: None if s is None else Scored(s.value, s.influence[users] * len(users) / n_users)
        for metric, s in scores.items()
    }


def _write_predictions(path: Path, dataset: Dataset, table: Table, results: Results) -> None:
    """Write the test exposures with both arms' probabilities, mean over seeds."""
    shown = table.shown_in("test")
    columns: dict[str, Any] = {
        "user_id": pl.from_arrow(dataset.user_ids.take(pa.array(shown.user))),
        "item_id": pl.from_arrow(dataset.item_ids.take(pa.array(shown.item))),
        "timestamp": shown.time,
    }
    for column, task in enumerate(TASKS):
        columns[task] = shown.labels[:, column].astype(np.int8)
        columns |= {f"{task}_{name}": results[name].probabilities[:, column] for name in ARMS}
    with replacing(path) as partial:
        pl.DataFrame(columns).write_parquet(partial)
