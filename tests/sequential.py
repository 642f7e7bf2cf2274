"""What every method that reads histories of item ints promises, as checks for its own tests; and
the sequence encoder written out, position by position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from l2rec.checkpoint import load_tensors, load_trained, save_tensors, trained_tensors
from l2rec.data.batches import Batch
from l2rec.data.ragged import Ragged
from l2rec.data.splits import leave_one_out
from l2rec.errors import DataError
from l2rec.evaluation import evaluate
from l2rec.methods.blocks.encoder import SequenceEncoder
from l2rec.methods.protocols import Embedder, Recommender, Trainable

N = 20
HISTORIES = Ragged.from_rows(
    [[3, 1, 4, 1, 5, 9], [2], [6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3], [8, 4], [6, 2, 6, 4]]
)
Make = Callable[[int], Any]
"""A model of N items whose history holds at least 8, from a seed."""


def shaken(model: Any, scale: float = 0.1, seed: int = 1) -> Any:
    """As if trained: no parameter at its neutral start. In evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def one_batch(model: Any, sequences: Ragged = HISTORIES) -> Batch:
    """The one batch of an epoch over a few sequences."""
    (stage,) = model.stages(1e-3, 0.0)
    made = stage.batches(sequences, seed=0, epoch=0, batch_users=99, batch_tokens=10**6)
    assert len(made) == 1
    return made[0]


def trained(model: Any, sequences: Ragged, epochs: int, lr: float = 1e-2) -> list[float]:
    """Train all stages in place, from torch's seed 0; the loss of every step."""
    torch.manual_seed(0)
    losses = []
    model.train()
    for stage in model.stages(lr, 0.0):
        optimizer = torch.optim.AdamW(
            [{"params": g.parameters, "lr": g.lr, "weight_decay": 0.0} for g in stage.groups]
        )
        for epoch in range(epochs):
            made = stage.batches(sequences, seed=0, epoch=epoch, batch_users=64, batch_tokens=10**5)
            for batch in made.iterate():
                optimizer.zero_grad()
                total = stage.loss(batch).total
                total.backward()
                optimizer.step()
                losses.append(float(total.detach()))
    return losses


# ------------------------------------------------------------------------------- checks


def check_protocols(model: Any) -> None:
    assert isinstance(model, Recommender) and isinstance(model, Trainable)
    assert isinstance(model, Embedder)
    assert model.n_items == N


def check_item_tensors(model: Any) -> None:
    """Those whose rows are items, embeddings among them."""
    of_items = [n for n in trained_tensors(model) if n in model.item_tensors]
    assert "items.weight" in of_items
    assert all(len(trained_tensors(model)[name]) == N for name in of_items)


def check_loss_and_gradients(model: Any) -> None:
    """The loss is finite and every trained tensor has a gradient from it; each is in one group."""
    shaken(model).train()
    (stage,) = model.stages(1e-3, 0.1)
    grouped = [id(p) for group in stage.groups for p in group.parameters]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    losses = stage.loss(one_batch(model))
    assert losses.total.shape == () and bool(losses.total.isfinite())
    assert 0 < losses.tokens <= losses.computed_tokens
    assert not any(part.requires_grad for part in losses.parts.values())
    losses.total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert bool(parameter.grad.any()), name


def check_overfits(model: Any, epochs: int = 60, lr: float = 1e-2, users: int = 24) -> None:
    """Random rows are learned by heart: the last training item of all is ranked first."""
    rng = np.random.default_rng(0)
    rows = Ragged.from_rows([rng.integers(N, size=6) for _ in range(users)])
    trained(model, rows, epochs, lr)
    inputs = rows.head(5)
    ranks = evaluate(model, inputs, rows.values[rows.offsets[1:] - 1]).ranks
    assert float(np.mean(ranks == 1)) > 0.95, ranks


def check_rows_are_independent(model: Any) -> None:
    """Padding, company and order change nothing, nor does the mode the model is in."""
    shaken(model)
    together = model.encode_users(HISTORIES)
    alone = [model.encode_users(Ragged.from_rows([HISTORIES[i]])) for i in range(len(HISTORIES))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)
    model.train()
    assert torch.equal(model.encode_users(HISTORIES), together) and model.training
    model.eval()
    scores = model.scorer()(HISTORIES)
    assert scores.shape == (len(HISTORIES), N) and scores.dtype == torch.float32
    some = np.array([4, 0, 13], dtype=np.int32)
    torch.testing.assert_close(scores[:, some], together @ model.encode_items(some).T)


