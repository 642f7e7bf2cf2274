"""Shapes on a ladder change no result; caches are bounded; room is given back."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import models, tiny
from torch import Tensor

from l2rec.config import BackboneConfig
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.data.synthetic import simple_text
from l2rec.methods.l2rec import L2Rec
from l2rec.modules import memory
from l2rec.modules.backbone import load_backbone
from l2rec.modules.experts import ViewSlice
from l2rec.modules.packing import Attend, Packing, lay, pack, split_groups

HISTORIES = Ragged.from_rows(
    [[3, 1, 4, 1, 5, 9], [2], [6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3], [8, 4], [6, 2, 6, 4]]
)


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 127, 128, 129, 300, 4095, 4096, 8191, 8192])
def test_rungs_are_powers_of_two_and_near(tokens: int) -> None:
    step = memory.rungs(tokens, torch.zeros(1, dtype=torch.bfloat16))
    assert step & (step - 1) == 0
    # The widest that is no more than a 64th of the tokens; below 64 each number is a rung.
    assert step == 1 or step * memory.RUNGS <= tokens
    assert 2 * step * memory.RUNGS > tokens


@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.float32, "cpu"), (torch.float16, "cpu"), (torch.bfloat16, "meta")]
)
def test_where_nothing_is_compiled_for_a_shape_there_is_no_ladder(
    dtype: torch.dtype, device: str
) -> None:
    assert memory.rungs(5000, torch.zeros(1, dtype=dtype, device=device)) == 1


def test_groups_are_filled_up_to_rungs() -> None:
    sizes = [[40, 61], [3, 2, 30]]
    parts = [(torch.ones(sum(rows), 4), *pack(torch.tensor(rows), Attend.FULL)) for rows in sizes]
    flat, packing = lay(parts, torch.bfloat16)
    assert memory.rungs(136, flat) == 2  # 101 and 35 tokens
    assert [(g.start, g.stop, g.filler) for g in packing.groups] == [(0, 101, 1), (102, 137, 1)]
    assert flat.dtype == torch.bfloat16
    assert flat[:, 0].tolist() == [1] * 101 + [0] + [1] * 35 + [0]
    positions = [i for rows in sizes for n in (*rows, 1) for i in range(n)]
    assert packing.positions.tolist() == positions
    assert (packing.tokens, len(packing.positions)) == (136, 138)
    grids = sum(b.rows * b.width for group in packing.groups for b in group.buckets)
    assert packing.computed == grids + 2
    assert [len(x) for x in split_groups(flat, packing)] == [101, 35]


@pytest.fixture
def laddered(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what switches a coarse ladder on, in any dtype."""
    return lambda: monkeypatch.setattr(memory, "rungs", lambda tokens, x: 16)


