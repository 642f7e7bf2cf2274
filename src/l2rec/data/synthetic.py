"""Generated data: chains with one right answer, a log of industrial size, and a simulated feed with
exposures, clicks and replies.
"""

from __future__ import annotations

__all__ = ["chain_dataset", "industrial_log", "simulated_exposures"]

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from l2rec.data.dataset import Dataset
from l2rec.data.formats.source import Source
from l2rec.data.prepare import PrepareConfig, build
from l2rec.errors import DataError

COLOURS = ("red", "blue", "green", "black", "white", "yellow", "brown", "grey", "pink", "orange")
KINDS = ("small", "large", "old", "new", "soft", "warm", "cold", "light", "heavy", "round")
MATERIALS = (
    "wood",
    "paper",
    "glass",
    "metal",
    "cotton",
    "leather",
    "stone",
    "silk",
    "wool",
    "plastic",
)
THINGS = (
    *("lamp", "table", "chair", "book", "cup", "shoe", "coat", "clock", "box", "bag"),
    *("knife", "bowl", "door", "window", "bed", "pen", "bottle", "brush", "basket", "hat"),
    *("spoon", "mirror", "carpet", "shelf", "bike", "boat", "drum", "flute", "kite", "ladder"),
)
N_TEXTS = len(COLOURS) * len(KINDS) * len(MATERIALS) * len(THINGS)


def chain_dataset(out: str | Path, n_users: int, n_items: int, length: int, seed: int) -> Dataset:
    """Prepare a data set whose users walk along one cycle: each item determines the next.

    The cycle goes through all items in random order; their texts are different simple English
    words. Each user starts at a random item and has ``length`` events. A model that has learned
    the chain ranks the right item first for everybody.

    Raises:
        DataError: a size that is too small or too large.
    """
    for name, value, least in (("n_users", n_users, 1), ("n_items", n_items, 2)):
        if value < least:
            raise DataError(f"{name}={value} is less than {least}; choose at least {least}")
    if n_items > N_TEXTS:
        raise DataError(f"n_items={n_items:,} is more than the {N_TEXTS:,} texts there are")
    if length < 1:
        raise DataError(f"length={length} is less than 1; choose at least 3 to evaluate")
    rng = np.random.default_rng(seed)
    cycle = rng.permutation(n_items)
    starts = rng.integers(n_items, size=n_users)
    items = cycle[(starts[:, None] + np.arange(length)) % n_items].reshape(-1)
    users = np.repeat(np.arange(n_users), length)
    times = np.tile(np.arange(length, dtype=np.float64), n_users)
    # Codes that are spread over the whole range, so that neighbours share few words.
    texts = [simple_text(int(code)) for code in rng.permutation(N_TEXTS)[:n_items]]

    def events() -> Iterator[pa.RecordBatch]:
        yield pa.RecordBatch.from_pydict(
            {
                "user_id": _ids("u", users),
                "item_id": _ids("i", items),
                "timestamp": pa.array(times),
            }
        )

    def catalog(fields: Sequence[str]) -> Iterator[pa.RecordBatch]:
        columns = {"item_id": _ids("i", np.arange(n_items))}
        columns |= {name: pa.array(texts) for name in fields}
        yield pa.RecordBatch.from_pydict(columns)

    options = f"n_users={n_users}, n_items={n_items}, length={length}, seed={seed}"
    return build(
        Source(format="chain", files=(), events=events, catalog=catalog, fields=("title",)),
        Path(out),
        PrepareConfig(keep_all_items=True),
        origin=f"chain_dataset({options})",
    )


def simple_text(code: int) -> str:
    """Return four words such as "small red wood lamp", different for each code < ``N_TEXTS``."""
    words = []
    for choices in (KINDS, COLOURS, MATERIALS, THINGS):
        code, at = divmod(code, len(choices))
        words.append(choices[at])
    return " ".join(words)


