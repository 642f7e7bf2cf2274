"""What L2Rec's vectors are worth to the stages downstream (L2Rec, section 3.6), without users.

    DATA: exposures, clicks, replies              RUN: trained on clicks before the first day
         |                                              |
         v                                              v
    what was known as each day began  <---------  vectors of items; of users, anew each day
         |
         +--> control     DLRM and two towers on ids, histories, attributes, counters
         +--> treatment   the same, and the frozen vectors, their cosine and product
         |
         v
    days:  ... vectors' past ... | train ........ | choose epoch | test ... test |

Both arms have the same code, options, seeds, order of batches and start of the tables, and are
trained anew. Each is tested on days that neither it nor the vectors have seen. Exposures were
chosen by the recommender of that time, so this measures how the log is predicted, not what users
would have done with other lists: that takes an A/B test (`l2rec abtest`).
"""

from __future__ import annotations

__all__ = [
    "DownstreamConfig",
    "Scored",
    "area",
    "grouped_area",
    "mean_by_user",
    "midranks",
    "run_downstream",
]

import datetime
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from l2rec.config import override_values
from l2rec.data.catalog import Catalog
from l2rec.data.dataset import Dataset, open_dataset
from l2rec.data.ragged import Ragged
from l2rec.errors import CheckpointError, ConfigError, DataError, TrainingError
from l2rec.index import read_vectors
from l2rec.metrics import expected_ranks
from l2rec.protocols import Embedder, Losses, TakesNewItems
from l2rec.runs.checkpoint import read_json, replacing, write_json
from l2rec.runs.loop import Progress
from l2rec.runs.train import Predictor, device, hardware, load, open_run_dataset, versions
from l2rec.studies.abtest import holm
from l2rec.studies.downstream.daily import CLICK, DAY, Exposures, Known, daily_log, exposures
from l2rec.studies.downstream.dlrm import DLRM, DLRMConfig, Features, TwoTower

ARMS = CONTROL, TREATMENT = "control", "treatment"
TASKS = "click", "reply"
REPORT = "downstream"
"""``kind`` of the report, by which a folder is known again."""
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


