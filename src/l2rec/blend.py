"""Any finished run together with what was met near the user's newest items, weighed on validation.

    s = z + w log(1 + m / f) + rho [i in history]

with z the method's scores, centred and scaled for each user, m the counts of
`l2rec.methods.blocks.cooccurrence`, and w, f, rho chosen by NDCG@10 on validation (rho not at all
where histories are masked anyway). It costs no training, so every method can have it: what a
method is worth shows in what it adds to the counts.
"""

from __future__ import annotations

__all__ = ["Blend", "blend_run"]

import itertools
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l2rec.checkpoint import read_json, write_json
from l2rec.data.ragged import Ragged
from l2rec.data.splits import Split, leave_one_out
from l2rec.errors import CheckpointError
from l2rec.evaluation import Evaluation, evaluate_each, write_ranks
from l2rec.methods.blocks.cooccurrence import CoOccurrence
from l2rec.methods.protocols import Scorer
from l2rec.runs import load, open_run_dataset
from l2rec.training import Progress

WEIGHTS = (0.0, 0.15, 0.3, 0.6, 1.2, 2.4)
FLOORS = (0.1, 0.4, 1.6)
REPEATS = (-8.0, 0.0, 2.0)
USERS = 10_000
"""Validation users that weights are chosen on, drawn evenly from all."""


@dataclass(frozen=True)
class Blend:
    """weight: w of the counts. floor: f. repeat: rho of items of the history."""

    weight: float
    floor: float
    repeat: float


def blend_run(
    run: Path, out: Path, *, progress: Progress, data: Path | None = None
) -> dict[str, Any]:
    """Choose a blend on validation, score it on test, and write OUT as a run to compare.

    OUT holds the report and the ranks, not a model. Returns its report.

    Raises:
        CheckpointError: ``out`` is not empty, or the data set is not the run's.
    """
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty; choose another --out")
    dataset = open_run_dataset(run, data)
    report = read_json(run / "report.json")
    model: Any = load(run).model
    split = leave_one_out(dataset.sequences)
    together = CoOccurrence(dataset.n_items)
    together.count(split.train)
    started = time.monotonic()
    tried = [Blend(*values) for values in itertools.product(WEIGHTS, FLOORS, REPEATS)]
    tried = list(dict.fromkeys(b if b.weight else Blend(0.0, FLOORS[0], b.repeat) for b in tried))
    some = np.unique(np.linspace(0, len(split.users) - 1, USERS).astype(np.int64))
    valid = _evaluate(model, together, tried, split, progress, some)
    best = max(tried, key=lambda b: valid[b].metrics()["ndcg@10"])
    progress.line(f"chosen on {len(some):,} validation users: {best}")
    chosen = time.monotonic() - started
    (evaluation,) = _evaluate(model, together, [best], split, progress).values()
    out.mkdir(parents=True, exist_ok=True)
    ids = dataset.user_ids.to_pylist()
    write_ranks(out / "ranks.parquet", evaluation, ids, fingerprint=dataset.fingerprint)
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copyfile(run / name, out / name)
    method = f"{report['method']} + nearby items"
    own = {k: v for k, v in report["scores"].items() if k != report["method"]}
    alone = report["scores"][report["method"]]
    report |= {
        "method": method,
        "recipe": f"{report['recipe']} + nearby items",
        "blend": asdict(best),
        "blend_seconds": round(chosen, 1),
        "valid": valid[best].metrics(),
        "scores": {method: evaluation.metrics(), report["method"]: alone, **own},
        "significance": {},
    }
    write_json(out / "report.json", report)
    return report


def _evaluate(
    model: Any,
    together: CoOccurrence,
    blends: list[Blend],
    split: Split,
    progress: Progress,
    valid_rows: np.ndarray[Any, np.dtype[np.int64]] | None = None,
) -> dict[Blend, Evaluation]:
    """Ranks of every blend: on ``valid_rows`` of validation, or on all of test."""
    if valid_rows is None:
        histories, targets, users = split.test_histories, split.test_targets, split.users
    else:
        histories = split.valid_histories.take(valid_rows)
        targets, users = split.valid_targets[valid_rows], split.users[valid_rows]
    names = {str(blend): blend for blend in blends}
    made = _scorers(model, together, blends)
    found = evaluate_each(
        together.n_items,
        dict(zip(names, made, strict=True)),
        histories,
        targets,
        users=users,
        progress=lambda done: progress.validating(done, len(targets)),
    )
    return {names[name]: evaluation for name, evaluation in found.items()}


def _scorers(model: Any, together: CoOccurrence, blends: list[Blend]) -> list[Callable[[], Scorer]]:
    """One for each blend; they share what the same histories were last scored by."""
    scorer: Scorer = model.scorer()
    last: tuple[Ragged, Tensor, Tensor, Tensor] | None = None

    def score(histories: Ragged, blend: Blend) -> Tensor:
        nonlocal last
        if last is None or last[0] is not histories:
            last = (histories, *_parts(scorer, together, histories))
        _, own, met, seen = last
        near = blend.weight * torch.log1p(met / blend.floor) if blend.weight else 0.0
        return own + torch.where(seen, torch.tensor(blend.repeat), near)

    return [partial(lambda b: partial(score, blend=b), blend) for blend in blends]


def _parts(
    scorer: Scorer, together: CoOccurrence, histories: Ragged
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N] each: scores with mean 0 and deviation 1 for each user, m, and what is in the
    history.
    """
    scores = scorer(histories).float()
    spread = scores.std(1, keepdim=True).clamp(min=1e-12)
    own = (scores - scores.mean(1, keepdim=True)) / spread
    met = torch.from_numpy(together.recall(histories).toarray()).float()
    seen = torch.zeros(own.shape, dtype=torch.bool)
    rows = torch.from_numpy(np.repeat(np.arange(len(histories)), histories.lengths))
    seen[rows, torch.from_numpy(histories.values.astype(np.int64))] = True
    return own, met.to(own), seen.to(own.device)
