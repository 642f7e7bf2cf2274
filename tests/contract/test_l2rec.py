"""What L2Rec promises: switches do what they say, nothing leaks, batches do not matter."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tests.support import reference, tiny
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, Qwen3Config

from l2rec.data.batches import Batch
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.data.splits import leave_one_out
from l2rec.data.synthetic import simple_text
from l2rec.errors import ConfigError, DataError
from l2rec.methods import l2rec
from l2rec.methods.l2rec import L2Rec, L2RecConfig
from l2rec.modules import item_text
from l2rec.modules.backbone import Backbone
from l2rec.modules.item_side import CatalogItems
from l2rec.protocols import Embedder, Recommender, Trainable
from l2rec.runs.checkpoint import load_trained, trained_tensors

N = 20
TEXTS = [
    " ".join(simple_text(1000 * i + 7 * i).split()[: 2 + i % 3] * (1 + i % 2)) for i in range(N)
]
HISTORIES = Ragged.from_rows(
    [[3, 1, 4, 1, 5, 9], [2], [6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3], [8, 4], [6, 2, 6, 4]]
)
FAMILIES = ("bert", "qwen3")
CATALOG = {"form": "catalog", "item_residual": True}


def build(family: str = "bert", seed: int = 0, texts: list[str] = TEXTS, **changes: Any) -> L2Rec:
    backbone = tiny.random_backbone(family)
    torch.manual_seed(seed)
    return L2Rec(tiny.small(**changes), Catalog.of_texts(texts), backbone)


def shaken(model: L2Rec, seed: int = 1) -> L2Rec:
    """As if trained: no parameter at its neutral start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("backbone.") and name not in ("log_temperature", "blend"):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def one_batch(model: L2Rec, sequences: Ragged = HISTORIES, **options: Any) -> Batch:
    made = model.batches(
        sequences, **{"seed": 0, "epoch": 0, "batch_users": 99, "batch_tokens": 10**6} | options
    )
    assert len(made) == 1
    return next(made.iterate())


def begin(model: L2Rec) -> None:
    """Do what the training loop does before an epoch."""
    (stage,) = model.stages(1e-3, 0.1)
    assert stage.begin_epoch is not None
    stage.begin_epoch(0)


def trained_names(model: L2Rec) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------- it trains


OPTIONS: list[dict[str, Any]] = [
    {},
    {"views": ("semantic",)},
    {"views": ("behavioral",)},
    {"views": ("behavioral", "semantic")},
    {"personalized_router": False},
    {"shared_experts": 0},
    {"view_experts": 1, "top_n": 1},
    {"top_n": 4},
    {"matrices": ("q", "k", "v", "o")},
    {"normalize_views": True},
    {"behavioral_pool": "encoder"},
    {"bpc": 0.0, "balance": 0.0},
    {"negatives": 0},
    {"share_negatives": True},
    {"max_tokens": 20, "semantic_items": 3},
    {"item_layers": 1},
    {"user_norm": True, "gate_norm": True},
    {"project_items": False},
    CATALOG,
    CATALOG | {"item_layers": 1, "user_norm": True},
    CATALOG | {"item_layers": 1, "views": ("semantic",)},
    CATALOG | {"semantic_items": 2},
    CATALOG | {"views": ("behavioral",), "item_residual": False},
    CATALOG | {"views": ("semantic",), "personalized_router": False, "text_dropout": 0.3},
    CATALOG | {"matrices": ()},
    CATALOG | {"project_items": False},
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: ",".join(map(str, o.values())) or "paper"
)
def test_loss_and_gradients(family: str, options: dict[str, Any]) -> None:
    model = shaken(build(family, **options)).train()
    assert isinstance(model, Recommender) and isinstance(model, Embedder)
    assert isinstance(model, Trainable)
    batch = one_batch(model)
    begin(model)
    losses = model.loss(batch)
    assert losses.total.shape == () and bool(losses.total.isfinite())
    assert losses.tokens > 0 and losses.computed_tokens >= losses.tokens
    both = len(model.config.views) == 2
    expected = {"rec"} | ({"bpc"} if both and model.config.bpc else set())
    expected |= {"balance"} if model.config.balance and model.config.matrices else set()
    assert set(losses.parts) == expected
    weights = {"rec": 1, "bpc": model.config.bpc, "balance": model.config.balance}
    total = sum(weights[name] * float(part) for name, part in losses.parts.items())
    assert float(losses.total.detach()) == pytest.approx(total, rel=1e-5)
    assert not any(part.requires_grad for part in losses.parts.values())

    losses.total.backward()
    unused = {"semantic", "behavioral"} - set(model.config.views)
    for name, parameter in model.named_parameters():
        if name.startswith("backbone."):
            assert not parameter.requires_grad and parameter.grad is None, name
        if parameter.grad is None:
            continue
        assert parameter.requires_grad, name
        assert bool(parameter.grad.isfinite().all()), name
    silent = {
        name
        for name, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.any())
    }
    allowed = set()
    if unused:
        allowed |= {f"fusion.{part}" for part in ("gate.weight", "gate.bias")}
        allowed |= {f"fusion.project_{view}.{p}" for view in unused for p in ("weight", "bias")}
    if "behavioral" in unused:
        allowed |= {"projector.linear.weight", "projector.linear.bias", "projector.gain"}
    if model.config.form == "catalog" and "behavioral" in unused:
        allowed |= {"items.table.residual"}
    if model.config.form == "catalog" and "semantic" in unused:
        allowed |= {"blend"}
    if not model.config.shared_experts:
        allowed |= {n for n in silent if ".shared_" in n}
    if model.config.view_experts == 1:
        allowed |= {n for n in silent if "router" in n or "user_out" in n}
    assert silent <= allowed


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_hold_every_trained_tensor_once(family: str) -> None:
    model = build(family, **CATALOG)
    (stage,) = model.stages(1e-3, 0.1)
    ids = [id(p) for group in stage.groups for p in group.parameters]
    named = dict(model.named_parameters())
    assert sorted(ids) == sorted(id(named[name]) for name in trained_names(model))
    rates = {group.name: (group.lr, group.weight_decay) for group in stage.groups}
    assert rates == {"matrices": (1e-3, 0.1), "vectors": (1e-3, 0.0), "table": (2e-4, 0.0)}
    assert "blend" in trained_names(model)
    assert not {"blend", "log_temperature"} & trained_names(build(family))


