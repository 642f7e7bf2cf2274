"""What L2Rec's vectors are worth to the stages downstream (L2Rec, section 3.6), without users.

    DATA: exposures, clicks, replies              RUN: trained on clicks before the first day
         |                                              |
         v                                              v
    what was known as each day began  <---------  vectors of items; of users, anew each day
         |
         +--> control     DLRM and two towers on ids, histories, attributes, counters
         +--> treatment   the same, and the frozen vectors, their cosine and product
         |
         v
    days:  ... vectors' past ... | train ........ | choose epoch | test ... test |

Both arms have the same code, options, seeds, order of batches and start of the tables, and are
trained anew. Each is tested on days that neither it nor the vectors have seen. Exposures were
chosen by the recommender of that time, so this measures how the log is predicted, not what users
would have done with other lists: that takes an A/B test (`l2rec abtest`).
"""

from __future__ import annotations

__all__ = ["run_downstream"]

import datetime
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from torch import Tensor, nn

from l2rec.data.dataset import Dataset, open_dataset
from l2rec.disk import read_json, replacing, write_json
from l2rec.errors import CheckpointError, ConfigError
from l2rec.protocols import Progress
from l2rec.runs.folder import open_run_dataset
from l2rec.runs.machine import hardware, versions
from l2rec.studies.downstream.daily import Exposures, daily_log
from l2rec.studies.downstream.features import (
    Arm,
    Clicks,
    States,
    Table,
    as_date,
    periods,
)
from l2rec.studies.downstream.fit import (
    Watch,
    click_probabilities,
    tower_scores,
    train_matching,
    train_ranking,
)
from l2rec.studies.downstream.metrics import Scored, compared, matching_scores, ranking_scores
from l2rec.studies.downstream.options import (
    ARMS,
    TASKS,
    TREATMENT,
    Doubles,
    DownstreamConfig,
    Ints,
)
from l2rec.studies.downstream.vectors import vectors_of_files, vectors_of_run

REPORT = "downstream"
"""``kind`` of the report, by which a folder is known again."""


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
    """Train both arms of both stages, compare them, write OUT/report.json and predictions.parquet.

    Args:
        run, run_data: a finished run that makes the vectors, and its data set if it was moved.
        vectors, until: or a folder of `l2rec embed`, and the time of the newest event it knows,
            in seconds.
        seeds: how many, from 0 on.

    Raises:
        ConfigError, DataError, CheckpointError: as the message says.
    """
    started = time.monotonic()
    config = config or DownstreamConfig()
    if (run is None) == (vectors is None):
        raise ConfigError("give either --run RUN, or --vectors DIR of `l2rec embed`")
    if vectors is not None and until is None:
        raise ConfigError(
            "--vectors does not tell what its users had clicked: say with --until DATE which day "
            "began when they were encoded, so that training can begin after it"
        )
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds}: choose 1 or more")
    _claim(out)
    dataset = open_dataset(data)
    if run is not None:
        until = float(np.asarray(open_run_dataset(run, run_data).timestamps).max())
        periods(until, daily_log(dataset).days[1], config.test_days)  # before anything is encoded
        make = vectors_of_run(run, dataset, config.max_history, progress, run_data)
    else:
        assert vectors is not None and until is not None
        until = math.nextafter(until, -math.inf)  # the day that began then is the first to train
        make = vectors_of_files(vectors, dataset, until)
    table = Table(dataset, config, make, until, progress)
    clicks = table.clicks["test"]
    shown = table.shown.take(table.parts["test"])
    results: dict[str, list[dict[str, Scored | None]]] = {name: [] for name in ARMS}
    facts: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
    mean = {name: np.zeros((len(shown), len(TASKS))) for name in ARMS}
    watch = Watch(progress, 2 * len(ARMS) * seeds, config.epochs)
    for name in ARMS:
        arm = Arm(table, treated=name == TREATMENT)
        for seed in range(seeds):
            ranking, ranked = train_ranking(arm, seed, watch)
            probabilities = click_probabilities(ranking, arm, table.parts["test"])
            mean[name] += probabilities / seeds
            matching, matched = train_matching(arm, seed, watch)
            found = ranking_scores(probabilities, shown, dataset.n_users)
            ranks = clicks.ranks(tower_scores(matching, arm))
            found |= matching_scores(ranks, clicks, dataset.n_users, config.ks)
            results[name].append(found)
            facts[name].append(
                {
                    "seed": seed,
                    "ranking": {**ranked, "parameters": _size(ranking)},
                    "matching": {**matched, "parameters": _size(matching)},
                }
            )
            progress.line(f"{name}, seed {seed}: " + _short(found))
    report = _report(table, dataset, clicks, shown, results, facts, seeds)
    report |= {"command": command, "wall_seconds": round(time.monotonic() - started, 1)}
    out.mkdir(parents=True, exist_ok=True)
    _write_predictions(out / "predictions.parquet", dataset, shown, mean)
    write_json(out / "report.json", report)
    return report