@pytest.mark.parametrize("family", ["bert", "roberta", "qwen3", "llama"])
def test_fillers_are_seen_by_none(family: str, laddered: Any) -> None:
    """Neither states nor gradients know of them, whatever they hold."""
    backbone = tiny.random_backbone(family)
    lengths = [[5, 1, 9], [2, 2]]
    attend = Attend.CAUSAL if backbone.causal else Attend.FULL
    x = [torch.randn(sum(rows), backbone.dim).requires_grad_() for rows in lengths]

    def run(noise: float) -> list[Tensor]:
        parts = [(one, *pack(torch.tensor(n), attend)) for one, n in zip(x, lengths, strict=True)]
        flat, packing = lay(parts, torch.float32)
        held = torch.zeros_like(flat)
        for group in packing.groups:
            held[group.stop : group.stop + group.filler] = noise
        states = split_groups(backbone(flat + held, packing), packing)
        weights = torch.linspace(-1, 1, backbone.dim)
        gradients = torch.autograd.grad(sum((s * weights).sum() for s in states), x)
        return [*(s.detach() for s in states), *gradients]

    alone = run(0.0)
    laddered()
    for noise in (0.0, 7.0):
        for a, b in zip(run(noise), alone, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def l2rec(**changes: Any) -> L2Rec:
    torch.manual_seed(0)
    texts = Catalog.of_texts([simple_text(7 * i) for i in range(20)])
    made: L2Rec = models.shaken(L2Rec(tiny.small(**changes), texts, tiny.random_backbone()))
    return made.train()


@pytest.mark.parametrize(
    "changes",
    [{}, {"personalized_router": False}, {"form": "catalog"}],
    ids=["paper", "no user in the router", "catalog"],
)
def test_losses_and_gradients_are_those_without_the_ladder(
    changes: dict[str, Any], laddered: Any
) -> None:
    """The load balance above all, a mean over tokens: fillers must not count."""

    def step() -> tuple[dict[str, float], int, dict[str, Tensor], list[list[float]]]:
        model = l2rec(**changes)
        batch = models.one_batch(model, HISTORIES)
        torch.manual_seed(1)
        losses = model.loss(batch)
        losses.total.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        load = model.expert_load(HISTORIES)
        assert load is not None
        shares = [share for view in load.experts.values() for share in view]
        parts = {name: float(part) for name, part in losses.parts.items()}
        return parts, losses.tokens, gradients, shares

    parts, tokens, gradients, load = step()
    laddered()
    on_ladder = step()
    assert "balance" in parts
    assert on_ladder[0] == pytest.approx(parts, rel=1e-5)
    assert on_ladder[1] == tokens
    assert on_ladder[2].keys() == gradients.keys()
    for name, gradient in gradients.items():  # float32 sums in another order
        torch.testing.assert_close(on_ladder[2][name], gradient, rtol=1e-4, atol=5e-6, msg=name)
    np.testing.assert_allclose(on_ladder[3], load, rtol=1e-5, atol=1e-7)


def test_a_filler_that_counted_would_be_seen(laddered: Any) -> None:
    """The balance of the test above moves if fillers are taken for tokens."""
    laddered()
    model = l2rec()
    flat, packing = model_input(model)
    found = []
    for filler in (packing.groups[0].filler, 0):
        part = replace(one_slice(model, packing), filler=filler)
        with torch.no_grad(), model.experts.routed([part]) as routing:
            model.backbone(flat, packing)
        found.append(routing.balance[0])
    assert not torch.allclose(found[0], found[1], rtol=1e-5)


def model_input(model: L2Rec) -> tuple[Tensor, Packing]:
    rows = torch.tensor([5, 2])
    x = model.backbone.embed(torch.arange(3, 10))
    return lay([(x, *pack(rows, Attend.FULL))], torch.float32)


def one_slice(model: L2Rec, packing: Packing) -> ViewSlice:
    users = torch.zeros(7, dtype=torch.int64)
    return ViewSlice.of_group(0, packing.groups[0], torch.ones(1, model.backbone.dim), users)


# -- caches and free room ------------------------------------------------------------------------


def test_caches_are_bounded_where_the_user_has_not_done_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = memory.CACHES
    monkeypatch.setenv(one, "777")
    monkeypatch.delenv(other, raising=False)
    memory.bound_caches()
    assert os.environ[one] == "777" and os.environ[other] == str(memory.CACHED)


def test_a_backbone_bounds_them_when_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in memory.CACHES:
        monkeypatch.delenv(name, raising=False)
    load_backbone(BackboneConfig(name="minilm"), "meta")
    assert {os.environ[name] for name in memory.CACHES} == {str(memory.CACHED)}


def test_room_is_given_back_every_few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[int] = []
    monkeypatch.setattr(memory, "PASSES", 3)
    model = tiny.random_backbone()
    monkeypatch.setattr(memory, "trim", lambda: trims.append(model._passes))
    flat, packing = lay(
        [(model.embed(torch.arange(5)), *pack(torch.tensor([5]), Attend.FULL))], torch.float32
    )
    model._passes = 0
    for _ in range(7):
        model(flat, packing)
    assert trims == [3, 6]


def test_trim_is_harmless_where_the_library_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    memory.trim()  # the one of this machine

    def other(name: None) -> object:
        return object()

    monkeypatch.setattr(memory.ctypes, "CDLL", other)
    memory._malloc_trim.cache_clear()
    assert memory._malloc_trim() is None
    memory.trim()
    memory._malloc_trim.cache_clear()