def test_same_seed_same_losses() -> None:
    def run(seed: int) -> list[float]:
        model = build(seed=seed, **CATALOG).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses = []
        for epoch in range(4):
            made = model.batches(HISTORIES, seed=seed, epoch=epoch, batch_users=2, batch_tokens=200)
            for batch in made.iterate():
                total = model.loss(batch).total
                optimizer.zero_grad()
                total.backward()
                optimizer.step()
                losses.append(float(total.detach()))
        return losses

    assert run(0) == run(0) != run(1)


# ------------------------------------------------------------------------------- ablations


def test_without_adaptation_nothing_is_trained_and_experts_are_silent() -> None:
    model = shaken(build(adapt=False))
    assert not trained_names(model) and model.stages(1e-3, 0.1) == []
    state = model.user_states(HISTORIES)
    assert state.routing is None
    with torch.no_grad():
        for parameter in model.experts.parameters():
            parameter.normal_()
    assert torch.equal(model.user_states(HISTORIES).fused, state.fused)


@pytest.mark.parametrize("changes", [{}, CATALOG], ids=["paper", "catalog"])
def test_untrained_and_unadapted_are_the_same_point(changes: dict[str, Any]) -> None:
    """B = 0, P_v = 0, the gate at one half: training starts at the zero-shot backbone."""
    ours, bare = (build(adapt=adapt, **changes).user_states(HISTORIES) for adapt in (True, False))
    assert torch.equal(ours.fused, bare.fused)
    assert ours.behavioral is not None and ours.semantic is not None
    torch.testing.assert_close(ours.fused, (ours.behavioral + ours.semantic) / 2)


@pytest.mark.parametrize("view", ["semantic", "behavioral"])
def test_one_view_alone(view: str) -> None:
    other = {"semantic": "behavioral", "behavioral": "semantic"}[view]
    both = shaken(build())
    model = build(views=(view,))
    theirs = dict(both.named_parameters())
    v = 0 if view == "semantic" else 1
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = theirs[name]
            parameter.copy_(value if value.shape == parameter.shape else value[v : v + 1])
    state = model.user_states(HISTORIES)
    assert getattr(state, other) is None and state.delta is None
    assert torch.equal(getattr(state, view), state.fused)
    expected = getattr(both.user_states(HISTORIES), view)
    torch.testing.assert_close(state.fused, expected, rtol=1e-4, atol=1e-5)
    gone = {"semantic": ("projector.", "fusion.project_b"), "behavioral": ("fusion.project_s",)}
    off = (*gone[view], "fusion.gate")
    assert not [name for name in trained_names(model) if name.startswith(off)]


