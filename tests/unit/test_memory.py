"""Caches of compiled shapes are bounded, and free room is given back."""

from __future__ import annotations

import os

import pytest
import torch
from tests.support import tiny

from l2rec.config import BackboneConfig
from l2rec.modules import memory
from l2rec.modules.backbone import Attend, Packing, load_backbone, pack


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
    group, positions = pack(torch.tensor([5]), Attend.FULL)
    model._passes = 0
    for _ in range(7):
        model(model.embed(torch.arange(5)), Packing((group,), positions))
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
