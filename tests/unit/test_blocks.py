"""Shared parts of the baselines: grids, batches of rows, the encoder, the losses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from l2rec.data.ragged import Ragged
from l2rec.errors import DataError
from l2rec.modules import losses, sequences
from l2rec.modules.encoder import (
    SequenceEncoder,
    attention,
    computed_positions,
    in_length_groups,
    length_groups,
)

ROWS = Ragged.from_rows([[3, 1, 2], [5], [0, 4], [1, 1, 1, 1]])


def test_pad_and_last() -> None:
    items, real = sequences.pad(ROWS)
    assert items.tolist() == [[3, 1, 2, 0], [5, 0, 0, 0], [0, 4, 0, 0], [1, 1, 1, 1]]
    assert real.sum(1).tolist() == [3, 1, 2, 4]
    assert items[real].tolist() == ROWS.values.tolist()
    states = items[..., None].float()
    assert sequences.last_of(states, real).flatten().tolist() == [2, 5, 4, 1]


@pytest.mark.parametrize("max_rows", [1, 2, 99])
def test_rows_are_encoded_in_order_in_evaluation_mode(max_rows: int) -> None:
    model = nn.Dropout(0.5).train()

    def encode(rows: Ragged) -> Tensor:
        assert not model.training and torch.is_inference_mode_enabled()
        assert rows.lengths.max() <= 3
        return torch.tensor([[float(rows[i].sum())] for i in range(len(rows))])

    found = sequences.encode_rows(model, ROWS, encode, max_items=3, max_rows=max_rows)
    assert found.flatten().tolist() == [6, 5, 4, 3] and model.training
    assert sequences.encode_rows(
        model, ROWS.head(0).take(np.zeros(0, dtype=int)), encode, max_items=3
    ).shape == (0, 1)
    with pytest.raises(DataError, match="empty history"):
        sequences.encode_rows(model, Ragged.from_rows([[]]), encode, max_items=3)


def test_texts_are_refused_by_a_method_of_ids() -> None:
    assert sequences.catalog_rows(np.array([2, 0]), "SASRec", "cpu").tolist() == [2, 0]
    with pytest.raises(DataError, match="SASRec has a vector for each item it was trained on"):
        sequences.catalog_rows(["a drill"], "SASRec", "cpu")


def test_attention_is_its_formula() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 4) for _ in range(3))
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    theirs = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=~hidden)
    torch.testing.assert_close(attention(q, k, v, hidden), theirs)
    torch.testing.assert_close(
        attention(q, k, v, None), nn.functional.scaled_dot_product_attention(q, k, v)
    )


@pytest.mark.parametrize("causal", [True, False])
def test_encoder_ignores_padding_and_the_future(causal: bool) -> None:
    torch.manual_seed(0)
    encoder = SequenceEncoder(8, heads=2, inner=16, max_items=6, causal=causal).eval()
    table = torch.randn(6, 8)
    items, real = sequences.pad(ROWS)
    states = encoder(table[items], real)
    for row in range(len(ROWS)):
        alone, present = sequences.pad(Ragged.from_rows([ROWS[row]]))
        expected = encoder(table[alone], present)[0]
        torch.testing.assert_close(states[row, : len(expected)], expected, atol=1e-5, rtol=1e-5)
    changed = items.clone()
    changed[3, 2:] = 5
    later = encoder(table[changed], real)
    assert torch.equal(later[3, :2], states[3, :2]) == causal
    assert not torch.equal(later[3, 2:], states[3, 2:])


def test_one_encoder_runs_both_ways() -> None:
    torch.manual_seed(0)
    causal, both = (
        SequenceEncoder(8, inner=16, max_items=6, causal=c).eval() for c in (True, False)
    )
    both.load_state_dict(causal.state_dict())
    items, real = sequences.pad(ROWS)
    x = torch.randn(6, 8)[items]
    assert torch.equal(causal(x, real, causal=False), both(x, real))
    assert torch.equal(both(x, real, causal=True), causal(x, real))
    assert not torch.equal(causal(x, real), both(x, real))


def test_losses_are_their_formulas() -> None:
    positive = torch.tensor([0.5, -1.0], dtype=torch.float64)
    negative = torch.tensor([[0.2, -math.inf], [1.5, 0.1]], dtype=torch.float64)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    expected = (
        -math.log(sigmoid(0.5))
        - math.log(1 - sigmoid(0.2))
        - math.log(sigmoid(-1.0))
        - math.log(1 - sigmoid(1.5))
        - math.log(1 - sigmoid(0.1))
    ) / 2
    assert float(losses.binary_loss(positive, negative)) == pytest.approx(expected)
    rows = [[0.5, 0.2], [-1.0, 1.5, 0.1]]
    expected = sum(-row[0] + math.log(sum(map(math.exp, row))) for row in rows) / 2
    assert float(losses.sampled_softmax_loss(positive, negative)) == pytest.approx(expected)

    users = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 2.0]])
    items = torch.tensor([[0.0, 1.0], [3.0, 0.0], [0.0, -1.0]])
    kept = [[0.0, 1.0], [0.8, 0.6, -0.8], [0.0, -1.0]]  # the first and the last are of one user
    own = [0.0, 0.6, -1.0]
    expected = sum(
        -score / 0.5 + math.log(sum(math.exp(s / 0.5) for s in row))
        for row, score in zip(kept, own, strict=True)
    )
    found = losses.in_batch_loss(users, items, torch.tensor([7, 8, 7]), temperature=0.5)
    assert float(found) == pytest.approx(expected / 3)


def test_rows_of_like_length_are_read_together() -> None:
    lengths = torch.tensor([3, 10, 1, 9, 7, 2, 10])
    real = torch.arange(10) < lengths[:, None]
    groups = length_groups(real)
    assert [wide for _, wide in groups] == [10, 3, 2, 1]
    assert [sorted(lengths[rows].tolist()) for rows, _ in groups] == [[7, 9, 10, 10], [3], [2], [1]]
    assert computed_positions(real) == 4 * 10 + 3 + 2 + 1

    seen = []

    def read(x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return 2 * x * real[..., None]

    x = torch.randn(7, 10, 4, requires_grad=True)
    out = in_length_groups(read, x, real)
    torch.testing.assert_close(out, 2 * x * real[..., None])
    assert seen == [(4, 10, 4), (1, 3, 4), (1, 2, 4), (1, 1, 4)]
    out.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, 2.0 * real[..., None].expand_as(x))
    assert in_length_groups(read, x[:0], real[:0]).shape == (0, 10, 4)
