"""What every method promises, asked of every file in ``l2rec/methods``: a new one is found by
itself. It needs a line in ``OPTIONS`` of `tests.support.methods` only where its defaults do not fit
sixteen items.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tests.support import models
from tests.support.methods import METHODS, N, build
from tests.support.runs import Quiet
from torch import Tensor, nn

from l2rec import protocols
from l2rec.config import TrainingConfig, resolve
from l2rec.data.batches import Batch
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.data.splits import Split, leave_one_out
from l2rec.data.synthetic import chain_dataset, simple_text
from l2rec.errors import DataError
from l2rec.evaluation.ranking import evaluate
from l2rec.methods.floors import Popularity
from l2rec.protocols import (
    Embedder,
    Losses,
    Method,
    Recommender,
    Remarked,
    Stage,
    TakesNewItems,
    Trainable,
)
from l2rec.runs.checkpoint import load_tensors, load_trained, save_tensors, trained_tensors
from l2rec.runs.loop import train
from l2rec.runs.remarks import is_leaky, remarks_of

pytestmark = pytest.mark.usefixtures("one_thread")

PAPER = {"form": "paper", "item_residual": False}
"""L2Rec without what its catalog form has besides."""
METRICS = {"L2Rec": "ndcg@10_masked"}
"""What a history holds is no negative of its loss: nothing is said of the scores of that."""
USUAL = (1e-2, 15)
BUDGET = {
    "BERT4Rec": (3e-3, 50),
    "FamouSRec": (1e-2, 8),
    "IDGenRec": (5e-3, 20),
    "L2Rec": (3e-3, 8),
    "LEARN": (3e-3, 100),
    "LETTER": (5e-3, 20),
    "P5": (5e-3, 20),
    "TIGER": (5e-3, 20),
    "UniSRec": (1e-2, 25),
}
"""Learning rate and epochs of what learns the chain slowly, or takes long about an epoch."""
WHOLE_SOFTMAX: dict[str, dict[str, Any]] = {"ESASRec": {"loss": "ce"}}
"""Options of a method whose default loss is another."""


@dataclass
class Trained:
    """A method that has seen the chain, with its options and data."""

    name: str
    method: Any
    model: Any
    split: Split
    catalog: Catalog


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Catalog, Split]:
    folder = tmp_path_factory.mktemp("data") / "chain"
    dataset = chain_dataset(folder, n_users=64, n_items=N, length=9, seed=0)
    return Catalog(dataset.catalog), leave_one_out(dataset.sequences)


@pytest.fixture(scope="module", params=sorted(METHODS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def trained(
    name: str, chain: tuple[Catalog, Split], tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    """Through the loop that trains every run, all stages."""
    catalog, split = chain
    model = build(name, catalog)
    lr, epochs = BUDGET.get(name, USUAL)
    training = TrainingConfig(
        epochs=epochs,
        lr=lr,
        weight_decay=0.0,
        warmup=0.0,
        schedule="constant",
        clip=5.0,
        batch_users=16,
        eval_every=epochs,
    )
    run = tmp_path_factory.mktemp(name)
    train(model, split, training, seed=0, run=run, progress=Quiet())
    return Trained(name, METHODS[name], model, split, catalog)


def stages_of(model: Any) -> list[Stage]:
    stages: list[Stage] = model.stages(USUAL[0], 0.0)
    assert stages
    return stages


def ready(model: Any) -> Iterator[tuple[Stage, list[nn.Parameter]]]:
    """Each stage in turn as the loop has it: nothing but its own parameters takes a gradient."""
    model.train()
    for stage in stages_of(model):
        own = [p for group in stage.groups for p in group.parameters]
        for parameter in model.parameters():
            parameter.requires_grad_(any(parameter is p for p in own))
            parameter.grad = None
        if stage.begin_epoch is not None:
            stage.begin_epoch(0)
        yield stage, own


batches_of = partial(models.batches_of, batch_users=8, batch_tokens=4096)


def updates(stage: Stage, batch: Batch, optimizer: torch.optim.Optimizer) -> Iterator[Losses]:
    """Hand out the updates of a batch, each between its gradients and its step."""
    for losses in protocols.updates(stage.loss(batch)):
        optimizer.zero_grad()
        losses.total.backward()
        yield losses
        optimizer.step()


def answers(model: Any, histories: Ragged) -> Tensor:
    """What a method says of users: their vectors, or the scores of one that only ranks."""
    answer = model.encode_users if isinstance(model, Embedder) else model.scorer()
    with torch.inference_mode():
        found: Tensor = answer(histories)
    return found


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the model's state, each by one name where modules share it."""
    once = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in model.state_dict().items() if name in once}