class DownstreamConfig(BaseModel):
    """Options of the comparison, the same for both arms."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dlrm: DLRMConfig = DLRMConfig()
    test_days: int = Field(2, ge=1)
    """The last days of the log; the day before them chooses the epoch, those before it train."""
    epochs: int = Field(10, ge=1)
    patience: int = Field(2, ge=1)
    """Epochs without a better day before the test days, until training stops."""
    batch: int = Field(512, ge=2)
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-5, ge=0)
    max_history: int = Field(50, ge=1)
    """Newest clicks that are read of a user."""
    user_buckets: int = Field(1 << 14, ge=1)
    """Rows of the table of user hashes."""
    window_hours: float = Field(24.0, gt=0)
    """How long after an exposure a click or reply may belong to it."""
    fields: tuple[str, ...] | None = None
    """Catalog fields that are attributes; by default those of few different values."""
    ks: tuple[int, ...] = (10, 50, 100)
    """Of Recall@k of the matching stage."""
    alpha: float = Field(0.05, gt=0, lt=1)
    """Of the intervals."""


def downstream_config(overrides: Sequence[str] = ()) -> DownstreamConfig:
    """The options with ``key=value`` overrides, such as ``dlrm.dim=32``.

    Raises:
        ConfigError: an unknown key or a bad value.
    """
    try:
        return DownstreamConfig(**override_values(overrides))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        known = ", ".join(DownstreamConfig.model_fields)
        raise ConfigError(f"{key}={first['input']!r}: {first['msg']} (keys: {known})") from None


# -- the frozen vectors ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Frozen:
    """Vectors of the treatment. items: [N, D], zero where there is none. until: seconds, the
    newest event they know of. users: ([n] users, [n] days) -> [n, D], zero where there is none.
    """

    items: Floats
    until: float
    users: Callable[[Ints, Ints], Floats]
    about: Mapping[str, Any]


def vectors_of_run(
    run: Path, dataset: Dataset, max_history: int, progress: Progress, run_data: Path | None = None
) -> Callable[[Known], Frozen]:
    """Vectors made by a run: users as each day begins, items of any time (new ones by text).

    Raises:
        ConfigError: a run that has no vectors. DataError: a run of other items altogether.
    """
    past = open_run_dataset(run, run_data)
    if past.event_types is not None and set(past.event_type_names) - {CLICK, "reply"}:
        progress.line(
            f"note: {run} was trained on events of type {', '.join(past.event_type_names)}, and "
            f"users are encoded from their clicks; see `l2rec prepare --only {CLICK}`"
        )
    predictor = load(run)
    if not isinstance(predictor.model, Embedder):
        raise ConfigError(f"{run}: {type(predictor.model).__name__} has no vectors: it only ranks")
    ids: list[str] = dataset.item_ids.to_pylist()
    known = sum(predictor.row_of(item) is not None for item in ids)
    if not known:
        raise DataError(f"{run} knows none of the {len(ids):,} items of {dataset.path}")
    if known < len(ids) and isinstance(predictor.model, TakesNewItems):
        new = {
            item: text
            for item, text in zip(ids, dataset.texts(), strict=True)
            if predictor.row_of(item) is None and text.strip()
        }
        predictor = predictor.with_items(new)
        progress.line(f"{len(new):,} items newer than {run}: encoded from their texts alone")
    rows = np.array([-1 if (at := predictor.row_of(item)) is None else at for item in ids])
    assert predictor.vectors is not None
    items = predictor.vectors.float().cpu().numpy()[rows] * (rows >= 0)[:, None]
    until = float(np.asarray(past.timestamps).max())

    def frozen(features: Known) -> Frozen:
        def users(user: Ints, day: Ints) -> Floats:
            return _encoded(predictor, features, rows, user, day, max_history, progress)

        about = {
            "source": str(run),
            "version": predictor.version,
            "users": "encoded anew as each day begins",
            "items_known": known,
            "items_by_text": int((rows >= 0).sum()) - known,
            "items_without": int((rows < 0).sum()),
        }
        return Frozen(items.astype(np.float32), until, users, about)

    return frozen


def _encoded(
    predictor: Predictor,
    known: Known,
    rows: Ints,
    user: Ints,
    day: Ints,
    max_history: int,
    progress: Progress,
) -> Floats:
    """[n, D] users as days begin. Of days between which a user clicked nothing, one is encoded."""
    state = user * (int(known.clicks.size) + 1) + known.n_clicks(user, day)
    _, first, back = np.unique(state, return_index=True, return_inverse=True)
    histories = known.histories(user[first], day[first], max_history)
    mapped = rows[histories.values]  # items without a row of the model are left out
    row_of = np.repeat(np.arange(len(histories)), histories.lengths)[mapped >= 0]
    lengths = np.bincount(row_of, minlength=len(histories))
    clean = Ragged(mapped[mapped >= 0].astype(np.int32), np.concatenate(([0], np.cumsum(lengths))))
    some = np.flatnonzero(lengths > 0)
    assert predictor.vectors is not None
    found = np.zeros((len(clean), predictor.vectors.shape[1]), dtype=np.float32)
    progress.line(f"encoding {len(some):,} histories of {len(np.unique(user)):,} users")
    with torch.inference_mode():
        for start in range(0, len(some), 512):
            part = some[start : start + 512]
            found[part] = predictor.model.encode_users(clean.take(part)).float().cpu().numpy()
            progress.validating(min(start + 512, len(some)), len(some))
    return found[back]


def vectors_of_files(folder: Path, dataset: Dataset, until: float) -> Callable[[Known], Frozen]:
    """Vectors that `l2rec embed` wrote: one for each user, whatever the day.

    Raises:
        CheckpointError: files that are missing or torn. DataError: of two models, or of other ids.
    """
    items, users = read_vectors(folder / "items.parquet"), read_vectors(folder / "users.parquet")
    if items.version != users.version:
        raise DataError(
            f"{folder}: items of model {items.version}, users of {users.version}; embed them again"
        )
    of_items, items_found = _aligned(items.ids, items.vectors, dataset.item_ids)
    of_users, users_found = _aligned(users.ids, users.vectors, dataset.user_ids)
    if not items_found or not users_found:
        raise DataError(
            f"{folder} has vectors of {items_found} items and {users_found} users of "
            f"{dataset.path}; embed a run on the same items and users"
        )
    about = {
        "source": str(folder),
        "version": items.version,
        "users": "one vector for all days",
        "items_known": items_found,
        "items_by_text": 0,
        "items_without": dataset.n_items - items_found,
        "users_without": dataset.n_users - users_found,
    }
    return lambda _: Frozen(of_items, until, lambda user, day: of_users[user], about)


def _aligned(ids: list[str], vectors: Floats, wanted: Any) -> tuple[Floats, int]:
    """Rows for ``wanted`` ids, zero where there is none, and how many there are."""
    at = pc.index_in(pc.cast(wanted, pa.string()), value_set=pa.array(ids, pa.string()))
    rows = pc.fill_null(at, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    found: Floats = vectors[rows] * (rows >= 0)[:, None]
    return found.astype(np.float32), int((rows >= 0).sum())


# -- features --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Days:
    """Days since 1970: first to train on, the one that chooses, first of the test, last."""

    train: int
    choose: int
    test: int
    last: int

    def named(self) -> dict[str, str]:
        """What each period is, in dates."""
        spans = {
            "train": (self.train, self.choose - 1),
            "choose": (self.choose, self.choose),
            "test": (self.test, self.last),
        }
        return {name: f"{_date(a)} .. {_date(b)}" for name, (a, b) in spans.items()}


def _date(day: int) -> str:
    return (datetime.date(1970, 1, 1) + datetime.timedelta(days=day)).isoformat()


def periods(until: float, last: int, test_days: int) -> Days:
    """Training begins on the first day after the newest event that the vectors know.

    Raises:
        DataError: no day is left to train on.
    """
    days = Days(int(until // DAY) + 1, last - test_days, last - test_days + 1, last)
    if days.train >= days.choose:
        wanted = _date(last - test_days - 3)
        raise DataError(
            f"the vectors know events up to {_date(days.train - 1)} and the log ends on "
            f"{_date(last)}: of the {max(0, last - days.train + 1)} days left, {test_days} are to "
            f"test, one is to choose and none to train on; train the run on less: `l2rec prepare "
            f"LOG --only click --before {wanted}`"
        )
    return days


@dataclass
class States:
    """S users or items as a day begins. owner, day: [S]. dense: [S, K] float32, not scaled.
    ids: [S, F] int64. vectors: [S] rows of the table's frozen vectors. histories: of users.
    """

    owner: Ints
    day: Ints
    dense: Tensor
    ids: Tensor
    vectors: Ints
    histories: Ragged | None = None


def user_hash(users: Ints, buckets: int) -> Ints:
    """Buckets [n] of user ints, by splitmix64: near ints are far apart."""
    x = users.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) % np.uint64(buckets)).astype(np.int64)


def attributes(
    catalog: Catalog, names: Sequence[str] | None = None, most: int = 5000
) -> dict[str, Ints]:
    """Values [N] from 0 on of catalog fields, in order of their first item.

    Without ``names``: the fields of at most ``most`` values that four items share on average.
    """
    found = {}
    for name in catalog.fields if names is None else names:
        column = np.array(catalog.field(name), dtype=object)
        _, values = np.unique(column.astype(str), return_inverse=True)
        count = int(values.max(initial=-1)) + 1
        if names is not None or (1 < count <= most and 4 * count <= len(values)):
            found[name] = values.astype(np.int64)
    return found


class Table:
    """Everything the stages read, once for all arms and seeds."""

    def __init__(
        self,
        dataset: Dataset,
        config: DownstreamConfig,
        make: Callable[[Known], Frozen],
        until: float,
        progress: Progress,
    ) -> None:
        log = daily_log(dataset)
        self.config, self.n_items = config, dataset.n_items
        self.days = periods(until, log.days[1], config.test_days)
        days = self.days
        shown = exposures(log, cut=days.test, window=3600 * config.window_hours)
        self.shown = shown.take(np.flatnonzero(shown.day >= days.train))
        self.fields = attributes(Catalog(dataset.catalog), config.fields)
        self.known = Known(log, self.fields, average=days.train)
        self.parts = {
            "train": np.flatnonzero(self.shown.day < days.choose),
            "choose": np.flatnonzero(self.shown.day == days.choose),
            "test": np.flatnonzero(self.shown.day >= days.test),
        }
        for name, rows in self.parts.items():
            clicks = int(self.shown.labels[rows, 0].sum())
            if not 0 < clicks < len(rows):
                raise DataError(
                    f"{len(rows):,} exposures to {name} with ({days.named()[name]}), {clicks:,} "
                    "of them clicked; both kinds are needed: give a longer log"
                )
        self.sizes = [config.user_buckets, dataset.n_items + 1]
        self.sizes += [int(values.max(initial=0)) + 1 for values in self.fields.values()]
        first = np.full(dataset.n_items, np.iinfo(np.int64).max)
        np.minimum.at(first, log.item, log.day)
        self.first_day = first
        self.frozen = make(self.known)
        self._tables(progress)

    def _tables(self, progress: Progress) -> None:
        shown = self.shown
        span = self.days.last + 1
        progress.line(
            f"{len(shown):,} exposures from {_date(self.days.train)} on; attributes of items: "
            + (", ".join(self.fields) or "none")
        )
        users, self.user_row = np.unique(shown.user * span + shown.day, return_inverse=True)
        self.users = self.user_states(users // span, users % span)
        train = self.parts["train"]
        old = train[self.known.shown_before(shown.item[train], shown.day[train])]
        self.trained = np.zeros(self.n_items, dtype=np.bool_)
        self.trained[shown.item[old]] = True
        items, self.item_row = np.unique(shown.item * span + shown.day, return_inverse=True)
        self.items = self.item_states(items // span, items % span)
        self.cross = _tensor(self.known.pairs(shown.user, shown.item, shown.day))
        self.labels = _tensor(shown.labels)
        vectors = self.frozen.users(self.users.owner, self.users.day)
        self.user_vectors = _tensor(vectors)
        self.item_vectors = _tensor(self.frozen.items)
        share = np.bincount(shown.item[train], minlength=self.n_items) / len(train)
        self.log_q = _tensor(np.log(np.maximum(share, 1e-12)).astype(np.float32))
        rates = shown.labels[train].mean(0).clip(1e-6, 1 - 1e-6)
        self.log_odds = _tensor(np.log(rates / (1 - rates)))
        self.clicks = {name: Clicks.of(self, self.parts[name]) for name in ("choose", "test")}

    def user_states(self, users: Ints, days: Ints) -> States:
        """Users as days begin."""
        return States(
            users,
            days,
            _tensor(self.known.users(users, days)),
            _tensor(user_hash(users, self.config.user_buckets)[:, None]),
            np.arange(len(users)),
            self.known.histories(users, days, self.config.max_history),
        )

    def item_states(self, items: Ints, days: Ints) -> States:
        """Items as days begin. The first row of the item table stands for items that nobody had
        been shown by then, and for those whose own row is not trained.
        """
        seen = self.known.shown_before(items, days) & self.trained[items]
        ids = [np.where(seen, items + 1, 0), *(values[items] for values in self.fields.values())]
        return States(
            items,
            days,
            _tensor(self.known.items(items, days)),
            _tensor(np.stack(ids, axis=1)),
            items,
        )


class Arm:
    """What one arm sees of the table: dense features, scaled on the training days.

    Counters and the cosine are standardised, column by column. Vectors and their product are
    divided by their mean length: as many standardised columns would drown the counters.
    """

    def __init__(self, table: Table, treated: bool) -> None:
        self.table, self.treated = table, treated
        self.size = table.item_vectors.shape[1] if treated else 0
        rows = table.parts["train"]
        parts = list(_blocks(rows))
        self.moments = _moments((self._pair_dense(p) for p in parts), self.size)
        self.user_moments = _moments(
            (self._user_dense(table.user_row[p]) for p in parts), self.size
        )
        self.item_moments = _moments(
            (self._item_dense(table.items, table.item_row[p]) for p in parts), self.size
        )

    def _user_dense(self, at: Ints) -> Tensor:
        users = self.table.users
        parts = [users.dense[at]]
        if self.treated:
            parts.append(self.table.user_vectors[users.vectors[at]])
        return torch.cat(parts, dim=1)

    def _item_dense(self, states: States, at: Ints) -> Tensor:
        parts = [states.dense[at]]
        if self.treated:
            parts.append(self.table.item_vectors[states.vectors[at]])
        return torch.cat(parts, dim=1)

    def _pair_dense(self, rows: Ints) -> Tensor:
        """[B, K]: users, items, pairs; and of the treatment cos(a, b), a, b and a b."""
        t = self.table
        user, item = t.user_row[rows], t.item_row[rows]
        parts = [t.users.dense[user], t.items.dense[item], t.cross[rows]]
        if self.treated:
            a, b = self.pair_vectors(rows)
            parts += [nn.functional.cosine_similarity(a, b)[:, None], a, b, a * b]
        return torch.cat(parts, dim=1)

    def pair_vectors(self, rows: Ints) -> tuple[Tensor, Tensor]:
        """Frozen vectors [B, D] of users and of items."""
        t = self.table
        users, items = t.users.vectors[t.user_row[rows]], t.items.vectors[t.item_row[rows]]
        return t.user_vectors[users], t.item_vectors[items]

    def _bags(self, at: Ints) -> tuple[Tensor, Tensor]:
        assert self.table.users.histories is not None
        taken = self.table.users.histories.take(at)
        # Row 0 of the item table is "new"; histories hold items that were shown.
        return _tensor(taken.values.astype(np.int64) + 1), _tensor(taken.offsets)

    def pairs(self, rows: Ints) -> Features:
        """Exposures for the ranking stage."""
        t = self.table
        user, item = t.user_row[rows], t.item_row[rows]
        ids = torch.cat((t.users.ids[user], t.items.ids[item]), dim=1)
        return Features(_standard(self._pair_dense(rows), self.moments), ids, *self._bags(user))

    def of_users(self, at: Ints) -> tuple[Features, Tensor | None]:
        """User states for their tower, and the frozen vectors."""
        users = self.table.users
        dense = _standard(self._user_dense(at), self.user_moments)
        frozen = self.table.user_vectors[users.vectors[at]] if self.treated else None
        return Features(dense, users.ids[at], *self._bags(at)), frozen

    def of_items(self, states: States, at: Ints) -> tuple[Features, Tensor | None]:
        """Item states for their tower, and the frozen vectors."""
        dense = _standard(self._item_dense(states, at), self.item_moments)
        frozen = self.table.item_vectors[states.vectors[at]] if self.treated else None
        return Features(dense, states.ids[at]), frozen


Moments = tuple[Tensor, Tensor]


def _tensor(values: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(values).to(device())


def _blocks(rows: Ints, size: int = 8192) -> Iterator[Ints]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _moments(blocks: Iterator[Tensor], size: int) -> Moments:
    """Shift and scale [K] of the columns of all blocks: mean and deviation of counters; no shift
    and the mean length of each of the vectors of ``size`` columns that follow them.
    """
    count, total, squares = 0, Tensor(), Tensor()
    for block in blocks:
        sums = block.double().sum(0), block.double().square().sum(0)
        total, squares = (total + sums[0], squares + sums[1]) if count else sums
        count += len(block)
    mean = total / count
    deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
    vectors = len(mean) // size if size else 0
    for start in range(len(mean) - vectors * size, len(mean), size or 1):
        mean[start : start + size] = 0.0
        deviation[start : start + size] = (squares[start : start + size].sum() / count).sqrt()
    deviation[deviation < 1e-6] = 1.0
    return mean.float(), deviation.float()


def _standard(dense: Tensor, moments: Moments) -> Tensor:
    return (dense - moments[0]) / moments[1]


# -- training --------------------------------------------------------------------------------------


@dataclass
class Watch:
    """Progress over all fits, of which ``number`` are done. A fit that stops early jumps ahead."""

    progress: Progress
    fits: int
    epochs: int
    number: int = -1
    name: str = ""

    def next(self, arm: Arm, seed: int, stage: str) -> Watch:
        """The next fit begins."""
        self.number += 1
        self.name = f"{TREATMENT if arm.treated else CONTROL}, seed {seed}, {stage}"
        return self

    def step(self, epoch: int, step: int, steps: int, loss: float) -> None:
        """``step`` of the epoch's ``steps`` is done."""
        each = self.epochs * steps
        done = self.number * each + epoch * steps + step
        text = f"{self.name}  loss {loss:.4f}"
        self.progress.training(epoch + step / steps, done, self.fits * each, text)


