"""LEARN: dense all action written out for each item tower, its samples, and new items."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tests.support import models, sequential, tiny
from tests.support.models import one_batch, shaken
from tests.support.sequential import HISTORIES, TEXTS, N, double, linear
from torch import Tensor

from l2rec.data.batches import Batch
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.errors import ConfigError, DataError
from l2rec.evaluation.ranking import evaluate
from l2rec.methods import learn
from l2rec.methods.learn import LEARN, dense_all_action_loss, sample_recent

TOWERS = ("a", "b", "c")


def build(seed: int = 0, texts: list[str] = TEXTS, **changes: Any) -> LEARN:
    options: dict[str, Any] = {
        "dim": 16,
        "layers": 2,
        "inner": 24,
        "out": 8,
        "max_items": 8,
        "text_tokens": 12,
    }
    catalog, backbone = Catalog.of_texts(texts), tiny.random_backbone()
    model: LEARN = models.build(LEARN, options | changes, catalog, backbone, seed=seed)
    return model


def pal(model: LEARN, items: list[int]) -> list[Tensor]:
    """Compute PAL of one row, position by position, in float64."""
    read = [linear(model.enter, double(model.text.vectors[i])) for i in items]
    states = sequential.encoded(model.encoder, read, causal=True)
    return [linear(model.leave, state) for state in states]


def tower(model: LEARN, items: list[int]) -> list[Tensor]:
    """Compute the item tower's output for every target of one row."""
    if model.config.item_tower == "a":
        return pal(model, items)
    if model.config.item_tower == "b":
        return [pal(model, [i])[0] for i in items]
    return [double(model.text.vectors[i]) for i in items]


