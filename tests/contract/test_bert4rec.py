"""BERT4Rec: its equations, the items it hides, and the position it ranks by."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tests.support import models, sequential
from tests.support.models import one_batch, shaken
from tests.support.sequential import HISTORIES, NAMELESS, N, double
from torch import Tensor, nn

from l2rec.data.ragged import Ragged
from l2rec.methods.bert4rec import BERT4Rec
from l2rec.modules.sequences import pad


def build(seed: int = 0, **changes: Any) -> BERT4Rec:
    options = {"dim": 16, "inner": 24, "max_items": 8} | changes
    model: BERT4Rec = models.build(BERT4Rec, options, NAMELESS, seed=seed)
    return model


def scores_at(model: BERT4Rec, row: list[int | None]) -> list[Tensor]:
    """Compute r_t of one row, in which None is a hidden item: [N] float64 for each position."""
    table, mask = double(model.items.weight), double(model.mask)
    x = [mask if item is None else table[item] for item in row]
    states = sequential.encoded(model.encoder, x, causal=False)
    dense, last = model.head[0], model.head[2]
    outs = [sequential.norm(last, nn.functional.gelu(sequential.linear(dense, h))) for h in states]
    return [table @ out + double(model.bias) for out in outs]


def test_a_user_is_asked_for_what_follows_the_whole_history() -> None:
    """Check that the mask displaces no item of a history that fits, else the oldest."""
    model = shaken(build())
    found = model.scorer()(HISTORIES)
    for row in range(len(HISTORIES)):
        expected = scores_at(model, [*HISTORIES[row][-8:].tolist(), None])[-1]
        torch.testing.assert_close(found[row].double(), expected, rtol=0, atol=1e-4)


def test_the_loss_is_the_mean_over_hidden_items(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shaken(build())
    rows = HISTORIES.head(6)
    hidden = [{0, 3}, set(), {0, 1, 2, 3, 4, 5}, {1}, {2}]  # the first position counts as any
    _, real = pad(rows)
    grid = torch.tensor([[t in hide for t in range(real.shape[1])] for hide in hidden])
    monkeypatch.setattr(model, "hide", lambda real: grid[real.sum(1) > 1])
    batch = one_batch(model, rows)
    each = []
    for row in batch.users:
        items = rows[row].tolist()
        shown = [None if t in hidden[row] else i for t, i in enumerate(items)]
        scores = scores_at(model, shown)
        each += [sequential.cross_entropy(scores[t], items[t]) for t in sorted(hidden[row])]
    order = np.argsort(batch.users)
    assert len(order) == 4, "a row of one item asks for nothing"
    monkeypatch.setattr(model, "hide", lambda real: grid[batch.users, : real.shape[1]])
    assert float(model.loss(batch).total.detach()) == pytest.approx(np.mean(each), rel=1e-5)


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.6])
def test_what_is_hidden(ratio: float) -> None:
    """Check that the right number of real items is hidden, at least one, anywhere in the row."""
    lengths = np.array([1, 2, 3, 7, 8, 8])
    real = torch.from_numpy(np.arange(8) < lengths[:, None])
    wanted = [max(1, round(ratio * n)) for n in lengths]
    torch.manual_seed(0)
    model = build(mask_ratio=ratio, last_only=0.0)
    seen = torch.zeros(real.shape)
    for _ in range(300):
        hidden = model.hide(real)
        assert not bool((hidden & ~real).any()) and hidden.sum(1).tolist() == wanted
        seen += hidden
    share = torch.tensor(wanted) / torch.from_numpy(lengths)
    torch.testing.assert_close(seen / 300, real * share[:, None], rtol=0, atol=0.12)


def test_the_newest_alone() -> None:
    lengths = torch.tensor([1, 4, 8] * 200)
    real = torch.arange(8) < lengths[:, None]
    newest = torch.arange(8) == lengths[:, None] - 1
    assert torch.equal(build(last_only=1.0).hide(real), newest)
    torch.manual_seed(0)
    some = (build(last_only=0.5, mask_ratio=0.5).hide(real) == newest).all(1)[lengths == 8]
    assert 0.4 < float(some.float().mean()) < 0.6


def test_a_hidden_item_is_not_in_the_input() -> None:
    model = shaken(build())
    items, real = pad(HISTORIES.head(8))
    torch.manual_seed(0)
    hidden = model.hide(real)
    other = torch.where(hidden | ~real, (items + 5) % N, items)
    assert torch.equal(model(items, real, hidden), model(other, real, hidden))
    shown = items.clone()
    shown[0, 0 if not hidden[0, 0] else 1] += 10
    assert not torch.equal(model(items, real, hidden), model(shown, real, hidden))


def test_rows_hold_one_item_more_than_histories() -> None:
    """Check that every position that recommending reads was trained."""
    batch = one_batch(build(), Ragged.from_rows([list(range(12))]))
    lengths = {tuple(batch.histories[i].tolist()) for i in range(len(batch.histories))}
    assert lengths == {(0, 1, 2), tuple(range(3, 12))}
    assert build().encoder.positions.num_embeddings == 9


@pytest.mark.parametrize(
    "changes", [{}, {"last_only": 0.0}, {"last_only": 1.0}, {"mask_ratio": 0.6}], ids=str
)
def test_every_option_trains(changes: dict[str, Any]) -> None:
    sequential.check_loss_and_gradients(build(**changes))


def test_it_learns_by_heart() -> None:
    model = build(dim=32, inner=64, dropout=0.0, attention_dropout=0.0)
    sequential.check_overfits(model, epochs=150, lr=5e-3)


def test_what_is_refused() -> None:
    with pytest.raises(ValidationError, match="heads=3 does not divide dim=16"):
        build(heads=3)
    with pytest.raises(ValidationError, match="greater than 0"):
        build(mask_ratio=0.0)