def _fit(
    model: Any,
    rows: Ints,
    loss: Callable[[Ints], Losses],
    judge: Callable[[], float],
    config: DownstreamConfig,
    seed: int,
    watch: Watch,
) -> dict[str, Any]:
    """Train on ``rows`` in an order that the seed and the epoch alone decide; keep the epoch that
    ``judge`` likes most (higher is better).
    """
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay)
    best, kept, history = -math.inf, {}, []
    steps = math.ceil(len(rows) / config.batch)
    for epoch in range(config.epochs):
        model.train()
        order = np.random.default_rng((seed, epoch)).permutation(rows)
        for step, at in enumerate(_blocks(order, config.batch), 1):
            found = loss(at)
            optimizer.zero_grad(set_to_none=True)
            found.total.backward()
            optimizer.step()
            watch.step(epoch, step, steps, float(found.total.detach()))
        model.eval()
        history.append(judge())
        if not math.isfinite(history[-1]):
            raise TrainingError(
                f"{watch.name}: not a number after epoch {epoch + 1}; choose a smaller lr"
            )
        if history[-1] > best:
            best = history[-1]
            kept = {key: value.clone() for key, value in model.state_dict().items()}
        elif epoch - int(np.argmax(history)) >= config.patience:
            break
    model.load_state_dict(kept)
    model.eval()
    return {"epochs": len(history), "best_epoch": int(np.argmax(history)) + 1}