EVENT_TYPES = ("exposure", "click", "reply")
EVENT_SHARES = (0.90, 0.09, 0.01)
ATTRIBUTES: dict[str, Sequence[str]] = {
    "kind": KINDS,
    "colour": COLOURS,
    "material": MATERIALS,
    "thing": THINGS,
    "brand": [f"brand {n}" for n in range(1000)],
    "style": ["classic", "modern", "rustic", "plain", "festive"],
    "audience": ["children", "adults", "families", "professionals"],
    "season": ["spring", "summer", "autumn", "winter", "all year"],
    "origin": ["north", "south", "east", "west"],
}
DAYS = 30
FIRST_SECOND = 1_700_000_000


def industrial_log(
    out: str | Path,
    n_events: int,
    n_users: int,
    n_items: int,
    seed: int,
    *,
    chunk_events: int = 1 << 21,
) -> Path:
    """Write a log like that of a platform: a folder of events-*.parquet and items.parquet.

    ``n_events`` events (exposures, clicks, replies) over a month, roughly in order of time; few
    items and users have most of them, yet all appear once if there are events enough. Items
    have ten text attributes. ``chunk_events``: events per file, in memory at a time. The folder
    is a source for `prepare`.

    Raises:
        DataError: ``out`` exists and is not empty.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out} is not empty; choose another folder or remove it")
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    _write_items(out / "items.parquet", n_items, rng)
    user_order, item_order = rng.permutation(n_users), rng.permutation(n_items)
    for number, first in enumerate(range(0, n_events, chunk_events)):
        rows = np.arange(first, min(n_events, first + chunk_events))
        users = _skewed(rows, n_events, user_order, 1.5, rng)
        items = _skewed(rows, n_events, item_order, 3.0, rng)
        # Up to a minute of disorder, as in logs of several machines.
        seconds = FIRST_SECOND + rows * (DAYS * 86_400 / n_events) + rng.uniform(0, 60, len(rows))
        types = rng.choice(len(EVENT_TYPES), size=len(rows), p=EVENT_SHARES).astype(np.int8)
        table = pa.table(
            {
                "user_id": _ids("user-", users),
                "item_id": _ids("item-", items),
                "timestamp": pa.array(np.floor(seconds)),
                "event_type": pa.DictionaryArray.from_arrays(types, pa.array(EVENT_TYPES)),
            }
        )
        pq.write_table(table, out / f"events-{number:05d}.parquet", compression="zstd")
    sizes = {"events": n_events, "users": n_users, "items": n_items, "seed": seed}
    (out / "made.txt").write_text(json.dumps(sizes) + "\n", encoding="utf-8")
    return out


def _skewed(
    rows: npt.NDArray[np.int64],
    n_events: int,
    order: npt.NDArray[np.int64],
    power: float,
    rng: np.random.Generator,
) -> npt.NDArray[np.int64]:
    """Draw a member of ``order`` for each row by a power law; each member once at regular rows."""
    n = len(order)
    places = (n * rng.random(len(rows)) ** power).astype(np.int64)
    stride = n_events // n
    if stride:
        regular = (rows % stride == 0) & (rows // stride < n)
        places[regular] = rows[regular] // stride
    return order[places]


def _write_items(path: Path, n_items: int, rng: np.random.Generator) -> None:
    columns: dict[str, Any] = {"item_id": _ids("item-", np.arange(n_items))}
    for name, choices in ATTRIBUTES.items():
        codes = pa.array(rng.integers(len(choices), size=n_items).astype(np.int32))
        columns[name] = pa.array(choices).take(codes)
    words = [columns[name] for name in ("kind", "colour", "material", "thing", "brand")]
    title = pc.binary_join_element_wise(*words, " ")
    columns = {"item_id": columns.pop("item_id"), "title": title, **columns}
    pq.write_table(pa.table(columns), path, compression="zstd", row_group_size=1 << 17)


def _ids(prefix: str, numbers: npt.NDArray[np.int64]) -> pa.Array:
    return pc.binary_join_element_wise(prefix, pa.array(numbers).cast(pa.string()), "")


TOPICS: dict[str, dict[str, str]] = {
    "food": {
        "baking": "sourdough yeast flour oven crust pastry",
        "grilling": "barbecue charcoal steak brisket smoker marinade",
        "coffee": "espresso beans roast grinder latte crema",
        "vegan": "tofu lentils chickpeas tempeh kale quinoa",
    },
    "music": {
        "jazz": "saxophone swing bebop trumpet improvisation quartet",
        "techno": "synthesizer rave drumbeat turntable club remix",
        "classical": "violin symphony sonata orchestra opera cello",
        "metal": "distortion riff headbanging drummer scream amplifier",
    },
    "sport": {
        "football": "goalkeeper penalty striker offside derby league",
        "running": "marathon sneakers pace sprint treadmill jogging",
        "climbing": "boulder carabiner rope summit chalk belay",
        "swimming": "freestyle pool backstroke goggles lap diving",
    },
    "nature": {
        "gardening": "tomatoes compost seedlings pruning greenhouse mulch",
        "birds": "owl feathers nest warbler binoculars migration",
        "hiking": "trail backpack mountain campsite tent ridge",
        "fishing": "trout reel bait angler lure river",
    },
    "science": {
        "astronomy": "telescope galaxy nebula planet comet eclipse",
        "chemistry": "molecule reaction acid catalyst laboratory beaker",
        "dinosaurs": "fossil triassic raptor excavation skeleton jurassic",
        "robots": "actuator sensor arduino drone automation servo",
    },
    "home": {
        "furniture": "sofa bookshelf wardrobe cushion armchair desk",
        "knitting": "yarn needles crochet scarf sweater stitch",
        "woodwork": "chisel plywood saw varnish carpenter joinery",
        "cleaning": "vacuum detergent mop laundry sponge bleach",
    },
    "animals": {
        "cats": "kitten purring whiskers litter tabby meow",
        "dogs": "puppy leash terrier barking fetch kennel",
        "horses": "saddle stable gallop pony bridle dressage",
        "aquarium": "goldfish coral guppy tank algae shrimp",
    },
    "games": {
        "chess": "checkmate bishop opening endgame grandmaster gambit",
        "puzzles": "crossword sudoku jigsaw riddle anagram maze",
        "shooters": "sniper respawn headshot multiplayer grenade loadout",
        "cards": "poker dealer bluff deck joker blackjack",
    },
    "travel": {
        "beaches": "sand snorkel surf palm sunscreen lagoon",
        "trains": "railway locomotive station conductor sleeper carriage",
        "cities": "museum skyline metro cathedral boulevard nightlife",
        "winter": "skiing snowboard chalet slope glacier sledge",
    },
    "money": {
        "stocks": "dividend portfolio broker earnings shares index",
        "housing": "mortgage landlord rent deposit lease realtor",
        "saving": "budget coupon frugal discount savings bargain",
        "startups": "founder venture pitch investor funding incubator",
    },
}
"""Words of each topic's texts, by category and topic."""
OPENINGS = ("notes on", "my", "a guide to", "questions about", "thinking of", "all about", "first")
FIRST_DAY = 1_699_920_000
"""2023-11-14, midnight UTC."""
CANDIDATES, SLOTS, SLOT_SECONDS = 40, 10, 20
"""Items ranked for a session, items shown of them, and seconds between two shown items."""
MAIN_TOPIC = 0.75
"""Weight of an item's first topic; its second has the rest."""
OLD = 0.5
"""Share of items that exist on the first day; the others appear later."""


