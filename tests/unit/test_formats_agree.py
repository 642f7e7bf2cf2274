"""One log in every format: the same data set, to the fingerprint, as from Parquet.

The fingerprint covers user ids, item ids, texts, each user's order, and times in seconds, whatever
unit the file has them in. A log holds what its format can hold; strategies say why not more.
"""

from __future__ import annotations

import csv
import datetime
import gzip
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l2rec.data.dataset import Dataset
from l2rec.data.formats.movielens import GENRES
from l2rec.data.prepare import PrepareConfig, prepare

Texts = tuple[str, str, str]
"""An item's three fields, in the order in which they make its text."""
FIELDS = ("title", "category", "brand")


@dataclass(frozen=True)
class Log:
    """Events (user, item, milliseconds) and the catalog."""

    events: list[tuple[str, str, int]]
    items: dict[str, Texts]

    def seconds(self) -> list[tuple[str, str, float]]:
        """Return the events with their times in seconds."""
        return [(user, item, time / 1000) for user, item, time in self.events]

    def tables(self) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Return the columns of the events and of the catalog."""
        events = zip(*self.seconds(), strict=True)
        items = zip(*((item, *texts) for item, texts in self.items.items()), strict=True)
        return (
            dict(zip(("user_id", "item_id", "timestamp"), map(list, events), strict=True)),
            dict(zip(("item_id", *FIELDS), map(list, items), strict=True)),
        )


# ---------------------------------------------------------------- logs

NASTY = "a0é漢🙂 ,;'\"\\|:/.-&<>\u2028\u00a0"
"""Characters that some format gives a meaning; line breaks and tabs are apart."""
LETTERS = st.sampled_from(NASTY) | st.characters(exclude_categories=["Cs", "Cc"])
IDS = st.sampled_from(["7", "007", "1e3", "1.0", "NA", "null", "true", " ", '"']) | st.text(
    LETTERS, min_size=1, max_size=4
)
LINES = st.text(LETTERS, max_size=8)
TEXTS = st.text(LETTERS | st.sampled_from("\t\n\r"), max_size=8)
THREE_TEXTS = st.tuples(TEXTS, TEXTS, TEXTS)


@st.composite
def logs(
    draw: st.DrawFn,
    ids: st.SearchStrategy[str] = IDS,
    texts: st.SearchStrategy[Texts] = THREE_TEXTS,
    unit: int = 1000,
) -> Log:
    """Draw a log whose times are multiples of ``unit`` milliseconds, with ties."""
    items = draw(st.dictionaries(ids, texts, min_size=1, max_size=5))
    users = draw(st.lists(ids, min_size=1, max_size=3))
    times = draw(
        st.lists(
            st.integers(max(-(2**31), -(2**41) // unit), 2**41 // unit), min_size=1, max_size=4
        )
    )
    event = st.tuples(*map(st.sampled_from, (users, sorted(items), [t * unit for t in times])))
    return Log(draw(st.lists(event, min_size=1, max_size=12)), items)


def in_order(log: Log) -> Log:
    """Put the events user by user, each at the time of its place, as without times."""
    lists = by_user(log)
    events = [(user, item) for user, items in lists.items() for item in items]
    return Log([(*event, at * 1000) for at, event in enumerate(events)], log.items)


def by_user(log: Log) -> dict[str, list[str]]:
    """Return the items of each user, in the order of the file."""
    lists: dict[str, list[str]] = {}
    for user, item, _ in log.events:
        lists.setdefault(user, []).append(item)
    return lists


ANY = logs()
# With tabs, a line inside quotes that has all cells is taken for a row, and the quotes for text.
BREAKS = st.text(LETTERS | st.sampled_from("\n\r"), max_size=8)
NO_TABS = logs(texts=st.tuples(BREAKS, BREAKS, BREAKS))
# RecBole has no quotes: no tabs and line breaks.
PLAIN = logs(texts=st.tuples(LINES, LINES, LINES))
# Amazon's texts are cleaned of markup and of more than one space; those here are clean.
CLEAN = st.text(st.sampled_from("a0é漢🙂 ,;'\"\\|:/.-"), max_size=8).map(
    lambda text: " ".join(text.split())
)
AMAZON = partial(logs, texts=st.tuples(CLEAN, CLEAN, CLEAN))
# Ids of sequence text are words, and a first line without digits may be a header. A lone full stop
# is LC-Rec's empty text.
WORDS = st.text(LETTERS, max_size=3).filter(lambda text: " " not in text).map("7{}".format)
LISTED = logs(texts=st.tuples(*[CLEAN.map(lambda text: text.strip("."))] * 3)).map(in_order)
# A user of two events would have no training event, which is not what leave-one-out does with it.
THREE_EVENTS = LISTED.map(lambda log: in_order(Log(log.events * 3, log.items)))
SEQUENCES = logs(ids=WORDS).map(in_order)
NAMED = logs(ids=WORDS, texts=st.tuples(CLEAN, st.just(""), st.just(""))).map(in_order)
# MovieLens' ids are numbers; a film has a title, a year and genres, and two of the three formats
# end a cell at a bar or at two colons.
TITLES = st.text(st.sampled_from("a0é ,;'\"\\/.-!"), max_size=8).map(str.strip)
YEARS = st.just("") | st.integers(1900, 2100).map(str)
CLASSES = st.lists(st.sampled_from(GENRES[1:]), max_size=3, unique=True)
FILMS = logs(
    ids=st.integers(1, 10**6).map(str),
    texts=st.tuples(
        TITLES, YEARS, CLASSES.map(lambda names: " ".join(sorted(names, key=GENRES.index)))
    ),
)

# Steam has days; its genres and tags are lists, and all its texts and those of Goodreads are clean.
DAY = 86_400_000
STEAM = logs(texts=st.tuples(CLEAN, CLEAN, CLEAN), unit=DAY)
GOODREADS = logs(texts=st.tuples(CLEAN, CLEAN, st.just("")))
BIG_NUMBERS = st.integers(1, 10**6).map(str)
MIND = logs(ids=BIG_NUMBERS.map("N{}".format), texts=st.tuples(LINES, LINES, LINES))
YAMBDA = logs(ids=BIG_NUMBERS)
MICROLENS = logs(ids=BIG_NUMBERS, texts=st.tuples(LINES, st.just(""), st.just("")), unit=1)


@st.composite
def sequences(
    draw: st.DrawFn, users: st.SearchStrategy[str], items: st.SearchStrategy[str], least: int
) -> Log:
    """Draw a log user by user whose times are places, as formats without times are read; of the
    texts there is the first.
    """
    texts = st.tuples(CLEAN, st.just(""), st.just(""))
    catalog = draw(st.dictionaries(items, texts, min_size=1, max_size=5))
    histories = st.lists(st.sampled_from(sorted(catalog)), min_size=least, max_size=9)
    log = draw(st.dictionaries(users, histories, min_size=1, max_size=4))
    events = [(user, item) for user, items in log.items() for item in items]
    return Log([(*event, at * 1000) for at, event in enumerate(events)], catalog)


NUMBERS = st.integers(0, 999).map(str)

# ---------------------------------------------------------------- formats

Prepared = Callable[[Log, Path], Dataset]


def from_files(folder: Path, log: str, items: str | None = None, **options: Any) -> Dataset:
    """Prepare files in a folder."""
    catalog, config = folder / items if items else None, PrepareConfig(**options)
    return prepare(folder / log, folder / "out", config, items=catalog, progress=False)


def parquet(log: Log, folder: Path) -> Dataset:
    """Prepare Parquet files: what all others are compared with."""
    for name, columns in zip(("log", "goods"), log.tables(), strict=True):
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return from_files(folder, "log.parquet", "goods.parquet")


def frames(kind: Callable[[Any], Any], log: Log, folder: Path) -> Dataset:
    """Prepare tables in memory."""
    events, items = map(kind, log.tables())
    return Dataset.from_frames(events, items, folder / "out", progress=False)


def in_pandas(columns: Any) -> Any:
    """Make a table of pandas."""
    return pytest.importorskip("pandas").DataFrame(columns)


def separated(
    log: Log,
    folder: Path,
    separator: str = ",",
    quote_all: bool = False,
    ends: str = "\n",
    encoding: str = "utf-8",
    suffix: str = "csv",
) -> Dataset:
    """Prepare files of separated cells, in quotes where they need them or all."""

    def quoted(cell: Any) -> str:
        text = str(cell)
        needs = quote_all or any(mark in text for mark in (separator, '"', "\n", "\r"))
        return '"' + text.replace('"', '""') + '"' if needs else text

    for name, columns in zip(("log", "goods"), log.tables(), strict=True):
        rows = [list(columns), *zip(*columns.values(), strict=True)]
        data = "".join(separator.join(map(quoted, row)) + ends for row in rows).encode(encoding)
        data = gzip.compress(data) if suffix.endswith("gz") else data
        (folder / f"{name}.{suffix}").write_bytes(data)
    return from_files(folder, f"log.{suffix}", f"goods.{suffix}")


def write(file: Path, rows: Iterable[Sequence[Any]], joint: str, encoding: str = "utf-8") -> None:
    """Write rows whose cells are as they are."""
    text = "".join(joint.join(map(str, row)) + "\n" for row in rows)
    file.write_bytes(text.encode(encoding))


def recbole(log: Log, folder: Path) -> Dataset:
    """Prepare RecBole's atomic files."""
    header = ("user_id:token", "item_id:token", "timestamp:float")
    write(folder / "log.inter", [header, *log.seconds()], "\t")
    header = ("item_id:token", *(f"{name}:token_seq" for name in FIELDS))
    rows = [(item, *texts) for item, texts in log.items.items()]
    write(folder / "log.item", [header, *rows], "\t")
    return from_files(folder, "log.inter")