def test_without_semantic_texts_are_read_as_one_vector() -> None:
    words = [" ".join(reversed(text.split())) for text in TEXTS]  # the same bag of words
    whole = {"item_tokens": 12, "max_tokens": 128}
    vectors = {
        view: [
            build(texts=texts, views=(view,), **whole).encode_users(HISTORIES)
            for texts in (TEXTS, words)
        ]
        for view in ("semantic", "behavioral")
    }
    torch.testing.assert_close(*vectors["behavioral"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(*vectors["semantic"], atol=1e-2)


def test_without_the_personal_router() -> None:
    personal, plain = (build(personalized_router=p) for p in (True, False))
    gone = trained_names(personal) - trained_names(plain)
    assert gone == {
        f"experts.{name}" for name in ("router_u", "router_u_bias", "user_out", "user_out_bias")
    }


def test_w_o_bpc_leaves_the_rest_alone() -> None:
    with_it, without = (shaken(build(bpc=weight)) for weight in (0.5, 0.0))
    batch = one_batch(with_it)
    a, b = with_it.loss(batch), without.loss(batch)
    assert float(a.parts["rec"]) == float(b.parts["rec"])
    assert float((a.total - b.total).detach()) == pytest.approx(
        0.5 * float(a.parts["bpc"]), rel=1e-4
    )


# ------------------------------------------------------------------------------- the loss


def test_rec_is_eq_8_over_the_right_negatives() -> None:
    model = shaken(build(bpc=0.0, balance=0.0))
    # The second row's sampled items hold its own positive; the third shares the first's.
    batch = Batch(
        users=np.arange(3),
        histories=Ragged.from_rows([[3, 1], [2], [6, 5, 3]]),
        targets=np.array([7, 8, 7], dtype=np.int32),
        negatives=np.array([[10, 11], [8, 12], [10, 10]], dtype=np.int32),
    )
    sets = [{8, 10, 11}, {7, 12}, {8, 10}]
    users, items = (
        model.encode_users(batch.histories),
        model.encode_items(np.arange(N, dtype=np.int32)),
    )
    scores = (users @ items.T / model.config.temperature).double()
    expected = reference.recommendation_loss(scores, [7, 8, 7], [sorted(s) for s in sets])
    assert float(model.loss(batch).total.detach()) == pytest.approx(float(expected), rel=1e-4)
    shared = [{8, 10, 11, 12}, {7, 10, 11, 12}, {8, 10, 11, 12}]
    expected = reference.recommendation_loss(scores, [7, 8, 7], [sorted(s) for s in shared])
    model = shaken(build(bpc=0.0, balance=0.0, share_negatives=True))
    assert float(model.loss(batch).total.detach()) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes", [{}, {"semantic_items": 3}])
def test_every_position_predicts_its_own_next_item(family: str, changes: dict[str, Any]) -> None:
    """Check that the loss is that of all prefixes that the views still hold."""
    model = shaken(build(family, **CATALOG | changes, bpc=0.0, balance=0.0)).eval()
    batch = one_batch(model)
    begin(model)
    with torch.no_grad():
        state = model(batch.histories, every=True)
        each, total = by_the_book(model, batch), float(model.loss(batch).total)
    rows = batch.histories
    for position, row in zip(state.position.tolist(), state.row.tolist(), strict=True):
        assert rows.offsets[row] <= position < rows.offsets[row + 1]
    assert total == pytest.approx(np.mean(each), rel=1e-4)
    if not changes:
        assert len(state.position) == len(rows.values), "no position is left out"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [0, 1])
def test_a_position_reads_as_its_prefix_alone(family: str, layers: int) -> None:
    """What is trained at position t is what is asked for a user whose history ends there."""
    model = shaken(build(family, item_layers=layers, **CATALOG)).eval()
    rows = [HISTORIES[i].tolist()[:8] for i in range(len(HISTORIES))]
    state = model(Ragged.from_rows(rows), every=True)
    prefixes = [row[: t + 1] for row in rows for t in range(len(row))]
    alone = model.user_states(Ragged.from_rows(prefixes))
    torch.testing.assert_close(state.fused, alone.fused, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------- no leaks


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [0, 1])
def test_a_prediction_sees_nothing_of_what_follows(family: str, layers: int) -> None:
    model = shaken(build(family, item_layers=layers, **CATALOG)).eval()
    row = [3, 1, 4, 1, 5, 9]
    base = model(Ragged.from_rows([[7, 8], row]), every=True)
    for t in range(len(row) - 1):
        changed = row[: t + 1] + [(item + 11) % N for item in row[t + 1 :]]
        other = model(Ragged.from_rows([[7, 8], changed]), every=True)
        until = 2 + t + 1
        for name in ("behavioral", "semantic", "fused"):
            a, b = getattr(base, name), getattr(other, name)
            torch.testing.assert_close(a[:until], b[:until], rtol=0, atol=1e-6)
            assert not torch.allclose(a[until:], b[until:], atol=1e-4), f"{name} sees its own item"


@pytest.mark.parametrize("form", ["paper", "catalog"])
def test_what_follows_would_leak_through_the_router_of_the_mean(form: str) -> None:
    """Check that the guard guards something: with u = mean, late items change early positions."""
    model = shaken(build("qwen3", form=form)).eval()
    a, b = (model(Ragged.from_rows([[3, 1, 4, x]]), every=True).fused[:3] for x in (5, 17))
    assert torch.allclose(a, b, atol=1e-6) is (form != "paper")


def test_all_positions_that_may_not_fit_are_refused() -> None:
    """A later text's length must not decide which old items an earlier position reads."""
    with pytest.raises(ConfigError, match=r"may need .* max_tokens=22; raise it"):
        build(**CATALOG | {"max_tokens": 22})


@pytest.mark.parametrize("changes", [{}, CATALOG], ids=["paper", "catalog"])
def test_training_does_not_see_the_last_two_items(changes: dict[str, Any]) -> None:
    model = shaken(build(**changes)).eval()
    altered = HISTORIES.values.copy()
    for start, end in itertools.pairwise(HISTORIES.offsets):
        if end - start >= 3:
            altered[end - 2 : end] = [18, 19]
    losses = []
    for values in (HISTORIES.values, altered):
        train = leave_one_out(Ragged(values, HISTORIES.offsets)).train
        made = model.batches(train, seed=1, epoch=2, batch_users=2, batch_tokens=100)
        losses.append([float(model.loss(batch).total.detach()) for batch in made.iterate()])
    assert losses[0] == losses[1]


# ------------------------------------------------------------------------------- its options


VALID = np.array([[7, 3, 11, 2, 5, 1, 9, 4][i % 8] for i in range(len(HISTORIES))])


def test_options_of_the_catalog_need_it() -> None:
    with pytest.raises(ValidationError, match="text_dropout needs form=catalog"):
        tiny.small(text_dropout=0.5)


@pytest.mark.parametrize(
    "option",
    [
        {"normalize_views": True},
        {"behavioral_pool": "encoder"},
        {"negatives": 50},
        {"share_negatives": True},
    ],
)
def test_options_of_the_paper_s_form_need_it(option: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"{next(iter(option))} needs form=paper"):
        tiny.small(**CATALOG | option)
    (name,) = option
    as_ever = {name: L2RecConfig.model_fields[name].default}  # what run folders name
    assert tiny.small(**CATALOG | as_ever) == tiny.small(**CATALOG)


@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({}, 6),
        ({"views": ("behavioral",)}, 6),
        ({"views": ("behavioral",), "behavioral_pool": "encoder"}, 12),
        ({"views": ("behavioral",), **CATALOG}, 12),
    ],
    ids=["both views", "means of words", "means of outputs", "catalog"],
)
def test_what_is_said_to_be_read_of_a_text_is_read(
    options: dict[str, Any], limit: int, layers: int
) -> None:
    """Two catalogs whose texts differ after the limit, or at it, and what a user is."""
    (word, *_), other = TEXTS[0].split(), TEXTS[1].split()[-1]
    assert word != other

    def user(cut: int) -> Tensor:
        """Encode a user of an item whose text has another word after `cut` words."""
        texts = [" ".join([word] * cut + [other]), *TEXTS[1:]]
        model = shaken(build(texts=texts, item_layers=layers, **options))
        assert model.text_tokens == limit
        return model.encode_users(Ragged.from_rows([[0]]))

    assert torch.equal(user(limit), user(limit + 1))
    assert not torch.allclose(user(limit), user(limit - 1), atol=1e-4)


