"""eSASRec: its layers written out, and its negatives."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tests.support import models, sequential
from tests.support.models import one_batch, shaken
from tests.support.sequential import HISTORIES, NAMELESS, N, double, linear, norm
from torch import Tensor

from l2rec.methods.esasrec import ESASRec


def build(seed: int = 0, **changes: Any) -> ESASRec:
    options = {"dim": 16, "heads": 2, "inner": 24, "max_items": 8, "negatives": 12} | changes
    model: ESASRec = models.build(ESASRec, options, NAMELESS, seed=seed)
    return model


def written_out(model: ESASRec, row: list[int]) -> list[Tensor]:
    """Compute the states of one row, [h] float64 for each position."""
    x = [
        double(model.items.weight[item]) + double(model.positions.weight[t])
        for t, item in enumerate(row)
    ]
    layer: Any
    for layer in model.layers:
        read = [norm(layer.norms[0], y) for y in x]
        seen = [linear(layer.out, y) for y in sequential.attend(layer, read, causal=True)]
        x = [y + torch.sigmoid(linear(layer.gates[0], y)) * s for y, s in zip(x, seen, strict=True)]
        fed = []
        for y in x:
            gate, value = linear(layer.inner, norm(layer.norms[1], y)).chunk(2)
            fed.append(linear(layer.outer, gate / (1 + torch.exp(-gate)) * value))
        x = [y + torch.sigmoid(linear(layer.gates[1], y)) * f for y, f in zip(x, fed, strict=True)]
    return x


@pytest.mark.parametrize("layers", [1, 2])
def test_the_layers(layers: int) -> None:
    model = shaken(build(layers=layers))
    with torch.no_grad():
        states, _ = model(HISTORIES.head(8))
    for row in range(len(HISTORIES)):
        expected = torch.stack(written_out(model, HISTORIES[row][:8].tolist()))
        torch.testing.assert_close(
            states[row, : len(expected)].double(), expected, rtol=0, atol=1e-4
        )


def logits(model: ESASRec, monkeypatch: pytest.MonkeyPatch, drawn: Tensor) -> tuple[float, float]:
    """Compute the loss with given negatives, by the model and written out from its scores."""
    monkeypatch.setattr(model, "_negatives", lambda targets: drawn)
    batch = one_batch(model, HISTORIES.head(8))
    with torch.no_grad():
        found = float(model.loss(batch).total)
        states, real = model(batch.histories)
        scores = (states[real] @ model.items.weight.T - model.log_q).double()
    each = []
    for p, target in enumerate(batch.targets.tolist()):
        own = drawn if drawn.ndim == 1 else drawn[p]
        others = [j for j in own.tolist() if j != target]
        total = sum(math.exp(float(scores[p, j])) for j in [target, *others])
        each.append(math.log(total) - float(scores[p, target]))
    return found, float(np.mean(each))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("logq", [True, False])
def test_the_sampled_softmax(monkeypatch: pytest.MonkeyPatch, share: bool, logq: bool) -> None:
    """Check that a negative drawn twice counts twice, and a position's target never."""
    model = shaken(build(share_negatives=share, in_batch=0.5 * logq, logq=logq))
    positions = len(one_batch(model, HISTORIES.head(8)).targets)
    shape = (6,) if share else (positions, 6)
    drawn = torch.randint(N, shape, generator=torch.Generator().manual_seed(0))
    drawn[..., 1] = drawn[..., 0]
    found, expected = logits(model, monkeypatch, drawn)
    assert found == pytest.approx(expected, rel=1e-5)
    assert bool(model.log_q.any()) == logq


def test_the_full_softmax() -> None:
    model = shaken(build(loss="ce"))
    batch = one_batch(model, HISTORIES)
    with torch.no_grad():
        found = float(model.loss(batch).total)
        states, real = model(batch.histories)
    scores = (states[real] @ model.items.weight.T).detach().double()
    expected = np.mean(
        [sequential.cross_entropy(s, t) for s, t in zip(scores, batch.targets, strict=True)]
    )
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("in_batch", [0.0, 0.25, 1.0])
def test_where_negatives_come_from(share: bool, in_batch: float) -> None:
    model = build(share_negatives=share, in_batch=in_batch, negatives=400)
    targets = torch.tensor([3, 3, 3, 7])
    drawn = model._negatives(targets)
    assert drawn.shape == ((400,) if share else (4, 400))
    of_batch = drawn[..., : round(400 * in_batch)]
    assert set(of_batch.flatten().tolist()) <= {3, 7}
    if in_batch:
        assert float((of_batch == 3).float().mean()) == pytest.approx(0.75, abs=0.12)
    if in_batch < 1:
        rest = drawn[..., of_batch.shape[-1] :]
        assert set(rest.flatten().tolist()) == set(range(N))


def test_log_q_is_how_often_an_item_is_drawn() -> None:
    model = build(in_batch=0.25, logq=True)
    one_batch(model, HISTORIES)
    counts = np.bincount(HISTORIES.values, minlength=N)
    expected = 0.25 * counts / counts.sum() + 0.75 / N
    np.testing.assert_allclose(model.log_q.exp().numpy(), expected, rtol=1e-5)
    alone = build(in_batch=1.0, logq=True)
    one_batch(alone, HISTORIES)
    assert bool(alone.log_q.isfinite().all()), "items that nobody has seen are never drawn"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers": 2},
        {"loss": "ce"},
        {"share_negatives": False},
        {"in_batch": 1.0},
        {"in_batch": 0.5, "logq": True, "share_negatives": False},
    ],
    ids=str,
)
def test_every_option_trains(changes: dict[str, Any]) -> None:
    sequential.check_loss_and_gradients(build(**changes))


@pytest.mark.parametrize("changes", [{}, {"loss": "ce"}], ids=str)
def test_it_learns_by_heart(changes: dict[str, Any]) -> None:
    sequential.check_overfits(build(dim=32, dropout=0.0, layers=2, **changes), epochs=80, lr=5e-3)


def test_what_is_refused() -> None:
    with pytest.raises(ValidationError, match="heads=3 does not divide dim=16"):
        build(heads=3)
    with pytest.raises(ValidationError, match="logq=true changes nothing for uniform negatives"):
        build(logq=True)
