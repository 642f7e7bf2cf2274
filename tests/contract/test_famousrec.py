"""FamouSRec-style: exact spectra of rows of any length, mixture and losses written out, and user
vectors that depend on one history alone.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pydantic import ValidationError
from tests.support import models
from tests.support.models import batches_of, shaken
from torch import Tensor

from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.errors import DataError
from l2rec.evaluation.ranking import evaluate
from l2rec.methods.famousrec import (
    FamouSRec,
    Kind,
    Spectra,
    alignment_loss,
    specialization_loss,
)

N = 20
CATALOG = Catalog.of_texts([str(i) for i in range(N)])
KINDS: tuple[Kind, ...] = ("transformer", "gru", "filter", "convolution")
SMALL: dict[str, Any] = {
    "dim": 8,
    "inner": 12,
    "gru_width": 6,
    "router_width": 5,
    "max_items": 11,
}
ROWS = Ragged.from_rows([(7 * np.arange(n) + n) % N for n in (3, 11, 1, 8, 2, 5, 10, 4)])
Array = npt.NDArray[np.float64]


def build(seed: int = 0, **changes: Any) -> FamouSRec:
    model: FamouSRec = models.build(FamouSRec, SMALL | changes, CATALOG, seed=seed)
    return model


# ------------------------------------------------------------------------------- spectra


@pytest.mark.parametrize("max_items", [1, 2, 7, 12])
def test_spectra_are_those_of_each_row_alone(max_items: int) -> None:
    torch.manual_seed(0)
    lengths = torch.arange(1, max_items + 1).flip(0)
    real = torch.arange(max_items) < lengths[:, None]
    x = torch.randn(max_items, max_items, 3)  # padding is not zero, and not seen
    spectra = Spectra(max_items)(real)
    found = spectra.transform(x)
    assert found.shape == (max_items, 2, max_items // 2 + 1, 3)
    back = spectra.inverse(found[:, None])[:, 0]
    torch.testing.assert_close(back, x * real[..., None], atol=1e-5, rtol=0)
    energy = (x * real[..., None]).square().sum((1, 2))
    torch.testing.assert_close(found.square().sum((1, 2, 3)), energy)
    for row, n in enumerate(lengths.tolist()):
        theirs = np.fft.rfft(x[row, :n].double().numpy(), axis=0, norm="ortho")
        mirrored = [1 + (0 < 2 * f < n) for f in range(n // 2 + 1)]
        theirs *= np.sqrt(mirrored)[:, None]
        ours = found[row, 0] + 1j * found[row, 1]
        np.testing.assert_allclose(ours[: n // 2 + 1].numpy(), theirs, atol=1e-5)
        assert not ours[n // 2 + 1 :].any()


@pytest.mark.parametrize("max_items", [1, 7, 12])
def test_functions_of_frequency_are_read_in_between(max_items: int) -> None:
    grid = torch.randn(max_items // 2 + 1, 2)
    at = np.arange(len(grid)) / max_items
    real = torch.ones(max_items, max_items).tril().bool()
    read = Spectra(max_items)(real).read(grid)
    for n in range(1, max_items + 1):
        own = np.arange(n // 2 + 1) / n
        for d in range(2):
            expected = np.interp(own, at, grid[:, d].numpy())
            np.testing.assert_allclose(read[n - 1, : len(own), d], expected, atol=1e-5)
    torch.testing.assert_close(read[-1], grid)


def test_bands_share_the_frequencies_at_the_start() -> None:
    bands = build(max_items=50).bands
    inside = bands > 0
    assert inside.shape == (26, 4) and inside.sum(1).eq(1).all()
    assert inside.sum(0).tolist() == [7, 6, 7, 6]
    order = inside.float().argmax(1)
    assert bool((order[1:] >= order[:-1]).all()), "from the lowest to the highest"


# ------------------------------------------------------------------------------- the mixture


def filtered(x: Array, gains: Array) -> Array:
    """Compute irFFT(gains * rFFT(x)) of a row [n, h]; gains [G, d] on the grid, complex or real."""
    n, most = len(x), SMALL["max_items"]
    at, own = np.arange(most // 2 + 1) / most, np.arange(n // 2 + 1) / n
    read = np.stack([np.interp(own, at, g) for g in gains.T], 1)
    out: Array = np.fft.irfft(read * np.fft.rfft(x, axis=0), n=n, axis=0)
    return out


def layer_norm(layer: Any, x: Array) -> Array:
    unit = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + layer.eps)
    out: Array = unit * layer.weight.numpy() + layer.bias.numpy()
    return out


def linear(layer: Any, x: Array) -> Array:
    out: Array = x @ layer.weight.numpy().T + layer.bias.numpy()
    return out


def by_filter(expert: Any, x: Array) -> Array:
    """Apply FMLP-Rec to one row."""
    x = layer_norm(expert.norm, x)
    for layer, gains in enumerate(expert.gains.numpy()):
        re, im = np.split(gains, 2, axis=1)
        x = layer_norm(expert.norms[2 * layer], x + filtered(x, re + 1j * im))
        wide = linear(expert.inner[layer], x)
        wide = wide * np.vectorize(lambda t: 0.5 * (1 + math.erf(t / math.sqrt(2))))(wide)
        x = layer_norm(expert.norms[2 * layer + 1], x + linear(expert.outer[layer], wide))
    return x


def by_convolution(expert: Any, x: Array) -> Array:
    """Apply NextItNet to one row: output t reads t, t - 2^l, t - 2 * 2^l."""
    x = layer_norm(expert.norm, x)
    for layer, convolve in enumerate(expert.convolutions):
        weight, out = convolve.weight.numpy(), np.zeros_like(x)
        for t in range(len(x)):
            out[t] = convolve.bias.numpy()
            for back in range(weight.shape[2]):
                if t - back * 2**layer >= 0:
                    out[t] += weight[:, :, weight.shape[2] - 1 - back] @ x[t - back * 2**layer]
        x = layer_norm(expert.norms[layer], x + np.maximum(out, 0))
    return x


@torch.no_grad()
def written_out(model: FamouSRec, row: list[int]) -> tuple[Array, Array, Array]:
    """Compute u_k [K, h], p [K] and u [h] of one history, in float64."""
    x = model.items.weight.numpy()[row]
    bands = 1 / (1 + np.exp(-model.bands.numpy()))
    heard = [filtered(x, band[:, None].repeat(x.shape[1], 1)) for band in bands.T]
    energy = [np.log(np.sum(part**2) + 1e-8) for part in heard]
    router: Any = model.router
    scores = linear(
        router[2],
        np.maximum(linear(router[0], np.concatenate((energy, x.mean(0)))[None]), 0),
    )[0]
    p = np.exp(scores) / np.exp(scores).sum()
    states = []
    expert: Any
    for expert, part in zip(model.experts, heard, strict=True):
        y = x + part
        if hasattr(expert, "gains"):
            states.append(by_filter(expert, y)[-1])
        elif hasattr(expert, "convolutions"):
            states.append(by_convolution(expert, y)[-1])
        elif hasattr(expert, "gru"):
            hidden = expert.gru(torch.from_numpy(y)[None])[0][0].numpy()
            states.append(layer_norm(expert.norm, linear(expert.out, hidden))[-1])
        else:
            all_real = torch.ones(1, len(row), dtype=torch.bool)
            states.append(expert.encoder(torch.from_numpy(y)[None], all_real)[0, -1].numpy())
    best = np.argsort(-p)[: model.config.top_n]
    user = sum((p[k] / p[best].sum() * states[k] for k in best), np.zeros(x.shape[1]))
    return np.stack(states), p, np.asarray(user)


@pytest.mark.parametrize(
    "changes", [{}, {"top_n": 4}, {"experts": ("gru", "filter", "filter"), "top_n": 1}]
)
def test_the_mixture_is_its_equations(changes: dict[str, Any]) -> None:
    """Compare rows of all lengths in one grid with each row written out alone."""
    model = shaken(build(**changes), 0.3).double()
    with torch.no_grad():
        model.router[2].weight *= 10  # so that users are told apart
        mixture = model(ROWS)
    for row in range(len(ROWS)):
        states, scores, user = written_out(model, ROWS[row].tolist())
        # The Fourier basis is stored in float32.
        np.testing.assert_allclose(mixture.states[row].numpy(), states, atol=1e-4)
        np.testing.assert_allclose(mixture.scores[row].numpy(), scores, atol=1e-4)
        np.testing.assert_allclose(mixture.user[row].numpy(), user, atol=1e-4)
    assert mixture.again is None
    assert mixture.chosen.sum(1).eq(model.config.top_n).all()
    assert len({tuple(order) for order in mixture.scores.argsort(1).tolist()}) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_company_changes_nothing(kind: Kind) -> None:
    model = shaken(build(experts=(kind, "gru"), top_n=1), 0.3)
    with torch.no_grad():
        together = model(ROWS)
        for row in range(len(ROWS)):
            alone = model(ROWS.take(np.array([row])))
            for name in ("states", "scores", "user"):
                torch.testing.assert_close(
                    getattr(alone, name)[0], getattr(together, name)[row], rtol=0, atol=1e-5
                )
    torch.testing.assert_close(model.encode_users(ROWS), together.user, rtol=0, atol=1e-5)


def test_every_kind_reads_order() -> None:
    backwards = Ragged.from_rows([[*ROWS[1][-2::-1], ROWS[1][-1]]])
    model = shaken(build(), 0.3)
    with torch.no_grad():
        first, second = (model(rows).states[0] for rows in (ROWS.take(np.array([1])), backwards))
    assert (first - second).abs().amax(1).gt(1e-2).all()


# ------------------------------------------------------------------------------- training


def test_a_batch_is_prefixes_and_what_follows() -> None:
    model = build(targets_per_user=3)
    (batch,) = batches_of(model, ROWS)
    assert len(batch.users) == sum(min(3, n - 1) for n in ROWS.lengths)
    for row, user in enumerate(batch.users):
        length = len(batch.histories[row])
        assert batch.histories[row].tolist() == ROWS[user][:length].tolist()
        assert batch.targets[row] == ROWS[user][length]


def test_specialization_tells_experts_apart() -> None:
    states, again = torch.randn(2, 3, 4, 5, dtype=torch.float64).unbind()
    unit = lambda v: v / v.norm()  # noqa: E731
    total = 0.0
    for b in range(3):
        for k in range(4):
            scores = [
                math.exp(float(unit(states[b, k]) @ unit(again[b, j])) / 0.3) for j in range(4)
            ]
            total -= math.log(scores[k] / sum(scores))
    assert float(specialization_loss(states, again, 0.3)) == pytest.approx(total / 12)


def test_alignment_tells_users_apart() -> None:
    states = torch.randn(4, 3, 5, dtype=torch.float64)
    users = torch.tensor([7, 2, 7, 5])
    unit = lambda v: v / v.norm()  # noqa: E731
    losses = []
    for k in range(3):
        for j in range(3):
            for b in range(4 * (k != j)):
                among = [c for c in range(4) if c == b or users[c] != users[b]]
                scores = {
                    c: math.exp(float(unit(states[b, k]) @ unit(states[c, j])) / 0.3) for c in among
                }
                losses.append(-math.log(scores[b] / sum(scores.values())))
    assert len(losses) == 24
    assert float(alignment_loss(states, users, 0.3)) == pytest.approx(np.mean(losses))


def test_the_loss_is_the_sum_of_its_parts() -> None:
    model = shaken(build(specialization=0.3, alignment=0.2, balance=0.05), 0.3)
    (batch,) = batches_of(model, ROWS)
    losses = model.loss(batch)
    mixture = model(batch.histories, twice=True)
    assert mixture.again is not None
    torch.testing.assert_close(mixture.again, mixture.states)  # no dropout in evaluation mode
    scores = model.scorer()(batch.histories)
    rec = torch.nn.functional.cross_entropy(scores, torch.from_numpy(batch.targets).long())
    share = mixture.chosen.float().mean(0) / model.config.top_n
    expected = {
        "rec": rec,
        "balance": 4 * (share * mixture.scores.mean(0)).sum(),
        "specialization": specialization_loss(mixture.states, mixture.states, 0.2),
        "alignment": alignment_loss(mixture.states, torch.from_numpy(batch.users), 0.2),
    }
    assert losses.parts.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses.parts[name], value.detach(), rtol=1e-4, atol=1e-5)
    weights = {"rec": 1.0, "specialization": 0.3, "alignment": 0.2, "balance": 0.05}
    total = sum(weights[name] * float(part) for name, part in losses.parts.items())
    assert float(losses.total.detach()) == pytest.approx(total, rel=1e-5)
    model.train()
    again = model(batch.histories, twice=True)
    assert not torch.allclose(again.states, again.again), "another dropout"


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        ({"specialization": 0.0}, {"specialization"}),
        ({"alignment": 0.0}, {"alignment"}),
        ({"experts": ("convolution", "gru"), "top_n": 2}, set()),
        ({"experts": ("transformer",) * 3}, set()),
    ],
)
def test_options_train(changes: dict[str, Any], gone: set[str]) -> None:
    model = build(**changes).train()
    (stage,) = model.stages(1e-3, 0.0)
    (batch,) = batches_of(model, ROWS)
    losses = stage.loss(batch)
    assert isinstance(losses.total, Tensor) and bool(losses.total.isfinite())
    assert set(losses.parts) == {"rec", "balance", "specialization", "alignment"} - gone
    losses.total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name


def test_what_is_refused() -> None:
    for changes, message in (
        ({"heads": 3}, "heads=3 does not divide dim=8"),
        ({"experts": ("gru",)}, "leaves no choice; name two or more"),
        ({"top_n": 5}, "top_n=5 exceeds the 4 experts"),
        ({"experts": ("gru", "lstm")}, "'transformer', 'gru', 'filter' or 'convolution'"),
    ):
        with pytest.raises(ValidationError, match=message):
            build(**changes)
    with pytest.raises(DataError, match="FamouSRec has a vector for each item it was trained on"):
        build().encode_items(["a drill"])


def test_random_rows_are_learned_by_heart() -> None:
    rng = np.random.default_rng(0)
    rows = Ragged.from_rows([rng.integers(N, size=6) for _ in range(24)])
    model = build(dim=32, inner=32, dropout=0.0, attention_dropout=0.0, targets_per_user=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for epoch in range(40):
        for batch in batches_of(model, rows, epoch=epoch, batch_users=64):
            optimizer.zero_grad()
            model.loss(batch).total.backward()
            optimizer.step()
    ranks = evaluate(model, rows.head(5), rows.values[rows.offsets[1:] - 1]).ranks
    assert float(np.mean(ranks == 1)) > 0.95