def check_only_the_newest_items_count(model: Any) -> None:
    shaken(model)
    most = model.config.max_items
    rows = [list(range(most)), [9, 7, *range(most)]]
    first, second = model.encode_users(Ragged.from_rows(rows))
    torch.testing.assert_close(first, second)
    shorter = model.encode_users(Ragged.from_rows([rows[0][1:]]))[0]
    assert not torch.allclose(first, shorter, atol=1e-4), "the oldest of max_items counts"


def check_positions_read_as_their_prefix(model: Any) -> None:
    """What is trained at a position is what is asked for a user whose history ends there."""
    shaken(model)
    rows = HISTORIES.head(8)
    with torch.no_grad():
        states, real = model(rows)
    prefixes = [rows[i][: t + 1] for i in range(len(rows)) for t in range(len(rows[i]))]
    torch.testing.assert_close(
        states[real], model.encode_users(Ragged.from_rows(prefixes)), rtol=0, atol=1e-5
    )


def check_same_seed_same_losses(make: Make) -> None:
    first, again, other = (trained(make(seed), HISTORIES, 3) for seed in (0, 0, 1))
    assert first == again != other


def check_saved_and_loaded(make: Make, tmp_path: Path) -> None:
    model = shaken(make(0))
    save_tensors(tmp_path / "model.safetensors", trained_tensors(model))
    other = make(1).eval()
    load_trained(other, load_tensors(tmp_path / "model.safetensors")[0], "here")
    assert torch.equal(other.scorer()(HISTORIES), model.scorer()(HISTORIES))


def check_held_out_items_are_not_seen(make: Make) -> None:
    """Other validation and test items, the same weights."""
    rng = np.random.default_rng(0)
    rows = rng.integers(N, size=(12, 7))
    changed = rows.copy()
    changed[:, -2:] = (rows[:, -2:] + 7) % N
    weights = []
    for log in (rows, changed):
        split = leave_one_out(Ragged.from_rows(list(log)))
        assert split.train.lengths.tolist() == [5] * 12
        model = make(0)
        trained(model, split.train, 2)
        weights.append(trained_tensors(model))
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def check_what_is_refused(model: Any, name: str) -> None:
    with pytest.raises(DataError, match=f"{name} has a vector for each item it was trained on"):
        model.encode_items(["a drill"])
    with pytest.raises(DataError, match="an empty history: give at least one item"):
        model.encode_users(Ragged.from_rows([[1], []]))
    nobody = model.encode_users(Ragged.from_rows([]))
    assert nobody.shape == (0, model.encode_items(np.arange(1)).shape[1])


# ------------------------------------------------------------------------------- written out


def double(parameter: Tensor) -> Tensor:
    return parameter.detach().double()


def norm(layer: Any, x: Tensor) -> Tensor:
    """LN of one vector."""
    x = x - x.mean()
    unit = x / (x.square().mean() + layer.eps).sqrt()
    return unit * double(layer.weight) + double(layer.bias)


def linear(layer: Any, x: Tensor) -> Tensor:
    y = double(layer.weight) @ x
    return y if layer.bias is None else y + double(layer.bias)


def attend(layer: Any, x: Sequence[Tensor], causal: bool) -> list[Tensor]:
    """Multi-head attention of one row, position by position: the heads' outputs, joined."""
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
    """`SequenceEncoder` of one row of float64 vectors."""
    x = [norm(encoder.norm, y + double(encoder.positions.weight[t])) for t, y in enumerate(x)]
    layer: Any
    for layer in encoder.layers:
        seen = attend(layer, x, causal)
        x = [norm(layer.norms[0], y + linear(layer.out, s)) for y, s in zip(x, seen, strict=True)]
        fed = [linear(layer.outer, nn.functional.gelu(linear(layer.inner, y))) for y in x]
        x = [norm(layer.norms[1], y + f) for y, f in zip(x, fed, strict=True)]
    return list(x)


def cross_entropy(scores: Tensor, target: int) -> float:
    """-log softmax(scores)[target], over all columns."""
    return math.log(sum(math.exp(float(s)) for s in scores)) - float(scores[target])
