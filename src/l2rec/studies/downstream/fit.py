"""Training of the ranking and the matching stage, and their scores of test exposures."""

from __future__ import annotations

__all__ = ["Watch", "click_probabilities", "tower_scores", "train_matching", "train_ranking"]

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l2rec.errors import TrainingError
from l2rec.protocols import Losses, Progress
from l2rec.runs.machine import device
from l2rec.studies.downstream.daily import Doubles, Ints
from l2rec.studies.downstream.dlrm import DLRM, TwoTower
from l2rec.studies.downstream.features import Arm, Scores, States, as_tensor, row_blocks
from l2rec.studies.downstream.metrics import log_loss
from l2rec.studies.downstream.options import CONTROL, TREATMENT, DownstreamConfig


@dataclass
class Watch:
    """Progress over all ``fits`` trainings; it jumps ahead when one stops early.

    ``epochs``: most epochs of a training. ``number``: the current training, from 0.
    """

    progress: Progress
    fits: int
    epochs: int
    number: int = -1
    name: str = ""

    def next(self, arm: Arm, seed: int, stage: str) -> Watch:
        """Begin the next training and return the watch."""
        self.number += 1
        self.name = f"{TREATMENT if arm.treated else CONTROL}, seed {seed}, {stage}"
        return self

    def step(self, epoch: int, step: int, steps: int, loss: float) -> None:
        """Report that ``step`` of the epoch's ``steps`` is done."""
        each = self.epochs * steps
        done = self.number * each + epoch * steps + step
        text = f"{self.name}  loss {loss:.4f}"
        self.progress.training(epoch + step / steps, done, self.fits * each, text)


def _fit(
    model: Any,
    rows: Ints,
    loss: Callable[[Ints], Losses],
    judge: Callable[[], float],
    config: DownstreamConfig,
    seed: int,
    watch: Watch,
) -> dict[str, Any]:
    """Train on ``rows``, in an order that depends only on seed and epoch; restore the best epoch.

    The best epoch has the highest ``judge``. Returns the number of epochs and the best of them.

    Raises:
        TrainingError: ``judge`` is not finite.
    """
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay)
    best, best_state, history = -math.inf, {}, []
    steps = math.ceil(len(rows) / config.batch)
    for epoch in range(config.epochs):
        model.train()
        order = np.random.default_rng((seed, epoch)).permutation(rows)
        for step, at in enumerate(row_blocks(order, config.batch), 1):
            total = loss(at).total
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            optimizer.step()
            watch.step(epoch, step, steps, float(total.detach()))
        model.eval()
        history.append(judge())
        if not math.isfinite(history[-1]):
            raise TrainingError(
                f"{watch.name}: not a number after epoch {epoch + 1}; choose a smaller lr"
            )
        if history[-1] > best:
            best = history[-1]
            best_state = {key: value.clone() for key, value in model.state_dict().items()}
        elif epoch - int(np.argmax(history)) >= config.patience:
            break
    model.load_state_dict(best_state)
    model.eval()
    return {"epochs": len(history), "best_epoch": int(np.argmax(history)) + 1}


def click_probabilities(model: DLRM, arm: Arm, rows: Ints) -> Doubles:
    """Predict the probability of each task: [n, tasks] float64."""
    with torch.inference_mode():
        parts = [torch.sigmoid(model(arm.pairs(part)).double()) for part in row_blocks(rows)]
    return torch.cat(parts).cpu().numpy()


def train_ranking(arm: Arm, seed: int, watch: Watch) -> tuple[DLRM, dict[str, Any]]:
    """Train the ranking stage of one arm; log loss on the choosing day selects the epoch.

    Raises:
        TrainingError: the log loss is not finite.
    """
    table, config = arm.table, arm.table.config
    torch.manual_seed(seed)
    model = DLRM(config.dlrm, table.sizes, len(arm.moments[0])).to(device())
    model.start_at(table.log_odds)
    choose = table.parts["choose"]
    labels = table.shown.labels[choose]

    def judge() -> float:
        return -float(log_loss(click_probabilities(model, arm, choose), labels).mean(0).sum())

    def loss(rows: Ints) -> Losses:
        return model.loss(arm.pairs(rows), table.labels[rows])

    facts = _fit(
        model, table.parts["train"], loss, judge, config, seed, watch.next(arm, seed, "ranking")
    )
    return model, facts


def train_matching(arm: Arm, seed: int, watch: Watch) -> tuple[TwoTower, dict[str, Any]]:
    """Train the matching stage of one arm; the clicks' mean reciprocal rank selects the epoch.

    Raises:
        TrainingError: the mean reciprocal rank is not finite.
    """
    table, config = arm.table, arm.table.config
    torch.manual_seed(seed)
    model = TwoTower(
        config.dlrm, table.sizes, len(arm.user_moments[0]), len(arm.item_moments[0]), arm.size
    ).to(device())
    model.start_at(table.log_odds)
    judged = table.clicks["choose"]

    def judge() -> float:
        return float((1.0 / judged.ranks(tower_scores(model, arm))).mean())

    def loss(rows: Ints) -> Losses:
        item = table.shown.item[rows]
        return model.loss(
            model.users(*arm.of_users(table.user_row[rows])),
            model.items(*arm.of_items(table.items, table.item_row[rows])),
            table.labels[rows],
            as_tensor(item),
            table.log_q[item],
        )

    facts = _fit(
        model, table.parts["train"], loss, judge, config, seed, watch.next(arm, seed, "matching")
    )
    return model, facts


def tower_scores(model: TwoTower, arm: Arm) -> Scores:
    """Return a function that scores with the matching stage, encoding candidates once."""

    def of(candidates: States) -> Callable[[Ints], Tensor]:
        with torch.inference_mode():
            blocks = row_blocks(np.arange(len(candidates.owner)))
            items = torch.cat([model.items(*arm.of_items(candidates, part)) for part in blocks])

        def scores(at: Ints) -> Tensor:
            with torch.inference_mode():
                return model.users(*arm.of_users(at)) @ items.T

        return scores

    return of