def _probabilities(model: DLRM, arm: Arm, rows: Ints) -> Doubles:
    """[n, tasks] float64."""
    with torch.inference_mode():
        parts = [torch.sigmoid(model(arm.pairs(part)).double()) for part in _blocks(rows)]
    return torch.cat(parts).cpu().numpy()


def train_ranking(arm: Arm, seed: int, watch: Watch) -> tuple[DLRM, dict[str, Any]]:
    """The ranking stage of one arm; the epoch is chosen by log loss."""
    table, config = arm.table, arm.table.config
    torch.manual_seed(seed)
    model = DLRM(config.dlrm, table.sizes, len(arm.moments[0])).to(device())
    model.start_at(table.log_odds)
    choose = table.parts["choose"]
    labels = table.shown.labels[choose]

    def judge() -> float:
        return -float(_log_loss(_probabilities(model, arm, choose), labels).mean(0).sum())

    def loss(rows: Ints) -> Losses:
        return model.loss(arm.pairs(rows), table.labels[rows])

    facts = _fit(
        model, table.parts["train"], loss, judge, config, seed, watch.next(arm, seed, "ranking")
    )
    return model, facts


def train_matching(arm: Arm, seed: int, watch: Watch) -> tuple[TwoTower, dict[str, Any]]:
    """The matching stage of one arm; the epoch is chosen by the mean reciprocal rank of clicks."""
    table, config = arm.table, arm.table.config
    torch.manual_seed(seed)
    model = TwoTower(
        config.dlrm, table.sizes, len(arm.user_moments[0]), len(arm.item_moments[0]), arm.size
    ).to(device())
    model.start_at(table.log_odds)
    judged = table.clicks["choose"]

    def judge() -> float:
        return float((1.0 / judged.ranks(_tower_scores(model, arm))).mean())

    def loss(rows: Ints) -> Losses:
        item = table.shown.item[rows]
        return model.loss(
            model.users(*arm.of_users(table.user_row[rows])),
            model.items(*arm.of_items(table.items, table.item_row[rows])),
            table.labels[rows],
            _tensor(item),
            table.log_q[item],
        )

    facts = _fit(
        model, table.parts["train"], loss, judge, config, seed, watch.next(arm, seed, "matching")
    )
    return model, facts