def content(batch: Batch) -> list[Any]:
    rows = batch.histories
    parts = (batch.users, rows.values, rows.offsets, batch.targets, batch.negatives)
    return [part.tolist() for part in parts]


def a_few_steps(model: Any, sequences: Ragged) -> list[float]:
    """Three steps of every stage; the loss of each."""
    losses: list[float] = []
    torch.manual_seed(0)
    for stage, own in ready(model):
        optimizer = torch.optim.AdamW(own, lr=USUAL[0])
        for batch in batches_of(stage, sequences)[:3]:
            losses += [float(found.total.detach()) for found in updates(stage, batch, optimizer)]
    return losses


# -- the class -----------------------------------------------------------------------------------


def test_methods_are_found() -> None:
    assert {"L2Rec", "SASRec"} <= METHODS.keys()
    assert not {"Popularity", "LastItemNeighbour", "TextNeighbour"} & METHODS.keys()


def test_options_are_frozen_and_closed(name: str) -> None:
    config = METHODS[name].Config()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(config, next(iter(type(config).model_fields)), 1)
    with pytest.raises(ValidationError, match="nonsense"):
        METHODS[name].Config(nonsense=1)


def test_protocols(trained: Trained) -> None:
    model, histories = trained.model, trained.split.test.histories
    assert isinstance(type(model), Method), "what a recipe names"
    assert isinstance(model, Recommender) and isinstance(model, Trainable)
    assert model.n_items == N
    scores = _scores(model, histories)
    assert scores.dtype == torch.float32 and scores.shape == (len(histories), N)
    if not isinstance(model, Embedder):
        return
    users, items = model.encode_users(histories), model.encode_items(np.arange(N, dtype=np.int32))
    for tensor, rows in ((users, len(histories)), (items, N)):
        assert tensor.shape == (rows, users.shape[1]) and tensor.dtype == torch.float32
        assert not tensor.requires_grad
    # Up to a common factor, such as a temperature.
    products = users @ items.T
    scores = scores * (products.norm() / scores.norm())
    torch.testing.assert_close(scores, products, rtol=0, atol=1e-4)


def test_it_reads_no_text_or_says_so(name: str) -> None:
    """A data set without texts: one clear line from a method that reads them."""
    silent = Catalog.of_texts([""] * N)
    if METHODS[name].uses_backbone:
        with pytest.raises(DataError, match="text"):
            build(name, silent)
    else:
        try:
            assert build(name, silent).n_items == N
        except DataError as error:
            assert "text" in str(error)


# -- training ------------------------------------------------------------------------------------


def test_stages(name: str, chain: tuple[Catalog, Split]) -> None:
    """Finite losses, gradients where a stage declares them, and nothing else is moved."""
    catalog, split = chain
    model = build(name, catalog)
    frozen = {id(p) for n, p in model.named_parameters() if n.startswith("backbone.")}
    for stage, own in ready(model):
        assert len({id(p) for p in own}) == len(own), f"{stage.name}: a parameter in two groups"
        assert not frozen & {id(p) for p in own}, f"{stage.name}: the backbone is frozen"
        names = {n for n, p in model.named_parameters() if p.requires_grad}
        assert len(names) == len(own), f"{stage.name}: parameters that are not the model's"
        before = {n: t.clone() for n, t in tensors_of(model).items()}
        optimizer = torch.optim.AdamW(own, lr=USUAL[0])
        reached: set[str] = set()
        for batch in batches_of(stage, split.train)[:3]:
            for losses in updates(stage, batch, optimizer):
                assert losses.total.shape == () and bool(losses.total.isfinite())
                assert losses.parts and all(bool(p.isfinite()) for p in losses.parts.values())
                assert not any(part.requires_grad for part in losses.parts.values())
                assert 0 < losses.tokens <= losses.computed_tokens
                with_gradient = {n: p for n, p in model.named_parameters() if p.grad is not None}
                for parameter_name, parameter in with_gradient.items():
                    assert bool(parameter.grad.isfinite().all()), parameter_name
                reached |= with_gradient.keys()
        assert reached == names, f"{stage.name}: {sorted(names ^ reached)}"
        after = tensors_of(model)
        moved = {n for n in before if not torch.equal(before[n], after[n])}
        assert moved <= names, f"{stage.name}: {sorted(moved - names)} moved without a gradient"


