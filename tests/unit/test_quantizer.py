"""The residual quantiser, against loops over vectors and levels."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from l2rec.modules.quantizer import ResidualQuantizer, balanced, usage

N, D, W, LEVELS, CODES = 60, 6, 3, 3, 8


def clustered(n: int = N, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, D, generator=generator) * 3
    which = torch.randint(5, (n,), generator=generator)
    return centres[which] + torch.randn(n, D, generator=generator) * 0.5


def quantizer(seed: int = 0, sinkhorn: float = 0.0) -> ResidualQuantizer:
    torch.manual_seed(seed)
    return ResidualQuantizer(D, hidden=(5,), width=W, levels=LEVELS, codes=CODES, sinkhorn=sinkhorn)


def literal(model: ResidualQuantizer, x: Tensor) -> tuple[list[list[int]], float]:
    """Codes and loss, one vector after the other, in float64."""
    codes, reconstruction, codebook = [], 0.0, 0.0
    books = model.codebooks.detach().double().numpy()
    encode, decode = model.encoder.double(), model.decoder.double()
    with torch.no_grad():
        for row in x.double():
            residual = encode(row).numpy()
            whole, of_row = np.zeros(W), []
            for book in books:
                distances = [float(((residual - code) ** 2).sum()) for code in book]
                best = int(np.argmin(distances))
                of_row.append(best)
                codebook += distances[best]
                whole, residual = whole + book[best], residual - book[best]
            codes.append(of_row)
            error = decode(torch.from_numpy(whole)).numpy() - row.numpy()
            reconstruction += float((error**2).sum())
    model.float()
    loss = reconstruction / (len(x) * D) + 1.25 * codebook / (len(x) * W * LEVELS)
    return codes, loss


def total(parts: dict[str, Tensor]) -> float:
    return sum(float(part.detach()) for part in parts.values())


def test_codes_and_loss_are_those_of_the_equations() -> None:
    model, x = quantizer(), clustered()
    model.fill(x, seed=0)
    codes, loss = literal(model, x)
    _, found, parts = model(x)
    assert found.codes.tolist() == codes == model.codes(x).tolist()
    assert total(parts) == pytest.approx(loss, rel=1e-5)


def test_gradients_pass_the_choice_of_a_code() -> None:
    model, x = quantizer(), clustered()
    model.fill(x, seed=0)
    z, found, parts = model(x)
    torch.testing.assert_close(z, found.vectors.sum(1))
    encoder = model.encoder[0].weight
    (of_reconstruction,) = torch.autograd.grad(parts["reconstruction"], encoder, retain_graph=True)
    assert float(of_reconstruction.abs().sum()) > 0
    for part, moved, still in (
        ("codebook", model.codebooks, encoder),
        ("commitment", encoder, model.codebooks),
    ):
        got = torch.autograd.grad(parts[part], (moved, still), retain_graph=True, allow_unused=True)
        assert got[0] is not None and float(got[0].abs().sum()) > 0
        assert got[1] is None, "stopped"


def test_filling_and_training_bring_the_error_down() -> None:
    model, x = quantizer(), clustered()
    with torch.no_grad():
        before = total(model(x)[2])
    model.fill(x, seed=0)
    with torch.no_grad():
        filled = total(model(x)[2])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        parts = model(x)[2]
        torch.stack(list(parts.values())).sum().backward()
        optimizer.step()
    assert total(parts) < 0.5 * filled < 0.5 * before


def test_same_seed_same_codebooks() -> None:
    books = []
    for seed in (1, 1, 2):
        model = quantizer()
        model.fill(clustered(), seed=seed)
        books.append(model.codebooks.detach().clone())
    assert torch.equal(books[0], books[1]) and not torch.equal(books[0], books[2])


def test_fewer_vectors_than_codes() -> None:
    model, x = quantizer(), clustered(4)
    model.fill(x, seed=0)
    assert bool(model.codebooks.isfinite().all())
    assert usage(model.codes(x), CODES).collisions[-1] == 0


def test_dead_codes_come_back() -> None:
    model, x = quantizer(), clustered(400)
    model.fill(x, seed=0)
    with torch.no_grad():
        model.codebooks[:, 2:] += 1000
    assert usage(model.codes(x), CODES).used[0] <= 2 / CODES
    assert model.revive(x) >= 3 * (CODES - 2)
    assert usage(model.codes(x), CODES).used[0] >= 0.5
    model.eval()
    assert usage(model.codes(x), CODES).used[0] >= 0.5


def test_a_balanced_assignment_uses_all_codes() -> None:
    distances = torch.rand(64, 8, generator=torch.Generator().manual_seed(0))
    distances[:, 0] -= 0.5  # the nearest of nearly all
    nearest, even = distances.argmin(-1), balanced(distances, 0.05)
    assert (torch.bincount(nearest, minlength=8) == 0).any() or nearest.bincount().max() > 40
    counts = torch.bincount(even, minlength=8)
    assert int(counts.min()) >= 5 and int(counts.max()) <= 12


def test_balance_is_of_the_last_level_in_training_alone() -> None:
    x = clustered(200)
    plain, even = quantizer(), quantizer(sinkhorn=0.02)
    for model in (plain, even):
        model.fill(x, seed=0)
    a, b = plain(x)[1].codes, even(x)[1].codes
    assert torch.equal(a[:, :-1], b[:, :-1]) and not torch.equal(a[:, -1], b[:, -1])
    assert torch.equal(plain.codes(x), even.codes(x))
    assert even.training


def test_balance_compares_squared_distances() -> None:
    """As the published code of LC-Rec and LETTER does."""
    x = clustered(200)
    model = quantizer(sinkhorn=0.02)
    model.fill(x, seed=0)
    found = model(x)[1]
    left, book = found.residuals[:, -1].detach(), model.codebooks[-1].detach()
    squared = (left[:, None] - book[None]).square().sum(-1)
    assert torch.equal(found.codes[:, -1], balanced(squared, 0.02))
    assert not torch.equal(found.codes[:, -1], balanced(squared.sqrt(), 0.02))


def test_usage_by_hand() -> None:
    codes = torch.tensor([[0, 1], [0, 1], [1, 1], [1, 0]])
    found = usage(codes, 4)
    assert found.used == [0.5, 0.5]
    assert found.perplexity[0] == pytest.approx(2)
    share = [c / 4 for c in Counter(codes[:, 1].tolist()).values()]
    assert found.perplexity[1] == pytest.approx(math.exp(-sum(p * math.log(p) for p in share)))
    assert found.collisions == [1.0, 0.5]