Scores = Callable[[States], Callable[[Ints], Tensor]]
"""C candidates of a day -> a function of B user states, whose scores are [B, C]."""


def _tower_scores(model: TwoTower, arm: Arm) -> Scores:
    def of(candidates: States) -> Callable[[Ints], Tensor]:
        with torch.inference_mode():
            blocks = _blocks(np.arange(len(candidates.owner)))
            items = torch.cat([model.items(*arm.of_items(candidates, part)) for part in blocks])

        def scores(at: Ints) -> Tensor:
            with torch.inference_mode():
                return model.users(*arm.of_users(at)) @ items.T

        return scores

    return of


@dataclass(frozen=True)
class Clicks:
    """Held-out clicks, and on each day the items that had appeared by its end."""

    user: Ints
    state: Ints
    item: Ints
    day: Ints
    candidates: Mapping[int, States]

    @classmethod
    def of(cls, table: Table, rows: Ints) -> Clicks:
        rows = rows[table.shown.labels[rows, 0] > 0]
        shown, candidates = table.shown, {}
        for day in np.unique(shown.day[rows]):
            there = np.flatnonzero(table.first_day <= day)
            candidates[int(day)] = table.item_states(there, np.full(len(there), day))
        return cls(
            shown.user[rows], table.user_row[rows], shown.item[rows], shown.day[rows], candidates
        )

    def ranks(self, scores: Scores) -> Doubles:
        """Expected rank [n] of each click among all candidates of its day, from 1."""
        found = np.zeros(len(self.item))
        for day, states in self.candidates.items():
            of_users = scores(states)
            for part in _blocks(np.flatnonzero(self.day == day), 512):
                columns = np.searchsorted(states.owner, self.item[part])
                rows = of_users(self.state[part])
                found[part] = expected_ranks(rows, torch.from_numpy(columns)).numpy()
        return found