NARROW = [
    *((name, {}) for name in sorted(METHODS) if METHODS[name].uses_backbone and name != "LLaRA"),
    ("LLaRA", {"head": "items"}),
    ("L2Rec", PAPER),
    ("L2Rec", PAPER | {"behavioral_pool": "encoder"}),
]


@pytest.mark.parametrize(("method", "more"), NARROW)
def test_words_may_be_narrower_than_states(
    method: str, more: dict[str, Any], chain: tuple[Catalog, Split]
) -> None:
    catalog, split = chain
    model = build(method, catalog, family="electra", **more)
    assert np.isfinite(a_few_steps(model, split.train)).all()
    model.eval()
    assert answers(model, split.test.histories).isfinite().all()


def test_batches_are_a_function_of_seed_and_epoch(name: str, chain: tuple[Catalog, Split]) -> None:
    catalog, split = chain
    for stage in stages_of(build(name, catalog)):
        first = [content(b) for b in batches_of(stage, split.train)]
        assert first == [content(b) for b in batches_of(stage, split.train)]
        assert first != [content(b) for b in batches_of(stage, split.train, epoch=1)]
        assert first != [content(b) for b in batches_of(stage, split.train, seed=1)]
        made = stage.batches(split.train, seed=0, epoch=0, batch_users=8, batch_tokens=4096)
        assert first[1:] == [content(b) for b in made.iterate(1)], "entered in the middle"


def test_same_seed_same_losses(name: str, chain: tuple[Catalog, Split]) -> None:
    catalog, split = chain
    first, again, other = (
        a_few_steps(build(name, catalog, seed), split.train) for seed in (0, 0, 1)
    )
    assert first == again != other


