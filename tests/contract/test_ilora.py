"""What is iLoRA's own; what every method promises is in test_methods.py."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import models, prompts, tiny

from l2rec.data.batches import Batch
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.data.synthetic import simple_text
from l2rec.methods.ilora import ILoRA, ILoRAConfig
from l2rec.methods.llara import LLaRA, TextOnly

N, K = 12, 3
TEXTS = [" ".join(simple_text(1007 * i).split()[: 1 + i % 4]) for i in range(N)]
HISTORIES = Ragged.from_rows([[3, 1, 4, 1, 5, 9], [2], [6, 5, 3, 5, 8], [8, 4]])
TARGETS = [0, 5, 11, 7]
SMALL: dict[str, Any] = {"max_items": 4, "item_tokens": 3, "id_dim": 8, "rank": 6, "beams": N}
TIED = {"tie_word_embeddings": True}


def build(family: str = "tied", method: Any = ILoRA, **options: Any) -> Any:
    """Build a model as if it were trained, in float64."""
    backbone = tiny.random_backbone(family, **(TIED if family == "tied" else {}))
    own = {"experts": K} if method is ILoRA else {}
    model = models.build(method, SMALL | own | options, Catalog.of_texts(TEXTS), backbone)
    return models.shaken(model, 0.3, still=("backbone.",)).double()


def batch(kind: type[Batch] = Batch) -> Batch:
    none = np.zeros((4, 0), dtype=np.int32)
    return kind(np.arange(4), HISTORIES.tail(4), np.array(TARGETS), none)


def literal_weights(model: ILoRA, history: list[int]) -> list[float]:
    """Compute w = softmax(W_g z) of one user, number by number."""
    z = model.sasrec.encode_users(Ragged.from_rows([history[-4:]]))[0].tolist()
    logits = [sum(w * x for w, x in zip(row, z, strict=True)) for row in model.gate.weight.tolist()]
    total = sum(math.exp(logit) for logit in logits)
    return [math.exp(logit) / total for logit in logits]


@torch.no_grad()
def test_weights_are_the_softmax_over_the_experts() -> None:
    model = build()
    found = model.expert_weights(HISTORIES.tail(4))
    expected = [literal_weights(model, history.tolist()) for history in HISTORIES]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found.std(0).min() > 0.01, "users differ"
    ranks = model.rank_weights(HISTORIES.tail(4))
    assert torch.equal(ranks, K * found[:, [0, 0, 1, 1, 2, 2]])


@pytest.mark.parametrize("kind", [Batch, TextOnly])
@torch.no_grad()
def test_the_loss_is_that_of_each_users_own_model(kind: type[Batch]) -> None:
    model, terms = build(), []
    for history, target in zip(HISTORIES, TARGETS, strict=True):
        items = history.tolist()
        bare = prompts.merged(model, "tied", literal_weights(model, items), **TIED)
        inputs = prompts.prompt(model, "tied", TEXTS, items, kind is Batch)
        terms += prompts.said(model, "tied", bare, inputs, TEXTS[target])
    expected = -torch.stack(terms).mean()
    assert float(model.loss(batch(kind)).total) == pytest.approx(float(expected), rel=1e-5)


@torch.no_grad()
def test_a_search_is_by_each_users_own_model() -> None:
    model = build()
    scores = build().float().scorer()(HISTORIES)
    for user, history in enumerate(HISTORIES):
        items = history.tolist()
        bare = prompts.merged(model, "tied", literal_weights(model, items), **TIED)
        inputs = prompts.prompt(model, "tied", TEXTS, items)
        for item, text in enumerate(TEXTS):
            expected = sum(map(float, prompts.said(model, "tied", bare, inputs, text)))
            assert float(scores[user, item]) == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_items_are_compared_by_each_users_own_model() -> None:
    model = build("bert", head="items")
    scores = model.scorer()(HISTORIES)
    items = model.item_vectors()
    for user, history in enumerate(HISTORIES):
        bare = prompts.merged(model, "bert", literal_weights(model, history.tolist()))
        inputs = prompts.prompt(model, "bert", TEXTS, history.tolist())
        expected = items @ prompts.states(bare, inputs)[-1]
        torch.testing.assert_close(scores[user], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("experts", [1, 2, 6])
@torch.no_grad()
def test_experts_of_even_weights_are_llara(experts: int) -> None:
    even, llara = build(experts=experts), build(method=LLaRA)
    even.gate.weight.zero_()
    llara.load_state_dict(even.state_dict(), strict=False)
    assert float(even.loss(batch()).total) == pytest.approx(float(llara.loss(batch()).total))


def test_the_gate_is_all_that_is_added() -> None:
    ours, llaras = (
        {n: p.shape for n, p in m.named_parameters()} for m in (build(), build(method=LLaRA))
    )
    assert ours == llaras | {"gate.weight": (K, 8)}


def test_the_gate_learns_and_sasrec_does_not() -> None:
    model = build().train()
    first, second = (model.loss(batch()).total for _ in range(2))
    first.backward()
    assert bool(model.gate.weight.grad.any())
    assert all(p.grad is None for p in model.sasrec.parameters())
    assert model.sasrec.training, "as it was"
    weights = [model.expert_weights(HISTORIES.tail(4)) for _ in range(2)]
    assert torch.equal(*weights), "read without dropout"
    assert not torch.equal(first, second), "LoRA is trained with dropout"


def test_experts_divide_the_rank() -> None:
    with pytest.raises(ValueError, match="experts=3 does not divide rank=8"):
        ILoRAConfig(experts=3)