def _claim(out: Path) -> None:
    """Refuse a folder that holds something else."""
    if not out.exists():
        return
    if not out.is_dir():
        raise CheckpointError(f"{out} is a file; choose a folder for --out")
    if any(out.iterdir()) and not (
        (out / "report.json").is_file() and read_json(out / "report.json").get("kind") == REPORT
    ):
        raise CheckpointError(
            f"{out} is not empty and holds no `l2rec downstream`; choose another --out"
        )


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _short(found: Mapping[str, Scored | None]) -> str:
    shown = [f"{name} {s.value:.4f}" for name, s in found.items() if s is not None]
    return "  ".join(shown)


def _floors(
    table: Table, clicks: Clicks, shown: Exposures, n_users: int
) -> dict[str, dict[str, float | None]]:
    """What needs no training: items' rates and clicks so far, and the vectors alone."""
    rows = table.parts["test"]
    names = table.known.names["item"]
    item = table.items.dense[table.item_row[rows]].cpu().numpy().astype(np.float64)
    rates = item[:, [names.index("click rate"), names.index("reply rate")]]
    a, b = Arm(table, treated=True).pair_vectors(rows)
    products = (a * b).sum(1).cpu().numpy().astype(np.float64)
    alone = np.stack((products, products), axis=1)
    ks = table.config.ks

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


def _report(
    table: Table,
    dataset: Dataset,
    clicks: Clicks,
    shown: Exposures,
    results: Mapping[str, Sequence[Mapping[str, Scored | None]]],
    facts: Mapping[str, Any],
    seeds: int,
) -> dict[str, Any]:
    n_users = len(np.unique(shown.user))
    present = np.unique(shown.user)
    own = {
        name: [
            {
                metric: None
                if s is None
                else Scored(s.value, s.influence[present] * n_users / dataset.n_users)
                for metric, s in seed.items()
            }
            for seed in runs
        ]
        for name, runs in results.items()
    }
    labels = table.shown.labels
    return {
        "kind": REPORT,
        "dataset": {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "users": dataset.n_users,
            "items": dataset.n_items,
            "events": dataset.n_events,
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
        "candidates": {as_date(day): len(s.owner) for day, s in clicks.candidates.items()},
        "features": {**table.known.names, "attributes": list(table.fields)},
        "options": table.config.model_dump(mode="json"),
        "seeds": list(range(seeds)),
        "metrics": compared(own, n_users, table.config.alpha),
        "floors": _floors(table, clicks, shown, dataset.n_users),
        "training": dict(facts),
        "hardware": hardware(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }


def _write_predictions(
    path: Path, dataset: Dataset, shown: Exposures, mean: Mapping[str, Doubles]
) -> None:
    """Test exposures with what both arms said of them, mean over seeds."""
    columns: dict[str, Any] = {
        "user_id": pl.from_arrow(dataset.user_ids.take(pa.array(shown.user))),
        "item_id": pl.from_arrow(dataset.item_ids.take(pa.array(shown.item))),
        "timestamp": shown.time,
    }
    for column, task in enumerate(TASKS):
        columns[task] = shown.labels[:, column].astype(np.int8)
        columns |= {f"{task}_{name}": mean[name][:, column] for name in ARMS}
    with replacing(path) as partial:
        pl.DataFrame(columns).write_parquet(partial)