@pytest.mark.parametrize(
    "name", ["BERT4Rec", "ESASRec", "FDSA", "FamouSRec", "GRU4Rec", "S3Rec", "SAID", "SASRec"]
)
def test_a_step_keeps_no_score_of_all_items(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients are those of the softmax over the whole [P, N], which is never there."""
    count = 997  # the size of nothing else
    dataset = chain_dataset(tmp_path / "chain", n_users=12, n_items=count, length=9, seed=0)
    model = build(name, Catalog(dataset.catalog), **WHOLE_SOFTMAX.get(name, {}))
    *_, (stage, parameters) = ready(model)
    batch = batches_of(stage, leave_one_out(dataset.sequences).train)[0]

    def step() -> tuple[list[Tensor], bool]:
        kept = []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor.shape)
            return tensor

        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            (losses,) = protocols.updates(stage.loss(batch))
        gradients = torch.autograd.grad(losses.total, parameters)
        wide = any(len(shape) == 2 and shape[1] == count for shape in kept)
        return [losses.total.detach(), *gradients], wide

    def whole(users: Tensor, items: Tensor, positive: Tensor) -> Tensor:
        return nn.functional.cross_entropy(users @ items.T, positive)

    ours, wide = step()
    assert not wide
    for module in {inspect.getmodule(base) for base in type(model).__mro__}:
        if hasattr(module, "fused_catalog_loss"):
            monkeypatch.setattr(module, "fused_catalog_loss", whole)
    theirs, wide = step()
    assert wide
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_held_out_items_leave_no_trace(name: str, chain: tuple[Catalog, Split]) -> None:
    """With other validation and test items: the same batches, losses and trained tensors."""
    catalog, split = chain
    whole = [
        [*split.test.histories[row].tolist(), int(target)]
        for row, target in enumerate(split.test.targets.values)
    ]
    changed = [[*row[:-2], (row[-2] + 5) % N, (row[-1] + 3) % N] for row in whole]
    outcomes = []
    for rows in (whole, changed):
        log = leave_one_out(Ragged.from_rows(rows)).train
        model = build(name, catalog)
        listed = [content(b) for stage in stages_of(model) for b in batches_of(stage, log)]
        outcomes.append((listed, a_few_steps(model, log), trained_tensors(model)))
    (batches, losses, tensors), (batches_2, losses_2, tensors_2) = outcomes
    assert batches == batches_2 and losses == losses_2
    for tensor_name, tensor in tensors.items():
        assert torch.equal(tensor, tensors_2[tensor_name]), tensor_name


@pytest.mark.parametrize(
    ("leaky", "option"),
    [
        (method, option)
        for method, found in METHODS.items()
        for option, field in found.Config.model_fields.items()
        if "leaky" in get_args(field.annotation)
    ],
)
def test_a_published_leak_is_there_where_it_is_asked_for(
    leaky: str, option: str, chain: tuple[Catalog, Split], tmp_path: Path
) -> None:
    """Other test items are another training; it says so, in the log and beside its scores."""
    catalog, split = chain
    targets = Ragged((split.test.targets.values + 3) % N, split.test.targets.offsets)
    changed = replace(split, test=replace(split.test, targets=targets))
    training = TrainingConfig(epochs=1, batch_users=32)
    for asked in (True, False):
        progress, tensors = Quiet(), []
        for number, data in enumerate((split, changed)):
            model = build(leaky, catalog, **({option: "leaky"} if asked else {}))
            run = tmp_path / f"{asked}-{number}"
            train(model, data, training, seed=0, run=run, progress=progress)
            tensors.append(trained_tensors(model))
        same = all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
        warnings = [line for line in progress.lines if line.startswith(f"warning: {option}=leaky")]
        assert (same, len(warnings)) == ((False, 2) if asked else (True, 0))
        values = {"method": f"{METHODS[leaky].__module__}:{leaky}"}
        config = resolve(values | {"model": {option: "leaky"} if asked else {}}, where="test")
        assert is_leaky([config]) == asked
        assert remarks_of([config])[0].startswith("leaky, not to be compared: ") == asked


def test_the_chain_is_learned(trained: Trained) -> None:
    """On validation, and on the item after it, which the choice of the best step never saw."""
    split = trained.split
    floor = Popularity.from_sequences(split.train, N)
    metric = METRICS.get(trained.name, "ndcg@10")
    for histories, targets in (
        (split.valid.histories, split.valid.targets),
        (split.test.histories, split.test.targets),
    ):
        reached, popular = (
            evaluate(ranker, histories, targets).metrics()[metric]
            for ranker in (trained.model, floor)
        )
        assert reached > popular + 0.3, (reached, popular)


# -- user and item vectors -----------------------------------------------------------------------


def test_company_and_padding_change_no_vector(trained: Trained) -> None:
    model = trained.model
    histories = Ragged.from_rows(
        [trained.split.test.histories[row][: 1 + row % 8] for row in range(12)]
    )
    together = answers(model, histories)
    order = np.random.default_rng(0).permutation(len(histories))
    shuffled = answers(model, histories.take(order))
    torch.testing.assert_close(shuffled, together[torch.from_numpy(order)], rtol=0, atol=1e-4)
    alone = [answers(model, histories.take(np.array([row]))) for row in range(len(histories))]
    torch.testing.assert_close(torch.cat(alone), together, rtol=0, atol=1e-4)


def test_items_are_encoded_alike_in_any_company(trained: Trained) -> None:
    if not isinstance(trained.model, Embedder):
        pytest.skip("has no item vectors")
    items = trained.model.encode_items(np.arange(N, dtype=np.int32))
    some = np.array([7, 2, 11], dtype=np.int32)
    torch.testing.assert_close(
        trained.model.encode_items(some), items[torch.from_numpy(some).long()], rtol=0, atol=1e-4
    )


def test_answers_do_not_depend_on_the_mode(trained: Trained) -> None:
    """Validation comes in the middle of training: no dropout, and the mode is as it was."""
    model, histories = trained.model, trained.split.test.histories
    model.eval()
    expected = answers(model, histories)
    model.train()
    torch.testing.assert_close(answers(model, histories), expected, rtol=0, atol=0)
    assert model.training


def test_ranking_leaves_no_trace(trained: Trained) -> None:
    """Validation sees held-out items: no tensor and no random number may know of it."""
    model = trained.model
    model.train()
    before, random = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    evaluate(model, trained.split.test.histories, trained.split.test.targets)
    assert torch.equal(torch.get_rng_state(), random)
    for tensor_name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[tensor_name]), tensor_name


def test_only_the_newest_items_count(trained: Trained) -> None:
    most = trained.model.config.max_items
    rows = [np.arange(start, start + most) % N for start in range(5)]
    longer = [np.concatenate(([9, 4, 13], row)) for row in rows]
    users = [answers(trained.model, Ragged.from_rows(each)) for each in (rows, longer)]
    torch.testing.assert_close(*users, rtol=0, atol=1e-4)


def test_a_position_reads_as_its_prefix(trained: Trained) -> None:
    """Where ``forward`` maps histories to (states, which are real): what is trained at a position
    is what is asked for a user whose history ends there, so nothing that follows can be seen.
    """
    model = trained.model
    shape = list(inspect.signature(type(model).forward).parameters.values())[1:]
    returned = type(model).forward.__annotations__.get("return")
    if [p.annotation for p in shape] != ["Ragged"] or returned != "tuple[Tensor, Tensor]":
        pytest.skip("forward does not map histories to states")
    rows = trained.split.test.histories.head(min(model.config.max_items, 8)).take(np.arange(6))
    model.eval()
    with torch.no_grad():
        states, real = model(rows)
    prefixes = [rows[row][: t + 1] for row in range(len(rows)) for t in range(len(rows[row]))]
    alone = model.encode_users(Ragged.from_rows(prefixes))
    torch.testing.assert_close(_unit(states[real]), _unit(alone[:, : states.shape[-1]]))


def _unit(vectors: Tensor) -> Tensor:
    """Directions: some methods hand out users of unit length."""
    return nn.functional.normalize(vectors, dim=-1)


def test_an_empty_history_is_refused(trained: Trained) -> None:
    with pytest.raises(DataError, match="empty history"):
        answers(trained.model, Ragged.from_rows([[1], []]))


# -- on disk, on other data, with new items ------------------------------------------------------


def test_saved_and_loaded(trained: Trained, tmp_path: Path) -> None:
    """Into a model that started elsewhere: the trained tensors are all there is."""
    path, split = tmp_path / "model.safetensors", trained.split
    save_tensors(path, trained_tensors(trained.model))
    other = build(trained.name, trained.catalog, seed=1)
    load_trained(other, load_tensors(path)[0], str(path))
    ranks = [
        evaluate(model, split.test.histories, split.test.targets).ranks
        for model in (trained.model, other)
    ]
    assert np.array_equal(*ranks)
    # Of a chain that is learned by heart nearly all ranks are one, whatever was lost.
    assert torch.equal(*(_scores(model, split.test.histories) for model in (trained.model, other)))


def _scores(model: Any, histories: Ragged) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model.scorer()(histories)
    return found


def test_what_a_search_does_not_reach_is_said_beside_the_scores(name: str) -> None:
    few = {"beams": 2} if "beams" in METHODS[name].Config.model_fields else {}
    model = build(name, Catalog.of_texts([simple_text(97 * code) for code in range(N)]), **few)
    searches = bool(_scores(model, Ragged.from_rows([[1, 2, 3]])).isneginf().any())
    remarks = model.config.remarks if isinstance(model.config, Remarked) else ()
    assert any("MRR@2 " in remark for remark in remarks) == searches
    assert not (isinstance(model, Embedder) and remarks)


def test_other_data_can_start_from_it(trained: Trained) -> None:
    """Tensors whose shape follows from the items are named in ``item_tensors``."""
    texts = [simple_text(97 * code) for code in range(N + 7)]
    other = trained_tensors(build(trained.name, Catalog.of_texts(texts)))
    own = trained_tensors(trained.model)
    of_items = getattr(trained.method, "item_tensors", frozenset())
    assert other.keys() == own.keys()
    differ = {n for n in own if own[n].shape != other[n].shape}
    assert differ <= of_items, f"{sorted(differ - of_items)} are not in item_tensors"


def test_new_items(trained: Trained) -> None:
    """By text alone into the ranking and into histories, or one clear line.

    Old scores stay where they are inner products; others may depend on the whole catalog.
    """
    model = build(trained.name, trained.catalog)
    load_trained(model, trained_tensors(trained.model), "here")
    if not isinstance(model, TakesNewItems):
        if not isinstance(model, Embedder):
            return
        with pytest.raises(DataError, match="text"):
            model.encode_items(["small red lamp"])
        return
    histories = trained.split.test.histories
    before = _scores(model, histories)
    with pytest.raises(DataError, match="text"):
        model.add_items(["small red lamp", " "])
    assert model.n_items == N
    assert model.add_items(["small red lamp", "old blue paper book"]).tolist() == [N, N + 1]
    after = _scores(model, histories)
    assert model.n_items == N + 2 and after.shape == (len(histories), N + 2)
    assert bool(after.isfinite().all())
    if isinstance(model, Embedder):
        torch.testing.assert_close(after[:, :N], before, rtol=0, atol=1e-4)
    users = answers(model, Ragged.from_rows([[3, N], [3, N + 1]]))
    assert bool(users.isfinite().all()) and not torch.equal(users[0], users[1])