def simulated_exposures(
    out: str | Path, n_users: int, n_items: int, days: int, seed: int, *, sessions: float = 1.0
) -> Path:
    """Write the log of a simulated feed: a folder of events-*.parquet and items.parquet.

    **A simulation**: results on it say nothing about any real platform. It is built so that texts
    can help: users have a taste for topics, and only titles reveal an item's topics (each value
    of the field ``category`` covers four topics).

    - Users have a taste for each topic and category, three favourites, and an activity.
    - Items have one or two topics, a title of their words, a category, a creator who mostly keeps
      to one category, and an appeal to everybody. Half of them appear after the first day.
    - Each session, a recommender that knows taste and appeal, with noise, shows ten of forty
      candidates. Clicks follow from affinity, appeal and position; replies, among the clicked
      items, from affinity and from how talkative the user is.

    ``sessions``: mean number per user and day. One file a day, in order of time. The folder is a
    source for `prepare`.

    Raises:
        DataError: ``out`` exists and is not empty, or a size is too small.
    """
    for name, value, least in (
        ("n_users", n_users, 1),
        ("n_items", n_items, 40),
        ("days", days, 1),
    ):
        if value < least:
            raise DataError(f"{name}={value} is less than {least}; choose at least {least}")
    if not sessions > 0:
        raise DataError(f"sessions={sessions} is not above 0; choose how many a user has a day")
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out} is not empty; choose another folder or remove it")
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    items = _Items.draw(n_items, days, rng)
    users = _Users.draw(n_users, rng)
    pq.write_table(items.table, out / "items.parquet", compression="zstd")
    for day in range(days):
        table = _simulated_day(day, users, items, sessions, rng)
        pq.write_table(table, out / f"events-{day:05d}.parquet", compression="zstd")
    sizes = {"users": n_users, "items": n_items, "days": days, "seed": seed, "sessions": sessions}
    (out / "made.txt").write_text(json.dumps({"simulated": sizes}) + "\n", encoding="utf-8")
    return out