def amazon(year: int, to_line: Callable[[Any], str], log: Log, folder: Path) -> Dataset:
    """Prepare JSON Lines, or the Python literals of 2014."""
    if year == 2023:
        user, asin, time, unit = "user_id", "parent_asin", "timestamp", 1
    else:
        user, asin, time, unit = "reviewerID", "asin", "unixReviewTime", 1000
    category = "category" if year == 2018 else "categories"
    brand = "store" if year == 2023 else "brand"
    reviews = [{user: u, asin: i, time: t // unit} for u, i, t in log.events]
    meta = [
        {asin: i, "title": texts[0], brand: texts[2]}
        | {category: [[texts[1]]] if year == 2014 else [texts[1]]}
        for i, texts in log.items.items()
    ]
    for name, rows in (("log.json", reviews), ("meta_log.json", meta)):
        write(folder / name, [[to_line(row)] for row in rows], "")
    dataset = from_files(folder, "log.json", "meta_log.json")
    assert dataset.meta["source"]["format"] == f"amazon-{year}"
    return dataset


def movielens_100k(log: Log, folder: Path) -> Dataset:
    """Prepare u.data and u.item."""
    write(folder / "u.data", [(u, i, 3, int(t)) for u, i, t in log.seconds()], "\t")
    films = [
        (i, titled(texts), "", "", "", *(int(name in texts[2].split()) for name in GENRES))
        for i, texts in log.items.items()
    ]
    write(folder / "u.item", films, "|", "latin-1")
    return from_files(folder, "u.data")


def movielens_1m(log: Log, folder: Path) -> Dataset:
    """Prepare ratings.dat and movies.dat."""
    write(folder / "ratings.dat", [(u, i, 3, int(t)) for u, i, t in log.seconds()], "::")
    films = [(i, titled(t), t[2].replace(" ", "|")) for i, t in log.items.items()]
    write(folder / "movies.dat", films, "::", "latin-1")
    return from_files(folder, "ratings.dat")


def movielens_latest(log: Log, folder: Path) -> Dataset:
    """Prepare ratings.csv and movies.csv."""
    events = [(u, i, 3.5, int(t)) for u, i, t in log.seconds()]
    films = [
        (i, titled(t), t[2].replace(" ", "|") or "(no genres listed)") for i, t in log.items.items()
    ]
    for name, header, rows in (
        ("ratings.csv", ("userId", "movieId", "rating", "timestamp"), events),
        ("movies.csv", ("movieId", "title", "genres"), films),
    ):
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    return from_files(folder, "ratings.csv")


def objects(log: Log, folder: Path, name: str) -> None:
    """Write the items as one JSON object."""
    items = {item: dict(zip(FIELDS, texts, strict=True)) for item, texts in log.items.items()}
    (folder / name).write_text(json.dumps(items, indent=1), encoding="utf-8")


def lc_rec(log: Log, folder: Path) -> Dataset:
    """Prepare LC-Rec's objects of lists and of items, with the raw ids apart."""
    users, items = list(by_user(log)), list(log.items)
    lists = {
        str(users.index(u)): [items.index(i) for i in seen] for u, seen in by_user(log).items()
    }
    (folder / "log.inter.json").write_text(json.dumps(lists))
    numbered = Log([], {str(at): log.items[item] for at, item in enumerate(items)})
    objects(numbered, folder, "log.item.json")
    for kind, ids in (("user", users), ("item", items)):
        write(folder / f"log.{kind}2id", [(raw, at) for at, raw in enumerate(ids)], "\t")
    return from_files(folder, "log.inter.json")


def recformer(log: Log, folder: Path) -> Dataset:
    """Prepare RecFormer's splits, maps and texts."""
    users, items = list(by_user(log)), list(log.items)
    ends = {"train": slice(None, -2), "val": slice(-2, -1), "test": slice(-1, None)}
    for split, part in ends.items():
        lists = {users.index(u): seen[part] for u, seen in by_user(log).items()}
        numbers = {u: [items.index(i) for i in seen] for u, seen in lists.items()}
        (folder / f"{split}.json").write_text(json.dumps(numbers))
    for name, ids in (("umap", users), ("smap", items)):
        (folder / f"{name}.json").write_text(json.dumps({raw: at for at, raw in enumerate(ids)}))
    objects(log, folder, "meta_data.json")
    return from_files(folder, "test.json")


def sequence_text(log: Log, folder: Path) -> Dataset:
    """Prepare a line for each user, with a table of the items."""
    write(folder / "user_sequence.txt", [(u, *seen) for u, seen in by_user(log).items()], " ")
    header = ("item_id", *FIELDS)
    with (folder / "goods.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *((i, *texts) for i, texts in log.items.items())])
    return from_files(folder, "user_sequence.txt", "goods.csv")


def p5(log: Log, folder: Path) -> Dataset:
    """Prepare P5's sequences of numbers, its maps, and an attribute of each item."""
    users, items = list(by_user(log)), list(log.items)
    lines = [
        (users.index(u) + 1, *(items.index(i) + 1 for i in seen))
        for u, seen in by_user(log).items()
    ]
    write(folder / "sequential_data.txt", lines, " ")
    named = {"id2user": users, "id2item": items, "id2attribute": [log.items[i][0] for i in items]}
    maps = {name: {at: raw for at, raw in enumerate(ids, 1)} for name, ids in named.items()}
    (folder / "datamaps.json").write_text(json.dumps(maps))
    attributes = {at: [at] for at in range(1, len(items) + 1)}
    (folder / "item2attributes.json").write_text(json.dumps(attributes))
    return from_files(folder, "sequential_data.txt")


def amazon_csv(log: Log, folder: Path) -> Dataset:
    """Prepare the CSV and the metadata of Amazon Reviews 2023."""
    with (folder / "log.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("user_id", "parent_asin", "rating", "timestamp"))
        writer.writerows((user, item, 5.0, time) for user, item, time in log.events)
    meta = [
        {"parent_asin": item, "title": title, "store": brand, "categories": [category]}
        for item, (title, category, brand) in log.items.items()
    ]
    write(folder / "meta_log.jsonl", [[json.dumps(row)] for row in meta], "")
    return prepare(folder / "log.csv", folder / "out", format="amazon-2023-csv", progress=False)


def unisrec(log: Log, folder: Path) -> Dataset:
    """Prepare samples by position, newest first and with histories of two, ids and texts apart."""
    users, items = by_user(log), {item: str(at) for at, item in enumerate(log.items)}
    header = ("user_id:token", "item_id_list:token_seq", "item_id:token")
    splits: list[list[tuple[str, ...]]] = [[], [], []]
    for user, sequence in enumerate(users.values()):
        codes = [items[item] for item in sequence]
        for at in range(len(codes) - 1, 0, -1):
            split = max(0, at - len(codes) + 3)
            splits[split].append((str(user), " ".join(codes[:at][-2:]), codes[at]))
    for name, rows in zip(("train", "valid", "test"), splits, strict=True):
        write(folder / f"log.{name}.inter", [header, *rows], "\t")
    write(folder / "log.user2index", [(user, at) for at, user in enumerate(users)], "\t")
    write(folder / "log.item2index", items.items(), "\t")
    texts = [(item, f"{title} ") for item, (title, _, _) in log.items.items()]
    write(folder / "log.text", [("item_id:token", "text:token_seq"), *texts], "\t")
    return from_files(folder, "log.train.inter")


def minionerec(log: Log, folder: Path) -> Dataset:
    """Prepare samples with histories of three, cut into splits as they come."""
    names = ("user_id", "history_item_title", "item_title", "history_item_id", "item_id")
    rows: list[tuple[str, ...]] = []
    for user, items in by_user(log).items():
        for at in range(1, len(items)):
            past = items[:at][-3:]
            titles = [log.items[item][0] for item in past]
            title = log.items[items[at]][0]
            rows.append((user, str(titles), title, str([int(i) for i in past]), items[at]))
    first, second = len(rows) * 8 // 10, len(rows) * 9 // 10
    splits = (rows[:first], rows[first:second], rows[second:])
    for name, part in zip(("train", "valid", "test"), splits, strict=True):
        (folder / name).mkdir()
        with (folder / name / "log.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([names, *part])
    (folder / "info").mkdir()
    info = [("<a_1>", title, item) for item, (title, _, _) in log.items.items()]
    write(folder / "info" / "log.txt", info, "\t")
    return from_files(folder, "train/log.csv", splits="none")  # which the other formats lack


def json_lines(log: Log, folder: Path) -> Dataset:
    """Prepare JSON Lines of the default keys."""
    for name, columns in zip(("log", "goods"), log.tables(), strict=True):
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        write(folder / f"{name}.jsonl", [[json.dumps(row)] for row in rows], "")
    return from_files(folder, "log.jsonl", "goods.jsonl")


def moment(milliseconds: int, form: str) -> str:
    """Write a time as a date in UTC."""
    start = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return (start + datetime.timedelta(milliseconds=milliseconds)).strftime(form)


def steam(log: Log, folder: Path) -> Dataset:
    """Prepare Python literals with days."""
    reviews = [
        {"username": u, "product_id": i, "date": moment(t, "%Y-%m-%d")} for u, i, t in log.events
    ]
    games = [
        {"id": i, "app_name": title, "genres": [genre] if genre else [], "tags": [tag]}
        for i, (title, genre, tag) in log.items.items()
    ]
    for name, rows in (("steam_reviews.json", reviews), ("steam_games.json", games)):
        write(folder / name, [[repr(row)] for row in rows], "")
    return from_files(folder, "steam_reviews.json", "steam_games.json")


def goodreads(log: Log, folder: Path) -> Dataset:
    """Prepare JSON Lines with dates of another form."""
    form = "%a %b %d %H:%M:%S +0000 %Y"
    shelved = [
        {"user_id": u, "book_id": i, "date_added": moment(t, form)} for u, i, t in log.events
    ]
    books = [
        {"book_id": i, "title": texts[0], "description": texts[1]} for i, texts in log.items.items()
    ]
    for name, rows in (("log.json", shelved), ("books.json", books)):
        write(folder / name, [[json.dumps(row)] for row in rows], "")
    return from_files(folder, "log.json", "books.json")


def mind(log: Log, folder: Path) -> Dataset:
    """Prepare behaviors.tsv, with all events as clicks, and news.tsv."""
    rows = [
        (n, u, moment(t, "%m/%d/%Y %I:%M:%S %p"), "", f"N0-0 {i}-1")
        for n, (u, i, t) in enumerate(log.events)
    ]
    write(folder / "behaviors.tsv", rows, "\t")
    news = [(i, t[1], t[2], t[0], "", "", "[]", "[]") for i, t in log.items.items()]
    write(folder / "news.tsv", news, "\t")
    return from_files(folder, "behaviors.tsv")


def yambda(sequential: bool, log: Log, folder: Path) -> Dataset:
    """Prepare Parquet of numbers, one event or one user in each row, and a catalog of our own."""
    events, items = log.tables()
    pq.write_table(pa.table(items), folder / "goods.parquet")
    frame = pl.DataFrame(
        {"uid": events["user_id"], "item_id": events["item_id"], "timestamp": events["timestamp"]}
    ).with_columns(pl.all().exclude("timestamp").cast(pl.UInt32), is_organic=pl.lit(1))
    if sequential:
        frame = frame.group_by("uid", maintain_order=True).agg(pl.all())
    frame.write_parquet(folder / "events.parquet")
    return from_files(folder, "events.parquet", "goods.parquet")


def microlens(header: bool, log: Log, folder: Path) -> Dataset:
    """Prepare pairs with milliseconds, and titles in one of two forms."""
    write(folder / "M_pairs.csv", [("user", "item", "timestamp"), *log.events], ",")
    titles = [(i, texts[0]) for i, texts in log.items.items()]
    if header:
        with (folder / "M_titles.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("item", "title"), *titles])
    else:
        write(folder / "M_title_en.csv", titles, ",")
    return from_files(folder, "M_pairs.csv")


def titled(texts: Texts) -> str:
    """Put the year behind the title, as MovieLens does."""
    return f"{texts[0]} ({texts[1]})" if texts[1] else texts[0]


FORMS: dict[str, tuple[Prepared, st.SearchStrategy[Log]]] = {
    "polars": (partial(frames, pl.DataFrame), logs(unit=1)),
    "pandas": (partial(frames, in_pandas), logs(unit=1)),
    "pyarrow": (partial(frames, pa.table), logs(unit=1)),
    "comma": (separated, logs(unit=1)),
    "all quoted": (partial(separated, quote_all=True), ANY),
    "semicolon": (partial(separated, separator=";"), ANY),
    "bar": (partial(separated, separator="|"), ANY),
    "tab": (partial(separated, separator="\t", suffix="tsv"), NO_TABS),
    "gzip": (partial(separated, suffix="csv.gz"), ANY),
    "carriage returns": (partial(separated, ends="\r\n"), ANY),
    "utf-16": (partial(separated, encoding="utf-16"), ANY),
    "recbole": (recbole, PLAIN),
    "amazon-2014": (partial(amazon, 2014, repr), AMAZON()),
    "amazon-2018": (partial(amazon, 2018, json.dumps), AMAZON()),
    "amazon-2023": (partial(amazon, 2023, json.dumps), AMAZON(unit=1)),
    "amazon-2023-csv": (amazon_csv, AMAZON(unit=1)),
    "unisrec": (unisrec, sequences(IDS, IDS, 3)),
    "minionerec": (minionerec, sequences(NUMBERS.map("A{}".format), NUMBERS, 2)),
    "movielens-100k": (movielens_100k, FILMS),
    "movielens-1m": (movielens_1m, FILMS),
    "movielens-latest": (movielens_latest, FILMS),
    "lc-rec": (lc_rec, LISTED),
    "recformer": (recformer, THREE_EVENTS),
    "sequences": (sequence_text, SEQUENCES),
    "p5": (p5, NAMED),
    "jsonl": (json_lines, logs(unit=1)),
    "steam": (steam, STEAM),
    "goodreads": (goodreads, GOODREADS),
    "mind": (mind, MIND),
    "yambda flat": (partial(yambda, False), YAMBDA),
    "yambda sequential": (partial(yambda, True), YAMBDA),
    "microlens": (partial(microlens, True), MICROLENS),
    "microlens cut": (partial(microlens, False), MICROLENS),
}


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.data())
def test_a_log_is_the_same_data_set_in_every_format(form: str, data: st.DataObject) -> None:
    prepared, strategy = FORMS[form]
    check(prepared, data.draw(strategy))


@pytest.mark.parametrize("form", ["comma", "tab", "recbole"])
def test_a_first_row_of_white_space_is_a_row(form: str) -> None:
    check(FORMS[form][0], Log([(" ", " ", 1000), ("u", "i", 0)], {" ": ("",) * 3, "i": ("",) * 3}))


def test_milliseconds_are_the_same_seconds_as_fractions() -> None:
    check(FORMS["amazon-2023"][0], Log([("u", "i", 288)], {"i": ("", "", "")}))


def check(prepared: Prepared, log: Log) -> None:
    """Compare what a format gives with what Parquet gives."""
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        expected, found = parquet(log, Path(first)), prepared(log, Path(second))
        assert found.texts() == expected.texts()
        assert found.fingerprint == expected.fingerprint