# -- metrics ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """A metric, and by how much each user moves it. value: its value. influence: [U] float64,
    of mean 0 or nearly: had user u not been there, the metric would be lower by about
    influence[u] / U. Its variance over users / U is that of the metric (delta method).
    """

    value: float
    influence: Doubles


def midranks(scores: npt.NDArray[np.floating], groups: Ints) -> Doubles:
    """Rank of each score within its group, from 1, ties at their mean: [n] float64."""
    order = np.lexsort((scores, groups))
    score, group = scores[order], groups[order]
    new_group = np.concatenate(([True], group[1:] != group[:-1]))
    new_value = new_group | np.concatenate(([True], score[1:] != score[:-1]))
    first_of_group = np.flatnonzero(new_group)[np.cumsum(new_group) - 1]
    tie = np.cumsum(new_value) - 1
    starts = np.flatnonzero(new_value)
    ends = np.concatenate((starts[1:], [len(order)]))
    ranks = np.empty(len(order))
    ranks[order] = (starts[tie] + ends[tie] + 1) / 2.0 - first_of_group
    return ranks


def area(
    scores: npt.NDArray[np.floating], labels: npt.NDArray[np.bool_], users: Ints, n_users: int
) -> Scored | None:
    """AUC over all pairs of a positive and a negative; None without both.

    The influence is that of clustered placements (Obuchowski, Biometrics 1997): exposures of one
    user are not independent.
    """
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if not positives or not negatives:
        return None
    everything = midranks(scores, np.zeros(len(scores), dtype=np.int64))
    among = midranks(scores, labels.astype(np.int64))
    placed = np.where(labels, everything - among, positives - (everything - among))
    placed /= np.where(labels, negatives, positives)
    value = float(placed[labels].mean())
    share = (placed - value) / np.where(labels, positives, negatives)
    moved = np.bincount(users, share, minlength=n_users).astype(np.float64)
    return Scored(value, n_users * moved)


def grouped_area(
    scores: npt.NDArray[np.floating], labels: npt.NDArray[np.bool_], users: Ints, n_users: int
) -> Scored | None:
    """GAUC: AUC of each user, weighted by exposures, over users with both classes; None without.

    (Zhu et al.: Optimized Cost per Click in Taobao, KDD '17.)
    """
    counts = np.bincount(users, minlength=n_users)
    positives = np.bincount(users, labels, minlength=n_users)
    negatives = counts - positives
    both = (positives > 0) & (negatives > 0)
    if not both.any():
        return None
    ranks = np.bincount(users, midranks(scores, users) * labels, minlength=n_users)
    pairs = np.where(both, positives * negatives, 1)
    each = (ranks - positives * (positives + 1) / 2) / pairs
    weights = counts * both
    return mean_by_user(each * weights, weights)


def mean_by_user(sums: Doubles, weights: npt.NDArray[Any]) -> Scored:
    """sum / weight over all users. sums, weights: [U]."""
    total = float(weights.sum())
    value = float(sums.sum()) / total
    return Scored(value, len(sums) * (sums - value * weights) / total)


def _log_loss(probabilities: Doubles, labels: npt.NDArray[Any]) -> Doubles:
    p = np.clip(probabilities, 1e-12, 1 - 1e-12)
    found: Doubles = -np.where(labels > 0, np.log(p), np.log1p(-p))
    return found


def ranking_scores(
    probabilities: Doubles, shown: Exposures, n_users: int, *, calibrated: bool = True
) -> dict[str, Scored | None]:
    """AUC, GAUC and log loss of each task. probabilities: [n, tasks]."""
    found: dict[str, Scored | None] = {}
    counts = np.bincount(shown.user, minlength=n_users)
    for column, task in enumerate(TASKS):
        p, labels = probabilities[:, column], shown.labels[:, column] > 0
        found[f"{task} auc"] = area(p, labels, shown.user, n_users)
        found[f"{task} gauc"] = grouped_area(p, labels, shown.user, n_users)
        if calibrated:
            losses = np.bincount(shown.user, _log_loss(p, labels), minlength=n_users)
            found[f"{task} log loss"] = mean_by_user(losses.astype(np.float64), counts)
    return found


def matching_scores(
    ranks: Doubles, clicks: Clicks, n_users: int, ks: Sequence[int]
) -> dict[str, Scored | None]:
    """Recall@k of held-out clicks, each of which counts the same."""
    counts = np.bincount(clicks.user, minlength=n_users)
    return {
        f"recall@{k}": mean_by_user(
            np.bincount(clicks.user, ranks <= k, minlength=n_users).astype(np.float64), counts
        )
        for k in ks
    }


def compared(
    arms: Mapping[str, Sequence[Mapping[str, Scored | None]]], n_users: int, alpha: float
) -> dict[str, dict[str, Any]]:
    """For each metric: mean and deviation over seeds of both arms, the difference, its interval.

    Runs of one seed are paired. The variance of the difference is that over users, of the mean of
    the seeds, by the delta method, plus that over seeds, divided by their number: users and seeds
    at hand are both a sample. p is two-sided, normal; ``p_holm`` over all metrics.
    """
    from scipy.special import ndtri
    from scipy.stats import norm

    found: dict[str, dict[str, Any]] = {}
    for metric in arms[CONTROL][0]:
        scored = {name: [seed[metric] for seed in runs] for name, runs in arms.items()}
        pairs = list(zip(scored[TREATMENT], scored[CONTROL], strict=True))
        values = {name: [s.value for s in each if s is not None] for name, each in scored.items()}
        found[metric] = {name: _spread(values[name]) for name in ARMS}
        real = [(t, c) for t, c in pairs if t is not None and c is not None]
        if len(real) < len(pairs):
            found[metric] |= {"difference": None}
            continue
        differences = np.array([t.value - c.value for t, c in real])
        influence = np.mean([t.influence - c.influence for t, c in real], axis=0)
        error = math.sqrt(float(influence.var(ddof=1)) / n_users) if n_users > 1 else math.nan
        seeds = float(differences.std(ddof=1)) if len(real) > 1 else 0.0
        whole = math.sqrt(error**2 + seeds**2 / len(real))
        difference = float(differences.mean())
        half = float(ndtri(1 - alpha / 2)) * whole
        z = difference / whole if whole > 0 else (math.inf if difference else 0.0)
        found[metric] |= {
            "difference": difference,
            "low": difference - half,
            "high": difference + half,
            "error_users": error,
            "sd_seeds": seeds if len(real) > 1 else None,
            "p": 2.0 * float(norm.sf(abs(z))),
        }
    tested = [metric for metric, values in found.items() if values["difference"] is not None]
    for metric, p in zip(tested, holm([found[m]["p"] for m in tested]), strict=True):
        found[metric]["p_holm"] = p
    return found


def _spread(values: Sequence[float]) -> dict[str, Any]:
    if not values:
        return {"mean": None, "sd": None, "seeds": []}
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "sd": sd, "seeds": [float(v) for v in values]}


# -- the command -----------------------------------------------------------------------------------


def run_downstream(
    data: Path,
    out: Path,
    *,
    progress: Progress,
    run: Path | None = None,
    run_data: Path | None = None,
    vectors: Path | None = None,
    until: float | None = None,
    seeds: int = 3,
    config: DownstreamConfig | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Train both arms of both stages, compare them, write OUT/report.json and predictions.parquet.

    Args:
        run, run_data: a finished run that makes the vectors, and its data set if it was moved.
        vectors, until: or a folder of `l2rec embed`, and the time of the newest event it knows,
            in seconds.
        seeds: how many, from 0 on.

    Raises:
        ConfigError, DataError, CheckpointError: as the message says.
    """
    started = time.monotonic()
    config = config or DownstreamConfig()
    if (run is None) == (vectors is None):
        raise ConfigError("give either --run RUN, or --vectors DIR of `l2rec embed`")
    if vectors is not None and until is None:
        raise ConfigError(
            "--vectors does not tell what its users had clicked: say with --until DATE which day "
            "began when they were encoded, so that training can begin after it"
        )
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds}: choose 1 or more")
    _claim(out)
    dataset = open_dataset(data)
    if run is not None:
        until = float(np.asarray(open_run_dataset(run, run_data).timestamps).max())
        periods(until, daily_log(dataset).days[1], config.test_days)  # before anything is encoded
        make = vectors_of_run(run, dataset, config.max_history, progress, run_data)
    else:
        assert vectors is not None and until is not None
        until = math.nextafter(until, -math.inf)  # the day that began then is the first to train
        make = vectors_of_files(vectors, dataset, until)
    table = Table(dataset, config, make, until, progress)
    clicks = table.clicks["test"]
    shown = table.shown.take(table.parts["test"])
    results: dict[str, list[dict[str, Scored | None]]] = {name: [] for name in ARMS}
    facts: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
    mean = {name: np.zeros((len(shown), len(TASKS))) for name in ARMS}
    watch = Watch(progress, 2 * len(ARMS) * seeds, config.epochs)
    for name in ARMS:
        arm = Arm(table, treated=name == TREATMENT)
        for seed in range(seeds):
            ranking, ranked = train_ranking(arm, seed, watch)
            probabilities = _probabilities(ranking, arm, table.parts["test"])
            mean[name] += probabilities / seeds
            matching, matched = train_matching(arm, seed, watch)
            found = ranking_scores(probabilities, shown, dataset.n_users)
            ranks = clicks.ranks(_tower_scores(matching, arm))
            found |= matching_scores(ranks, clicks, dataset.n_users, config.ks)
            results[name].append(found)
            facts[name].append(
                {
                    "seed": seed,
                    "ranking": {**ranked, "parameters": _size(ranking)},
                    "matching": {**matched, "parameters": _size(matching)},
                }
            )
            progress.line(f"{name}, seed {seed}: " + _short(found))
    report = _report(table, dataset, clicks, shown, results, facts, seeds)
    report |= {"command": command, "wall_seconds": round(time.monotonic() - started, 1)}
    out.mkdir(parents=True, exist_ok=True)
    _write_predictions(out / "predictions.parquet", dataset, shown, mean)
    write_json(out / "report.json", report)
    return report