def test_options_of_earlier_versions_are_read_where_they_change_nothing() -> None:
    """Check that run folders of old open, which name every option that there was."""
    assert L2RecConfig(**l2rec.GONE, rank=4) == L2RecConfig(rank=4)
    assert L2RecConfig(form="catalog", view_loss=0.0) == L2RecConfig(form="catalog")


@pytest.mark.parametrize(
    "options",
    [
        {"form": "table"},
        {"items": "table"},
        {"pooling": "last"},
        {"gate": "scalar"},
        {"table_dropout": 0.5},
        {"view_loss": 0.5},
        {"repeat_bias": True},
        {"behavioral_epochs": 4},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_earlier_versions_that_are_gone(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    message = f"{name}={value} is no option any more; train without it, such as recipe l2rec-plus"
    with pytest.raises(ValidationError, match=message):
        L2RecConfig(**options)


# ------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes", [{}, CATALOG, {"item_layers": 1}])
def test_users_do_not_depend_on_the_batch(
    family: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shaken(build(family, **changes))
    together = model.encode_users(HISTORIES)
    alone = [model.encode_users(HISTORIES.take(np.array([i]))) for i in range(len(HISTORIES))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)
    for budget in (1, 60, 10**6):
        monkeypatch.setattr(l2rec, "ENCODED_TOKENS", budget)
        vectors = F.normalize(model.user_states(HISTORIES).fused, dim=-1)
        torch.testing.assert_close(vectors, together, rtol=0, atol=1e-5)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(len(HISTORIES)))
    order = np.array([4, 2, 0, 1, 3])
    shuffled = model.encode_users(HISTORIES.take(order))
    torch.testing.assert_close(shuffled, together[torch.from_numpy(order)], rtol=0, atol=1e-5)


def test_only_the_newest_items_count() -> None:
    model = shaken(build(max_items=4))
    long = HISTORIES[2].tolist()
    a, b = (model.encode_users(Ragged.from_rows([row])) for row in (long, long[-4:]))
    torch.testing.assert_close(a, b)


def test_scores_are_inner_products_over_tau() -> None:
    for model in (shaken(build()), shaken(build(**CATALOG))):
        vectors = model.encode_items(np.arange(N, dtype=np.int32))
        expected = model.encode_users(HISTORIES) @ vectors.T / 0.05
        torch.testing.assert_close(model.scorer()(HISTORIES), expected)
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(N))


def test_evaluation_has_no_noise_and_leaves_the_mode_alone() -> None:
    model = shaken(build(**CATALOG, text_dropout=0.5)).train()
    items = np.arange(N, dtype=np.int32)
    assert torch.equal(model.encode_items(items), model.encode_items(items))
    assert torch.equal(model.encode_users(HISTORIES), model.encode_users(HISTORIES))
    assert model.training and not model.backbone.training


def test_an_empty_history_is_refused() -> None:
    with pytest.raises(DataError, match="an empty history"):
        build().encode_users(Ragged.from_rows([[1], []]))


def test_nobody_and_nothing() -> None:
    for model in (build(), build(**CATALOG)):
        assert model.encode_users(Ragged.from_rows([])).shape == (0, 32)
        assert model.encode_items([]).shape == (0, 32)


# ------------------------------------------------------------------------------- items and texts


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "changes", [{}, {"behavioral_pool": "encoder"}, {"item_layers": 1}, {"form": "catalog"}]
)
def test_a_text_is_encoded_as_the_catalog_item_it_is(family: str, changes: dict[str, Any]) -> None:
    model = shaken(build(family, **changes))
    items = np.array([4, 0, 13], dtype=np.int32)
    texts = [TEXTS[i] for i in items]
    torch.testing.assert_close(
        model.encode_items(texts), model.encode_items(items), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("changes", [{}, {"item_layers": 1}, CATALOG, CATALOG | {"item_layers": 1}])
def test_a_new_item_is_ranked_and_can_be_in_a_history(changes: dict[str, Any]) -> None:
    model = shaken(build(**changes))
    before = model.scorer()(HISTORIES)
    new = model.add_items(["pink silk kite", "old bowl"])
    assert new.tolist() == [N, N + 1] and model.n_items == N + 2
    scores = model.scorer()(HISTORIES)
    assert scores.shape == (len(HISTORIES), N + 2)
    torch.testing.assert_close(scores[:, :N], before, rtol=0, atol=1e-4)
    assert bool(model.encode_users(Ragged.from_rows([[1, N + 1], [N]])).isfinite().all())
    again = model.encode_items(["pink silk kite"])
    torch.testing.assert_close(again, model.encode_items(new[:1]), rtol=0, atol=1e-5)
    assert model.add_items(["round drum"]).tolist() == [N + 2]
    losses = model.train().loss(one_batch(model))
    losses.total.backward()
    assert bool(losses.total.isfinite())


@pytest.mark.parametrize("changes", [{}, CATALOG, {"item_layers": 1}])
def test_encoding_texts_leaves_the_catalog_alone(changes: dict[str, Any]) -> None:
    model = shaken(build(**changes))
    before = model.scorer()(HISTORIES)
    assert model.encode_items(["pink silk kite"]).shape == (1, 32)
    with pytest.raises(DataError, match="a new item needs a text"):
        model.encode_items(["pink kite", " "])
    assert model.n_items == N
    assert torch.equal(model.scorer()(HISTORIES), before)
    model.train().loss(one_batch(model)).total.backward()


def test_a_frozen_model_computes_its_rows_once() -> None:
    model = shaken(build(**CATALOG)).eval()
    before, vectors = model.scorer()(HISTORIES), model.encode_items(np.arange(N))
    model.freeze()
    assert model.items.rows is model.items.rows
    torch.testing.assert_close(model.scorer()(HISTORIES), before)
    model.encode_items(["pink silk kite"])
    assert model.n_items == len(model.items.rows) == N
    added = model.add_items(["pink silk kite"])
    kept = model.encode_items(np.arange(N + 1))
    torch.testing.assert_close(kept[:N], vectors)
    assert len(model.items.rows) == N + 1
    torch.testing.assert_close(model.encode_items(added), kept[N:])
    # Training, and weights that are loaded, end it; of items that were added since, their rows are
    # all there is.
    model.train()
    with pytest.raises(RuntimeError, match="1 items were added to a model that no longer learns"):
        _ = model.items.rows
    model.items.shrink(N)
    model.entry.shrink(N)
    assert model.items.rows is not model.items.rows
    model.freeze()
    load_trained(model, {n: t + 0.1 for n, t in trained_tensors(model).items()}, "test")
    assert not torch.allclose(model.encode_items(np.arange(N)), vectors, atol=1e-3)


@pytest.mark.parametrize("changes", [{}, {"personalized_router": False}, {"item_layers": 1}])
def test_a_frozen_model_joins_its_experts_once(changes: dict[str, Any]) -> None:
    model = shaken(build(**changes)).eval()
    dtype = model.backbone.dtype
    before = model.encode_users(HISTORIES)
    model.freeze()
    assert torch.equal(model.encode_users(HISTORIES), before)
    assert model.experts._joined(0, dtype) is model.experts._joined(0, dtype)
    # Training, and weights that are loaded, end it.
    load_trained(model, {n: t + 0.1 for n, t in trained_tensors(model).items()}, "test")
    loaded = model.encode_users(HISTORIES)
    assert not torch.allclose(loaded, before, atol=1e-3)
    model.freeze()
    assert torch.equal(model.encode_users(HISTORIES), loaded)
    model.train().loss(one_batch(model)).total.backward()
    grads = [p.grad for p in model.experts.parameters() if p.requires_grad]
    assert grads and all(grad is not None for grad in grads)


def test_the_load_of_many_histories_is_that_of_all_their_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = shaken(build(item_layers=1)).eval()
    with torch.no_grad():
        whole = model(HISTORIES).routing
    monkeypatch.setattr("l2rec.methods.l2rec.ENCODED_TOKENS", 12)
    found = model.expert_load(HISTORIES)
    assert whole is not None and found is not None and found.matrices == model.experts.names
    for view, load in whole.load.items():
        shares = torch.tensor(found.experts[model.config.views[view]])
        torch.testing.assert_close(shares, load, rtol=0, atol=1e-6)


def test_items_without_text_do_not_break_the_catalog() -> None:
    for family, changes in itertools.product(FAMILIES, ({}, CATALOG)):
        model = shaken(build(family, texts=["", *TEXTS[1:-1], ""], **changes))
        assert bool(model.scorer()(Ragged.from_rows([[0], [0, 19], [3, 0]])).isfinite().all())


def test_equal_texts_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tiny.random_backbone("bert")
    rows = [[5, 6, 7], [8], [5, 6, 9], [8], [5, 6]]
    tokens = Ragged.from_rows(rows)
    apart = torch.cat(
        [item_text.text_vectors(bare, tokens.take(np.array([i])), 2) for i in range(5)]
    )
    read, plain = [], item_text.read_texts

    def counted(*args: Any) -> Any:
        read.append(len(args[1]))
        return plain(*args)

    monkeypatch.setattr(item_text, "read_texts", counted)
    torch.testing.assert_close(item_text.text_vectors(bare, tokens, 2), apart)
    assert read == [2]  # cut to two tokens, three of them are one


def test_text_vectors_come_from_the_cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = tiny.small(**CATALOG)
    first = L2Rec(options, Catalog.of_texts(TEXTS), tiny.random_backbone(), cache=tmp_path)

    def never(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("encoded twice")

    with monkeypatch.context() as patch:
        patch.setattr(item_text, "text_vectors", never)
        second = L2Rec(options, Catalog.of_texts(TEXTS), tiny.random_backbone(), cache=tmp_path)
        for other in (
            lambda: L2Rec(
                options, Catalog.of_texts(TEXTS), tiny.random_backbone(seed=1), cache=tmp_path
            ),
            lambda: L2Rec(
                options, Catalog.of_texts(TEXTS[::-1]), tiny.random_backbone(), cache=tmp_path
            ),
            lambda: L2Rec(
                tiny.small(**CATALOG, text_tokens=3),
                Catalog.of_texts(TEXTS),
                tiny.random_backbone(),
                cache=tmp_path,
            ),
        ):
            with pytest.raises(AssertionError, match="encoded twice"):
                other()
    assert torch.equal(first.items.rows, second.items.rows)


# ------------------------------------------------------------------------------- sizes


def test_rows_longer_than_the_backbone_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="'tiny-bert' has 256 positions; lower them to at most 256"
    ):
        build(max_tokens=257)
    with pytest.raises(ConfigError, match="positions"):
        build(text_tokens=300, **CATALOG)
    build(max_tokens=256)
    build(max_tokens=257, views=("behavioral",))


def meta(config: Any) -> Backbone:
    with torch.device("meta"):
        model: nn.Module = AutoModel.from_config(config)
    return Backbone(model, None, name="meta", source="none", revision=None)


def test_the_paper_s_32_million_parameters() -> None:
    backbone = meta(
        Qwen3Config(
            vocab_size=151936,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
        )
    )
    model = L2Rec(L2RecConfig(), Catalog.of_texts([]), backbone)
    parts = {"experts": model.experts, "projector": model.projector, "fusion": model.fusion}
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == sum(p.numel() for part in parts.values() for p in part.parameters())
    assert 0.98 * 32e6 <= count <= 1.02 * 32e6
    frozen = sum(p.numel() for p in backbone.parameters())
    assert 0.045 <= count / frozen <= 0.06, "roughly 5% of the backbone"


# ------------------------------------------------------------------------------- form=catalog


def positions_of(model: L2Rec, batch: Batch) -> Iterator[tuple[Tensor, int, set[int]]]:
    """Of each position its scores r [N] float64, its target, and what else its prefix holds."""
    items = model.encode_items(np.arange(N)).double()
    state = model(batch.histories, every=True)
    users = F.normalize(state.fused.double(), dim=-1)
    for p, end in enumerate(state.position.tolist()):
        start = int(batch.histories.offsets[int(state.row[p])])
        target = int(batch.targets[end])
        held = set(batch.histories.values[start : end + 1].tolist()) - {target}
        yield users[p] @ items.T / model.config.temperature, target, held


def by_the_book(model: L2Rec, batch: Batch, known: int = N) -> list[float]:
    """Return the loss of each position against the first items of the catalog, but for what its
    prefix holds.
    """
    each = []
    for r, target, held in positions_of(model, batch):
        others = torch.stack([r[i] for i in range(known) if i not in held])
        each.append(float(torch.logsumexp(others, 0) - r[target]))
    return each


@pytest.mark.parametrize("project_items", [True, False])
@pytest.mark.parametrize("views", [("semantic", "behavioral"), ("behavioral",), ("semantic",)])
def test_the_loss_of_the_catalog_by_the_book(views: tuple[str, ...], project_items: bool) -> None:
    """Every position against the pipeline's own vector of every item, but for those of its prefix;
    float64, position by position.
    """
    options = CATALOG | {"views": views, "balance": 0.0, "bpc": 0.0, "project_items": project_items}
    model = shaken(build(**options)).eval()
    rows = Ragged.from_rows([[3, 1, 4, 1, 5, 9], [6, 5, 3, 6, 5], [2, 8]])  # targets that repeat
    batch = one_batch(model, rows)
    begin(model)
    with torch.no_grad():
        each, total = by_the_book(model, batch), float(model.loss(batch).total)
    assert len(each) == len(batch.targets)
    assert total == pytest.approx(np.mean(each), rel=1e-5)


@pytest.mark.parametrize("sampled", [0, 3, N])
def test_items_that_training_never_holds_are_no_negatives(sampled: int) -> None:
    """They can only be pushed away, and are known by a text that others may share."""
    options = CATALOG | {"balance": 0.0, "bpc": 0.0, "sampled_items": sampled}
    model = shaken(build(**options)).eval()
    assert isinstance(model.items, CatalogItems)
    model.items.restrict(np.arange(10))
    batch = one_batch(model, Ragged.from_rows([[3, 1, 4, 1, 5, 9], [6, 5, 3, 6, 5], [2, 8]]))
    begin(model)
    chosen, log = model.items._compared(batch.targets)
    assert set(batch.targets.tolist()) <= set(chosen.tolist()) <= set(range(10))
    if log is None:
        assert chosen.tolist() == list(range(10))
        with torch.no_grad():
            each, total = by_the_book(model, batch, 10), float(model.loss(batch).total)
        assert total == pytest.approx(np.mean(each), rel=1e-5)


def test_the_prior_of_items_beside_the_mean_over_events() -> None:
    """All events' losses and kappa/2 |r_i|^2, over the number of events."""
    options = CATALOG | {"balance": 0.0, "bpc": 0.0, "item_residual": True}
    rows = Ragged.from_rows([[3, 1, 4, 1, 5, 9], [6, 5, 3, 6, 5], [2, 8]])
    plain, held = (shaken(build(**options, residual_prior=k)).eval() for k in (0.0, 7.0))
    parts = []
    for model in (plain, held):
        begin(model)
        model.calibrate(rows, rows, rows.values)
        parts.append(model.loss(one_batch(model, rows)))
    assert isinstance(held.items, CatalogItems) and "prior" not in parts[0].parts
    r = held.items.table.residual
    assert r is not None
    by_hand = sum(7.0 / 2 * x**2 for x in r.detach().double().flatten().tolist()) / 13
    assert by_hand > 0 and parts[1].parts["prior"].item() == pytest.approx(by_hand, rel=1e-5)
    assert parts[1].total.item() == pytest.approx(parts[0].total.item() + by_hand, rel=1e-5)


@pytest.mark.parametrize("views", [("semantic", "behavioral"), ("behavioral",), ("semantic",)])
def test_the_loss_of_a_sample_by_the_book(views: tuple[str, ...]) -> None:
    """The same over a few items, those that were drawn counted for all that were not."""
    options = CATALOG | {"views": views, "balance": 0.0, "bpc": 0.0, "sampled_items": 3}
    model = shaken(build(**options)).eval()
    assert isinstance(model.items, CatalogItems)
    batch = one_batch(model, Ragged.from_rows([[3, 1, 4, 1], [6, 5, 3], [2, 4]]))
    begin(model)
    torch.manual_seed(3)
    chosen, log = model.items._compared(batch.targets)
    wanted = set(batch.targets.tolist())
    assert wanted < set(chosen.tolist()) and len(chosen) < N
    many = (N - len(wanted)) / (len(chosen) - len(wanted))
    expected = [1.0 if item in wanted else many for item in chosen.tolist()]
    assert log.exp().flatten().tolist() == pytest.approx(expected)
    with torch.no_grad():
        each = []
        for scores, target, held in positions_of(model, batch):
            r = scores.tolist()
            kept = [(i, n) for i, n in zip(chosen.tolist(), expected, strict=True) if i not in held]
            high = max(r)
            total = sum(n * math.exp(r[i] - high) for i, n in kept)
            each.append(high + math.log(total) - r[target])
        torch.manual_seed(3)
        found = float(model.loss(batch).total)
    assert found == pytest.approx(np.mean(each), rel=1e-5)


def test_a_step_with_a_sample_computes_the_rows_it_reads() -> None:
    """Loss and gradients are those of all rows; of one call, equal items have equal noise."""
    model = shaken(build(**CATALOG | {"sampled_items": 4}))
    assert isinstance(model.items, CatalogItems)
    batch = one_batch(model, Ragged.from_rows([[3, 1, 4, 1], [6, 5, 3], [2, 4]]))
    begin(model)
    found = {}
    for training in (False, True):
        model.train(training)
        model.items.table.dropout = 0.0
        model.zero_grad()
        torch.manual_seed(3)
        loss = model.loss(batch).total
        loss.backward()
        found[training] = float(loss.detach()), model.items.table.residual.grad.clone()
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-5)
    torch.testing.assert_close(found[True][1], found[False][1], rtol=1e-4, atol=1e-7)

    model.items.table.dropout = 0.5
    items = np.array([7, 2, 7])
    some = model.train().items.look_up()(items)
    assert torch.equal(some[0], some[2]) and not torch.equal(some, model.items.look_up()(items))


def test_without_the_semantic_view_nothing_is_kept_of_it() -> None:
    model = shaken(build(**CATALOG | {"views": ("behavioral",)}))
    tensors = trained_tensors(model)
    assert "items.semantic" not in tensors
    # Earlier versions wrote it.
    load_trained(model, {**tensors, "items.semantic": torch.zeros(N, 32)}, "a run")


def test_a_sample_stands_for_the_catalog_on_average() -> None:
    model = build(**CATALOG | {"sampled_items": 4})
    assert isinstance(model.items, CatalogItems)
    values, targets = torch.rand(N).double(), np.array([2, 7, 2])
    torch.manual_seed(0)
    sums = []
    for _ in range(4000):
        chosen, log = model.items._compared(targets)
        sums.append(float((values[chosen] * log.double().exp().flatten()).sum()))
    assert np.mean(sums) == pytest.approx(float(values.sum()), rel=0.01)


def test_a_sample_of_everything_is_everything() -> None:
    losses = []
    for sampled in (0, N):
        model = shaken(build(**CATALOG | {"sampled_items": sampled})).eval()
        batch = one_batch(model, Ragged.from_rows([[3, 1, 4, 1], [6, 5, 3], [2, 4]]))
        begin(model)
        losses.append(float(model.loss(batch).total.detach()))
    assert losses[0] == losses[1]


def test_items_of_the_catalog_are_histories_of_one() -> None:
    model = shaken(build(**CATALOG)).eval()
    alone = Ragged.from_rows([[i] for i in range(N)])
    torch.testing.assert_close(model.encode_items(np.arange(N)), model.encode_users(alone))


@pytest.mark.parametrize("form", [{}, CATALOG])
@pytest.mark.parametrize("views", [("semantic", "behavioral"), ("behavioral",), ("semantic",)])
def test_items_without_the_projections_of_eq_7(
    form: dict[str, Any], views: tuple[str, ...]
) -> None:
    """delta h^B + (1 - delta) h^S; users as ever."""
    model = shaken(build(**form | {"project_items": False, "views": views})).eval()
    alone = Ragged.from_rows([[i] for i in range(N)])
    state = model.user_states(alone)
    with torch.no_grad():
        out = {view: h.double() for view, h in model(alone).outputs.items()}
        fused = out[views[0]]
        if len(views) == 2:
            both = torch.cat((out["behavioral"], out["semantic"]), dim=-1)
            gate = model.fusion.gate
            delta = torch.sigmoid(both @ gate.weight.double().T + gate.bias.double())
            fused = delta * out["behavioral"] + (1 - delta) * out["semantic"]
    items = model.encode_items(np.arange(N)).double()
    torch.testing.assert_close(items, F.normalize(fused, dim=-1), rtol=0, atol=1e-5)
    users = F.normalize(state.fused, dim=-1)
    torch.testing.assert_close(model.encode_users(alone), users, rtol=0, atol=1e-5)
    assert (users.double() - items).abs().max() > 0.01, "or the test says nothing"


def test_semantic_vectors_are_those_of_the_start_of_the_epoch() -> None:
    """They are saved, so that a run that is resumed in the middle of an epoch has the same."""
    model = shaken(build(**CATALOG)).train()
    alone = Ragged.from_rows([[i] for i in range(N)])
    begin(model)
    stale = model.items.semantic.clone()
    with torch.no_grad():
        for parameter in model.experts.parameters():
            parameter += 0.1
        now = model.eval()(alone, views=("semantic",)).outputs["semantic"]
    assert torch.equal(model.items.semantic, stale) and not torch.allclose(now, stale, atol=1e-4)
    begin(model)
    torch.testing.assert_close(model.items.semantic, now, rtol=1e-4, atol=1e-5)
    assert "items.semantic" in trained_tensors(model)
    again = build(seed=3, **CATALOG)
    load_trained(again, trained_tensors(model), "here")
    assert torch.equal(again.items.semantic, model.items.semantic)


def test_an_item_of_the_catalog_that_training_never_meets_is_its_text() -> None:
    model = shaken(build(**CATALOG)).eval()
    before = model.encode_items(np.arange(N))
    model.freeze()
    model.calibrate(Ragged.from_rows([[0, 1, 2]]), HISTORIES, VALID)
    after = model.encode_items(np.arange(N))
    assert torch.equal(before[:3], after[:3])
    assert not torch.isclose(before[3:], after[3:]).all(1).any()
    new = model.encode_items([TEXTS[7]])
    torch.testing.assert_close(new, after[7:8], rtol=1e-4, atol=1e-5)


def test_a_residual_carries_a_gradient_from_both_sides() -> None:
    model = shaken(build(**CATALOG, views=("behavioral",))).train()
    model.calibrate(Ragged.from_rows([[*range(N - 1)]]), HISTORIES, VALID)
    model.loss(one_batch(model, Ragged.from_rows([[3, 1, 4]]))).total.backward()
    grad = model.items.table.residual.grad
    assert grad is not None
    # Every item is compared with; the last has no residual.
    assert bool(grad[: N - 1].any(1).all()) and not grad[N - 1].any()


def test_the_user_enters_the_routers_at_the_scale_of_what_is_processed() -> None:
    alone = HISTORIES
    plain, scaled = build(), build(user_norm=True)
    for model, wanted in ((plain, False), (scaled, True)):
        rows = model.items.look_up()
        for view in model.config.views:
            u = model._input(view, alone, rows).u
            unit = torch.allclose(u.square().mean(-1), torch.ones(len(u)), rtol=1e-3)
            assert unit is wanted


def test_rows_above_the_cut_may_be_longer_than_the_positions_of_a_bert() -> None:
    """Above layer K nobody reads positions: only single texts must fit."""
    long = Ragged.from_rows([[i % N for i in range(40)]])
    options = CATALOG | {"views": ("semantic",), "item_layers": 1, "max_items": 60}
    options |= {"semantic_items": 60, "max_tokens": 4000, "text_tokens": 8, "item_tokens": 8}
    short = shaken(build("bert", **options)).eval()
    limit = short.backbone.max_positions
    assert limit is not None and short.backbone.positions_in_words
    assert short.costs(long)[0] > limit
    users = short.encode_users(long)
    fits = Ragged.from_rows([[3, 1, 4, 1], [5]])
    without = short.encode_users(fits)
    short.backbone.positions_in_words = False
    torch.testing.assert_close(short.encode_users(fits), without)
    assert bool(users.isfinite().all())
    with pytest.raises(ConfigError, match="positions; lower them"):
        build("bert", **options | {"item_layers": 0})
    with pytest.raises(ConfigError, match="positions; lower them"):
        build("qwen3", **options | {"max_tokens": 10**6})
