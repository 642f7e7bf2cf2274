"""HDRec: fusion and Algorithm 1 as the paper writes them, no leaks, the effects of options."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import models, tiny
from tests.support.models import batches_of
from torch import Tensor
from torch.nn import functional as F

from l2rec.data.batches import Batch
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.data.synthetic import simple_text
from l2rec.errors import ConfigError, DataError
from l2rec.methods.hdrec import HDRec, HDRecConfig, fuse
from l2rec.protocols import Losses, Recommender, TakesNewItems, Trainable, updates

N = 20
TEXTS = [simple_text(1000 * i + 7 * i) for i in range(N)]
HISTORIES = Ragged.from_rows([[3, 1, 4, 1, 5, 9], [2], [6, 5, 3, 5, 8], [8, 4]])
FAMILIES = ("bert", "qwen3", "llama")
SMALL: dict[str, Any] = {"max_items": 8, "item_tokens": 6, "max_tokens": 256, "id_dim": 8}


def build(family: str = "bert", seed: int = 0, **changes: Any) -> HDRec:
    backbone = tiny.random_backbone(family)
    model: HDRec = models.build(
        HDRec, SMALL | changes, Catalog.of_texts(TEXTS), backbone, seed=seed
    )
    with torch.no_grad():  # as if trained: no adapter is silent
        for name, parameter in model.named_parameters():
            if name.startswith(("lora.", "ipl.")):
                parameter += 0.1 * torch.randn(parameter.shape)
    return model


def parts_of(names: set[str]) -> set[str]:
    """Return the parts of the model to which the named parameters belong."""
    return {name.rsplit(".", 2)[0] if name[0] in "li" else name.split(".")[0] for name in names}


# ------------------------------------------------------------------------------- fusion


def literal_fusion(text: list[float], identity: list[float], alpha: float) -> list[float]:
    """Compute Eq. 13-18 one number at a time."""
    center = sum(identity) / len(identity)
    lowest = min(identity)
    return [
        t + alpha * (z - lowest + 1e-8) / (1 + math.exp(-(z - center)))
        for t, z in zip(text, identity, strict=True)
    ]


def test_fusion_is_eq_13_to_18() -> None:
    torch.manual_seed(0)
    text, identity = (torch.randn(3, 7, dtype=torch.float64) * 3 for _ in range(2))

    def rows(a: Tensor, b: Tensor, alpha: float) -> Tensor:
        pairs = zip(a.tolist(), b.tolist(), strict=True)
        return torch.tensor([literal_fusion(t, z, alpha) for t, z in pairs], dtype=torch.float64)

    for alpha in (0.0, 0.5, 1.0):
        torch.testing.assert_close(fuse(text, identity, alpha), rows(text, identity, alpha))
        swapped = fuse(text, identity, alpha, dominant="id")
        torch.testing.assert_close(swapped, rows(identity, text, alpha))
        both = fuse(text, identity, alpha, dominant="both")
        own = rows(torch.zeros_like(text), text, 1.0)
        torch.testing.assert_close(both, rows(own, identity, alpha))
        literal = fuse(text, identity, alpha, calibrate="probabilities")
        torch.testing.assert_close(literal, rows(text.softmax(-1), identity.softmax(-1), alpha))
    assert torch.equal(fuse(text, identity, 0.0), text), "alpha = 0 is the text side alone"


def test_scores_are_the_fused_logits() -> None:
    model = build(alpha=0.7).eval()
    assert isinstance(model, Recommender) and isinstance(model, Trainable)
    text, identity = model.side_logits(HISTORIES)
    assert text.shape == identity.shape == (4, N)
    torch.testing.assert_close(model.scorer()(HISTORIES), fuse(text, identity, 0.7))
    assert not torch.allclose(text, identity, atol=0.1)


# ------------------------------------------------------------------------------- Algorithm 1


def literal_alternation(model: HDRec, batch: Batch, steps: int, lr: float) -> int:
    """Run Algorithm 1 on one batch, line by line, by gradient descent; count its updates."""
    rows, targets = batch.histories, torch.from_numpy(batch.targets).long()
    kl_weight = model.config.kl
    text_side = [p for n, p in model.named_parameters() if n.startswith(("lora.0", "ipl", "seq"))]
    id_side = [
        p for n, p in model.named_parameters() if n.startswith(("lora.1", "ipl", "seq", "project"))
    ]

    def kl(q: Tensor, p: Tensor) -> Tensor:
        q, p = q.softmax(-1), p.softmax(-1)
        return (q * (q.log() - p.log())).sum(-1).mean()

    def descend(loss: Tensor, parameters: list[Any]) -> None:
        for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            with torch.no_grad():
                parameter -= lr * grad

    done, held_id = 0, None
    for t in range(1, steps + 1):
        z_text = model.read(rows, "text", every=True).logits
        if t > 1:
            assert held_id is not None
            loss = F.cross_entropy(z_text, targets) + kl_weight * kl(held_id, z_text)
            descend(loss, text_side)
            done += 1
        held_text = z_text.detach()
        z_id = model.read(rows, "id", every=True).logits
        if t < steps:
            loss = F.cross_entropy(z_id, targets) + kl_weight * kl(held_text, z_id)
            descend(loss, id_side)
            done += 1
        held_id = z_id.detach()
    return done


@pytest.mark.parametrize("family", ["bert", "qwen3"])
@pytest.mark.parametrize("steps", [2, 3])
def test_alternation_is_algorithm_1(family: str, steps: int) -> None:
    ours, literal = (build(family, align=0.0, steps=steps).double() for _ in range(2))
    batch, lr = batches_of(ours, HISTORIES)[0], 0.05
    expected = literal_alternation(literal, batch, steps, lr)
    stage = ours.stages(1e-3, 0.0)[-1]
    optimizer = torch.optim.SGD([p for g in stage.groups for p in g.parameters], lr=lr)
    phases = []
    for losses in updates(ours.loss(batch)):
        optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        optimizer.step()
        phases.append("text" if "text" in losses.parts else "id")
    assert phases == ["id", "text"] * (steps - 1), (
        "neither the first text step nor the last id step"
    )
    assert len(phases) == expected
    theirs = dict(literal.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-9, atol=1e-9)
    fresh = dict(build(family, align=0.0, steps=steps).double().named_parameters())
    moved = {n for n, p in ours.named_parameters() if not torch.equal(p, fresh[n])}
    assert parts_of(moved) == {"lora.0", "lora.1", "ipl.0", "seq", "project"}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_phase_moves_its_own_side_alone(family: str) -> None:
    model = build(family)
    seen = []
    for losses in updates(model.loss(batches_of(model, HISTORIES)[0])):
        model.zero_grad(set_to_none=True)
        losses.total.backward()
        seen.append(parts_of({n for n, p in model.named_parameters() if p.grad is not None}))
        assert losses.tokens > 0 and losses.computed_tokens >= losses.tokens
    assert seen == [
        {"lora.1", "ipl.0", "seq", "project"},
        {"lora.0", "ipl.0", "seq", "align"},
    ]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"alternate": False}, {"text", "id", "kl_text", "kl_id", "align"}),
        ({"alternate": False, "kl": 0.0}, {"text", "id", "align"}),
        ({"training_loss": "fused"}, {"fused"}),
        ({"design": "text"}, {"text", "align"}),
        ({"design": "id"}, {"id"}),
        ({"design": "early"}, {"text", "align"}),
        ({"design": "late"}, {"text", "align"}),
    ],
    ids=lambda value: ",".join(sorted(map(str, value))),
)
def test_switches_that_train_in_one_pass(changes: dict[str, Any], parts: set[str]) -> None:
    model = build(**changes)
    losses = model.loss(batches_of(model, HISTORIES)[0])
    assert isinstance(losses, Losses) and set(losses.parts) == parts
    losses.total.backward()
    stage = model.stages(1e-3, 0.0)[-1]
    declared = {p for g in stage.groups for p in g.parameters}
    given = {p for p in model.parameters() if p.grad is not None}
    assert declared == given & declared and bool(losses.total.isfinite())
    if changes.get("design") != "late":
        assert not any(
            p in declared for p in getattr(model, "sasrec", torch.nn.Module()).parameters()
        )


def test_adapters_and_heads_are_shared_or_not() -> None:
    def sizes(**changes: Any) -> tuple[int, int]:
        model = build(**changes)
        return len(model.lora), len(model.ipl)

    assert sizes() == (2, 1) and sizes(adapters=1) == (1, 1) and sizes(heads=2) == (2, 2)
    assert sizes(design="text") == (1, 1)
    one = build(adapters=1)
    for losses in updates(one.loss(batches_of(one, HISTORIES)[0])):
        losses.total.backward()
    assert all(p.grad is not None for p in one.lora.parameters())


def test_sasrec_comes_first_and_is_then_frozen() -> None:
    model = build()
    first, second = model.stages(1e-3, 0.1)
    assert first.validates is model.sasrec and second.validates is None
    assert {p for g in first.groups for p in g.parameters} == set(model.sasrec.parameters())
    assert not {p for g in second.groups for p in g.parameters} & set(model.sasrec.parameters())
    assert len(build(pretrained_id=False).stages(1e-3, 0.1)) == 1
    assert len(build(design="text").stages(1e-3, 0.1)) == 1
    scratch = build(pretrained_id=False).stages(1e-3, 0.1)[0]
    assert sum(p.ndim == 2 and p.shape == (N, 8) for g in scratch.groups for p in g.parameters) == 1


# ------------------------------------------------------------------------------- no leaks


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("design", ["hybrid", "early", "late"])
def test_a_position_reads_as_its_prefix_alone(family: str, design: str) -> None:
    model = build(family, design=design).eval()
    rows = [HISTORIES[i].tolist() for i in range(len(HISTORIES))]
    prefixes = Ragged.from_rows([row[: t + 1] for row in rows for t in range(len(row))])
    with torch.no_grad():
        for side in model.sides:
            every = model.read(HISTORIES, side, every=True).logits
            alone = model.read(prefixes, side, every=False).logits
            torch.testing.assert_close(every, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_do_not_depend_on_the_batch(family: str) -> None:
    model = build(family).eval()
    together = model.scorer()(HISTORIES)
    alone = [model.scorer()(HISTORIES.take(np.array([i]))) for i in range(len(HISTORIES))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    longer = Ragged.from_rows([[7] * 5 + HISTORIES[i].tolist()[-8:] for i in range(4)])
    model_of_two = build(family, max_items=2).eval()
    newest = longer.tail(2)
    torch.testing.assert_close(model_of_two.scorer()(longer), model_of_two.scorer()(newest))


# ------------------------------------------------------------------------------- new items


@pytest.mark.parametrize("design", ["hybrid", "text", "early"])
def test_a_new_item_borrows_the_rows_of_those_it_reads_like(design: str) -> None:
    model = build(design=design, neighbours=1).eval()
    assert isinstance(model, TakesNewItems)
    before = model.scorer()(HISTORIES)
    added = model.add_items([TEXTS[4], "a red lamp"])
    assert added.tolist() == [N, N + 1] and model.n_items == N + 2
    after = model.scorer()(HISTORIES)
    assert after.shape == (4, N + 2)
    for new in (N, N + 1):  # one neighbour: exactly its logits
        same = (after[:, :N] - after[:, new : new + 1]).abs().amax(0)
        assert float(same.min()) < 1e-4
    if design in ("text", "early"):
        torch.testing.assert_close(after[:, :N], before, rtol=1e-4, atol=1e-4)
    assert bool(model.scorer()(Ragged.from_rows([[N], [3, N + 1]])).isfinite().all())
    with pytest.raises(DataError, match="needs a text"):
        model.add_items([" "])


def test_what_is_refused() -> None:
    for design in ("id", "late"):
        with pytest.raises(ConfigError, match=f"design={design} ranks what it was trained on"):
            build(design=design).add_items(["a red lamp"])
    for changes in ({"align": 0.0}, {"training_loss": "fused"}, {"design": "text", "align": 0.0}):
        model = build(**changes)  # [ALIGN] is no trained parameter
        with pytest.raises(ConfigError, match=r"HDRec without Task 1 .* train it with align=1"):
            model.add_items(["a red lamp"])
        assert model.n_items == N
    with pytest.raises(ConfigError, match="max_items=50 of item_tokens=6 and the prompt may need"):
        build(max_items=50)
    with pytest.raises(ValueError, match="heads=2 and training_loss=fused need design=hybrid"):
        HDRecConfig(design="text", heads=2)
    with pytest.raises(DataError, match="HDRec reads item texts"):
        HDRec(HDRecConfig(**SMALL), Catalog.of_texts(["", ""]), tiny.random_backbone())
    with pytest.raises(DataError, match="empty history"):
        build().scorer()(Ragged.from_rows([[]]))