def _claim(out: Path) -> None:
    """Refuse a folder that holds something else."""
    if not out.exists():
        return
    if not out.is_dir():
        raise CheckpointError(f"{out} is a file; choose a folder for --out")
    if any(out.iterdir()) and not (
        (out / "report.json").is_file() and read_json(out / "report.json").get("kind") == REPORT
    ):
        raise CheckpointError(
            f"{out} is not empty and holds no `l2rec downstream`; choose another --out"
        )


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _short(found: Mapping[str, Scored | None]) -> str:
    shown = [f"{name} {s.value:.4f}" for name, s in found.items() if s is not None]
    return "  ".join(shown)


def _floors(
    table: Table, clicks: Clicks, shown: Exposures, n_users: int
) -> dict[str, dict[str, float | None]]:
    """What needs no training: items' rates and clicks so far, and the vectors alone."""
    rows = table.parts["test"]
    names = table.known.names["item"]
    item = table.items.dense[table.item_row[rows]].cpu().numpy().astype(np.float64)
    rates = item[:, [names.index("click rate"), names.index("reply rate")]]
    a, b = Arm(table, treated=True).pair_vectors(rows)
    products = (a * b).sum(1).cpu().numpy().astype(np.float64)
    alone = np.stack((products, products), axis=1)
    ks = table.config.ks

    def popular(candidates: States) -> Callable[[Ints], Tensor]:
        counts = table.known.item_clicks(candidates.owner, candidates.day)
        row = torch.from_numpy(counts.astype(np.float32))
        return lambda at: row.expand(len(at), -1)

    def vectors(candidates: States) -> Callable[[Ints], Tensor]:
        items = table.item_vectors[candidates.owner].T
        return lambda at: table.user_vectors[table.users.vectors[at]] @ items

    floors = {
        "popularity": ranking_scores(rates, shown, n_users)
        | matching_scores(clicks.ranks(popular), clicks, n_users, ks),
        "vectors alone": ranking_scores(alone, shown, n_users, calibrated=False)
        | matching_scores(clicks.ranks(vectors), clicks, n_users, ks),
    }
    return {
        name: {metric: None if s is None else s.value for metric, s in scores.items()}
        for name, scores in floors.items()
    }