@pytest.mark.parametrize("item_tower", TOWERS)
def test_dense_all_action(item_tower: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shaken(build(item_tower=item_tower))
    batch = Batch(  # two windows of one user; items 5 and 7 are targets of several users
        users=np.array([0, 1, 1, 2, 3]),
        histories=Ragged.from_rows([[3, 1, 5, 7], [2, 6], [9, 0, 5], [4, 7, 8, 7], [10, 11, 12]]),
        targets=np.zeros(0, dtype=np.int32),
        negatives=np.zeros((5, 0), dtype=np.int32),
    )
    cuts = [2, 1, 2, 2, 2]
    monkeypatch.setattr(torch, "rand", lambda *_: torch.tensor(0.6))  # of 3, 1, 2, 3, 2 places
    with torch.no_grad():
        found = float(model.loss(batch).total)

    rows = [batch.histories[row].tolist() for row in range(5)]
    states = [pal(model, row[:cut]) for row, cut in zip(rows, cuts, strict=True)]
    targets = [row[cut:] for row, cut in zip(rows, cuts, strict=True)]
    outputs = [tower(model, items) for items in targets]
    own = {
        user: {i for r in range(5) if batch.users[r] == user for i in targets[r]}
        for user in batch.users
    }

    def score(h: Tensor, t: Tensor) -> float:
        return float(h @ t / h.norm() / t.norm()) / model.config.temperature

    of_rows = []
    for row in range(5):
        each = []
        for h in states[row]:
            others = sum(
                math.exp(score(h, t))
                for r in range(5)
                for i, t in zip(targets[r], outputs[r], strict=True)
                if i not in own[batch.users[row]]
            )
            for t in outputs[row]:
                positive = math.exp(score(h, t))
                each.append(-math.log(positive / (positive + others)))
        of_rows.append(np.mean(each))
    assert found == pytest.approx(np.mean(of_rows), rel=1e-4)


def test_a_row_without_negatives_costs_nothing() -> None:
    scores = torch.tensor([[1.0, 2.0], [0.5, 3.0]], requires_grad=True)
    pairs = torch.tensor([[True, True], [False, True]])
    negatives = torch.tensor([[False, False], [True, False]])
    loss = dense_all_action_loss(scores, pairs, negatives, torch.tensor([0, 1]))
    assert float(loss.detach()) == pytest.approx(math.log(1 + math.exp(0.5 - 3.0)) / 2, rel=1e-5)
    loss.backward()
    assert scores.grad is not None and bool(scores.grad.isfinite().all())
    assert scores.grad[0].tolist() == [0, 0]


def test_recent_states_are_sampled_more_often() -> None:
    real = torch.arange(6) < torch.tensor([[3], [6], [1]])
    assert torch.equal(sample_recent(real, 6), real)
    torch.manual_seed(0)
    drawn = torch.stack([sample_recent(real, 2) for _ in range(4000)])
    assert bool((drawn.sum(-1) == torch.tensor([2, 2, 1])).all()) and not drawn[:, ~real].any()
    # The first of two draws has weights n / 21; the second, of those that are left.
    weights = [n / 21 for n in range(1, 7)]
    expected = [
        w + sum(v * w / (1 - v) for j, v in enumerate(weights) if j != i)
        for i, w in enumerate(weights)
    ]
    shares = drawn[:, 1].float().mean(0).tolist()
    assert shares == pytest.approx(expected, abs=0.03)


def test_only_the_sampled_states_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that with one state of each side a batch of B rows has B pairs, drawn anew."""
    model = shaken(build(history_states=1, target_states=1))
    pairs_of: list[Tensor] = []

    def counted(scores: Tensor, pairs: Tensor, **others: Tensor) -> Tensor:
        pairs_of.append(pairs)
        return dense_all_action_loss(scores, pairs, **others)

    monkeypatch.setattr(learn, "dense_all_action_loss", counted)
    batch = one_batch(model, HISTORIES)
    torch.manual_seed(0)
    losses = {float(model.loss(batch).total.detach()) for _ in range(8)}
    assert len(losses) > 4, "cuts and samples are drawn anew"
    rows = len(batch.histories)
    assert rows > 1 and all(torch.equal(pairs, torch.eye(rows).bool()) for pairs in pairs_of)


def test_no_window_has_a_single_event() -> None:
    model = build(max_items=4)
    rows = Ragged.from_rows([range(n) for n in (1, 2, 4, 5, 9, 10)])
    (stage,) = model.stages(1e-3, 0.0)
    made = stage.batches(rows, seed=0, epoch=0, batch_users=99, batch_tokens=10**6)
    windows = sorted(
        (int(made[0].users[i]), made[0].histories[i].tolist()) for i in range(len(made[0].users))
    )
    expected = [
        *((1, [0, 1]), (2, [0, 1, 2, 3]), (3, [1, 2, 3, 4])),
        *((4, [1, 2, 3, 4]), (4, [5, 6, 7, 8])),
        *((5, [0, 1]), (5, [2, 3, 4, 5]), (5, [6, 7, 8, 9])),
    ]
    assert windows == expected
    assert bool(model.loss(made[0]).total.isfinite())


@pytest.mark.parametrize("item_tower", TOWERS)
def test_it_learns_by_heart(item_tower: str) -> None:
    """Learn rows of two events: one state and one target each."""
    model = build(
        dim=32, out=32, item_tower=item_tower, dropout=0.0, attention_dropout=0.0, layers=1
    )
    # Where both towers are one, a user of one item is that item: pairs that no chain joins, and
    # the history taken out of the ranking.
    rows = Ragged.from_rows(np.random.default_rng(0).permutation(N).reshape(-1, 2))
    sequential.train(model, rows, epochs=200, lr=5e-3)
    found = evaluate(model, rows.head(1), rows.values[1::2])
    assert float(np.mean(found.ranks_masked == 1)) > 0.95, found.ranks_masked
    if item_tower != "c":
        alone = Ragged(np.arange(N), np.arange(N + 1))
        torch.testing.assert_close(
            model.encode_users(alone), model.encode_items(np.arange(N)), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("item_tower", TOWERS)
def test_loss_and_gradients(item_tower: str) -> None:
    sequential.check_loss_and_gradients(build(item_tower=item_tower))


def test_a_position_reads_as_its_prefix() -> None:
    model = shaken(build())
    rows = HISTORIES.head(8)
    with torch.no_grad():
        states, real = model(rows)
    prefixes = [rows[i][: t + 1] for i in range(len(rows)) for t in range(len(rows[i]))]
    expected = model.encode_users(Ragged.from_rows(prefixes))
    found = torch.nn.functional.normalize(states[real], dim=-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("item_tower", TOWERS)
def test_items_are_their_texts(item_tower: str) -> None:
    model = shaken(build(item_tower=item_tower))
    known = model.encode_items(np.arange(N))
    expected = tower(model, [7])[0]
    torch.testing.assert_close(known[7].double(), expected / expected.norm(), rtol=0, atol=1e-4)
    torch.testing.assert_close(model.encode_items([TEXTS[4]])[0], known[4], rtol=0, atol=1e-4)
    assert model.n_items == N
    assert model.add_items([TEXTS[4], "soft silk hat"]).tolist() == [N, N + 1]
    scores = model.scorer()(Ragged.from_rows([[1, N], [1, 4], [1, N + 1]]))
    assert scores.shape == (3, N + 2) and model.n_items == N + 2
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-4)
    assert not torch.allclose(scores[1], scores[2], atol=1e-3)


def test_what_is_refused() -> None:
    with pytest.raises(ValidationError, match="heads=3 does not divide dim=16"):
        build(heads=3)
    with pytest.raises(ValidationError, match="'a', 'b' or 'c'"):
        build(item_tower="d")
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        build(max_items=1)
    with pytest.raises(DataError, match="LEARN reads item texts and no item"):
        build(texts=[""] * N)
    with pytest.raises(ConfigError, match=r"text_tokens=300: .* choose at most 254"):
        build(text_tokens=300)
    model = build()
    with pytest.raises(DataError, match="a new item needs a text"):
        model.add_items(["a drill", ""])
    with pytest.raises(DataError, match="an empty history: give at least one item"):
        model.encode_users(Ragged.from_rows([[1], []]))
    assert model.encode_users(Ragged.from_rows([])).shape == (0, 8)
    assert model.encode_items(np.zeros(0, dtype=np.int32)).shape == (0, 8)
