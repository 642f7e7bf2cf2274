"""For tests of methods that read histories of item ints: that each of their options trains, and
the sequence encoder written out, position by position. What every method promises is asked in
``tests/contract/test_methods.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tests.support.models import one_batch, shaken
from torch import Tensor, nn

from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.data.synthetic import simple_text
from l2rec.evaluation.ranking import evaluate
from l2rec.modules.encoder import SequenceEncoder

N = 20
TEXTS = [simple_text(1007 * i) for i in range(N)]
NAMELESS = Catalog.of_texts([""] * N)
"""A catalog for methods that read no texts."""
HISTORIES = Ragged.from_rows(
    [[3, 1, 4, 1, 5, 9], [2], [6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3], [8, 4], [6, 2, 6, 4]]
)


def train(model: Any, sequences: Ragged, epochs: int, lr: float) -> None:
    """Train all stages in place, from torch's seed 0."""
    torch.manual_seed(0)
    model.train()
    for stage in model.stages(lr, 0.0):
        optimizer = torch.optim.Adam([p for group in stage.groups for p in group.parameters], lr)
        for epoch in range(epochs):
            made = stage.batches(sequences, seed=0, epoch=epoch, batch_users=64, batch_tokens=10**5)
            for batch in made.iterate():
                optimizer.zero_grad()
                stage.loss(batch).total.backward()
                optimizer.step()


# ------------------------------------------------------------------------------- checks


def check_loss_and_gradients(model: Any) -> None:
    """Ask for a finite loss and for its gradient in every trained tensor; each is in one group."""
    shaken(model).train()
    (stage,) = model.stages(1e-3, 0.1)
    grouped = [id(p) for group in stage.groups for p in group.parameters]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    losses = stage.loss(one_batch(model, HISTORIES))
    assert losses.total.shape == () and bool(losses.total.isfinite())
    assert 0 < losses.tokens <= losses.computed_tokens
    assert not any(part.requires_grad for part in losses.parts.values())
    losses.total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert bool(parameter.grad.any()), name


def check_overfits(model: Any, epochs: int = 60, lr: float = 1e-2, users: int = 24) -> None:
    """Learn random rows by heart: the last training item of all is ranked first."""
    rng = np.random.default_rng(0)
    rows = Ragged.from_rows([rng.integers(N, size=6) for _ in range(users)])
    train(model, rows, epochs, lr)
    inputs = rows.head(5)
    ranks = evaluate(model, inputs, rows.values[rows.offsets[1:] - 1]).ranks
    assert float(np.mean(ranks == 1)) > 0.95, ranks


# ------------------------------------------------------------------------------- written out


def double(parameter: Tensor) -> Tensor:
    """Return a parameter's values in float64."""
    return parameter.detach().double()


def norm(layer: Any, x: Tensor) -> Tensor:
    """Return LN of one vector."""
    x = x - x.mean()
    unit = x / (x.square().mean() + layer.eps).sqrt()
    return unit * double(layer.weight) + double(layer.bias)


def linear(layer: Any, x: Tensor) -> Tensor:
    """Return W x + b of one vector."""
    y = double(layer.weight) @ x
    return y if layer.bias is None else y + double(layer.bias)


def attend(layer: Any, x: Sequence[Tensor], causal: bool) -> list[Tensor]:
    """Attend within one row, position by position: the heads' outputs, joined."""
    dim, size = len(x[0]), len(x[0]) // layer.heads
    q, k, v = (
        [linear(layer.qkv, y)[part * dim : (part + 1) * dim] for y in x] for part in range(3)
    )
    out = []
    for t in range(len(x)):
        heads = []
        for start in range(0, dim, size):
            cut = slice(start, start + size)
            seen = range(t + 1) if causal else range(len(x))
            weights = [math.exp(float(q[t][cut] @ k[s][cut]) / math.sqrt(size)) for s in seen]
            heads.append(
                sum((w * v[s][cut] for w, s in zip(weights, seen, strict=True)), torch.zeros(size))
                / sum(weights)
            )
        out.append(torch.cat(heads))
    return out


def encoded(encoder: SequenceEncoder, x: Sequence[Tensor], causal: bool) -> list[Tensor]:
    """Return what `SequenceEncoder` makes of one row of float64 vectors."""
    x = [norm(encoder.norm, y + double(encoder.positions.weight[t])) for t, y in enumerate(x)]
    layer: Any
    for layer in encoder.layers:
        seen = attend(layer, x, causal)
        x = [norm(layer.norms[0], y + linear(layer.out, s)) for y, s in zip(x, seen, strict=True)]
        fed = [linear(layer.outer, nn.functional.gelu(linear(layer.inner, y))) for y in x]
        x = [norm(layer.norms[1], y + f) for y, f in zip(x, fed, strict=True)]
    return list(x)


def cross_entropy(scores: Tensor, target: int) -> float:
    """Return -log softmax(scores)[target], over all columns."""
    return math.log(sum(math.exp(float(s)) for s in scores)) - float(scores[target])