def _report(
    table: Table,
    dataset: Dataset,
    clicks: Clicks,
    shown: Exposures,
    results: Mapping[str, Sequence[Mapping[str, Scored | None]]],
    facts: Mapping[str, Any],
    seeds: int,
) -> dict[str, Any]:
    n_users = len(np.unique(shown.user))
    present = np.unique(shown.user)
    own = {
        name: [
            {
                metric: None
                if s is None
                else Scored(s.value, s.influence[present] * n_users / dataset.n_users)
                for metric, s in seed.items()
            }
            for seed in runs
        ]
        for name, runs in results.items()
    }
    labels = table.shown.labels
    return {
        "kind": REPORT,
        "dataset": {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "users": dataset.n_users,
            "items": dataset.n_items,
            "events": dataset.n_events,
            "origin": (dataset.meta.get("source") or {}).get("origin"),
        },
        "vectors": {**table.frozen.about, "dim": table.item_vectors.shape[1]},
        "periods": {
            name: {
                "days": table.days.named()[name],
                "exposures": len(rows),
                "clicks": int(labels[rows, 0].sum()),
                "replies": int(labels[rows, 1].sum()),
                "users": len(np.unique(table.shown.user[rows])),
            }
            for name, rows in table.parts.items()
        },
        "candidates": {_date(day): len(s.owner) for day, s in clicks.candidates.items()},
        "features": {**table.known.names, "attributes": list(table.fields)},
        "options": table.config.model_dump(mode="json"),
        "seeds": list(range(seeds)),
        "metrics": compared(own, n_users, table.config.alpha),
        "floors": _floors(table, clicks, shown, dataset.n_users),
        "training": dict(facts),
        "hardware": hardware(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }


def _write_predictions(
    path: Path, dataset: Dataset, shown: Exposures, mean: Mapping[str, Doubles]
) -> None:
    """Test exposures with what both arms said of them, mean over seeds."""
    columns: dict[str, Any] = {
        "user_id": pl.from_arrow(dataset.user_ids.take(pa.array(shown.user))),
        "item_id": pl.from_arrow(dataset.item_ids.take(pa.array(shown.item))),
        "timestamp": shown.time,
    }
    for column, task in enumerate(TASKS):
        columns[task] = shown.labels[:, column].astype(np.int8)
        columns |= {f"{task}_{name}": mean[name][:, column] for name in ARMS}
    with replacing(path) as partial:
        pl.DataFrame(columns).write_parquet(partial)