@dataclass(frozen=True)
class _Items:
    """Simulated items. ``topics``: [N, 2] int64. ``appeal``: [N]. ``born``: [N] int64 day."""

    table: pa.Table
    topics: npt.NDArray[np.int64]
    appeal: npt.NDArray[np.float64]
    born: npt.NDArray[np.int64]

    @classmethod
    def draw(cls, n: int, days: int, rng: np.random.Generator) -> _Items:
        categories = list(TOPICS)
        words = np.array([t.split() for topics in TOPICS.values() for t in topics.values()])
        each = len(words) // len(categories)  # topics of a category
        n_creators = max(10, n // 20)
        creator = rng.integers(n_creators, size=n)
        home = rng.integers(len(categories), size=n_creators)[creator]
        category = np.where(rng.random(n) < 0.8, home, rng.integers(len(categories), size=n))
        first = category * each + rng.integers(each, size=n)
        near = category * each + rng.integers(each, size=n)
        second = np.where(rng.random(n) < 0.5, near, rng.integers(len(words), size=n))
        # Three different words of the first topic, one of the second.
        order = np.argsort(rng.random((n, words.shape[1])), axis=1)
        chosen = [pa.array(words[first, order[:, i]]) for i in range(3)]
        other = pa.array(words[second, rng.integers(words.shape[1], size=n)])
        opening = pa.array(np.array(OPENINGS)[rng.integers(len(OPENINGS), size=n)])
        listed = pc.binary_join_element_wise(*chosen, ", ")
        columns = {
            "item_id": _ids("item-", np.arange(n)),
            "title": pc.binary_join_element_wise(opening, listed, "and", other, " "),
            "category": pa.array(np.array(categories)[category]),
            "creator": _ids("creator ", creator),
        }
        born = np.where(rng.random(n) < OLD, 0, rng.integers(1, max(2, days), size=n))
        born[rng.permutation(n)[:CANDIDATES]] = 0
        topics = np.stack((first, second), axis=1)
        return cls(pa.table(columns), topics, rng.normal(size=n), born)


@dataclass(frozen=True)
class _Users:
    """Simulated users. ``taste``: [U, topics] float64. ``activity``: [U], mean 1.
    ``talkative``: [U].
    """

    taste: npt.NDArray[np.float64]
    activity: npt.NDArray[np.float64]
    talkative: npt.NDArray[np.float64]

    @classmethod
    def draw(cls, n: int, rng: np.random.Generator) -> _Users:
        each = [len(topics) for topics in TOPICS.values()]
        taste = rng.normal(0, 0.6, (n, len(each))).repeat(each, axis=1)
        taste += rng.normal(0, 0.5, taste.shape)
        favourites = np.argsort(rng.random(taste.shape), axis=1)[:, :3]
        np.put_along_axis(taste, favourites, rng.uniform(1.5, 3.0, favourites.shape), axis=1)
        activity = rng.lognormal(-0.32, 0.8, n)
        return cls(taste, activity, rng.normal(0, 0.7, n))


def _simulated_day(
    day: int, users: _Users, items: _Items, sessions: float, rng: np.random.Generator
) -> pa.Table:
    """Simulate the exposures, clicks and replies of one day, in order of time."""
    user = np.repeat(np.arange(len(users.activity)), rng.poisson(sessions * users.activity))
    there = np.flatnonzero(items.born <= day)
    weight = np.exp(0.4 * items.appeal[there] + (day - items.born[there] < 3) * 0.7)
    drawn = rng.choice(there, size=(len(user), CANDIDATES), p=weight / weight.sum())
    affinity = _affinity(users, items, user, drawn)
    score = 0.7 * affinity + 0.3 * items.appeal[drawn] + rng.normal(size=drawn.shape)
    ordered = np.sort(drawn, axis=1)
    at = np.argsort(drawn, axis=1, kind="stable")
    again = np.zeros_like(drawn, dtype=bool)
    np.put_along_axis(again, at[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    score[again] = -np.inf  # nothing is shown twice in a session
    best = np.argsort(-score, axis=1, kind="stable")[:, :SLOTS]
    shown, liked = np.take_along_axis(drawn, best, 1), np.take_along_axis(affinity, best, 1)
    real = np.isfinite(np.take_along_axis(score, best, 1))
    position = np.arange(SLOTS)
    click = -3.0 + liked + 0.5 * items.appeal[shown] - 0.6 * np.log1p(position)
    clicked = (rng.random(shown.shape) < _sigmoid(click)) & real
    reply = -1.2 + 0.5 * liked + users.talkative[user][:, None]
    replied = (rng.random(shown.shape) < _sigmoid(reply)) & clicked
    start = FIRST_DAY + 86_400 * day + rng.integers(86_400 - SLOTS * SLOT_SECONDS, size=len(user))
    seconds = start[:, None] + SLOT_SECONDS * position
    parts = [
        (
            np.broadcast_to(user[:, None], shown.shape)[mask],
            shown[mask],
            seconds[mask] + after,
            kind,
        )
        for kind, (mask, after) in enumerate(((real, 0), (clicked, 5), (replied, 12)))
    ]
    who, what, when = (np.concatenate([part[i] for part in parts]) for i in range(3))
    kinds = np.concatenate([np.full(len(part[0]), part[3], dtype=np.int8) for part in parts])
    order = np.lexsort((kinds, who, when))
    return pa.table(
        {
            "user_id": _ids("user-", who[order]),
            "item_id": _ids("item-", what[order]),
            "timestamp": pa.array(when[order].astype(np.float64)),
            "event_type": pa.DictionaryArray.from_arrays(kinds[order], pa.array(EVENT_TYPES)),
        }
    )


def _affinity(
    users: _Users, items: _Items, user: npt.NDArray[np.int64], item: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Return the affinity [S, C] of users [S] for items [S, C]."""
    first, second = items.topics[item, 0], items.topics[item, 1]
    taste = users.taste
    mixed: npt.NDArray[np.float64] = (
        MAIN_TOPIC * taste[user[:, None], first] + (1 - MAIN_TOPIC) * taste[user[:, None], second]
    )
    return mixed


def _sigmoid(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return 1.0 / (1.0 + np.exp(-x))
