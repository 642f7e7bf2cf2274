"""MovieLens 100K, 1M and latest."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import polars as pl
import pyarrow as pa
import pyarrow.csv as pa_csv

from l2rec.data.formats.columns import Columns
from l2rec.data.formats.files import (
    File,
    Where,
    beside,
    line_blocks,
    line_in_block,
    needed_file,
    reading,
)
from l2rec.data.formats.source import (
    CatalogReader,
    Context,
    OpenCatalog,
    Reader,
    Source,
    as_source,
    catalog_batch,
    event_batch,
)
from l2rec.data.formats.tables import Table, named_table, read_header, table_events
from l2rec.errors import DataError

GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime"),
    *("Documentary", "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery"),
    *("Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
MOVIE_FIELDS = ("movie_title", "release_year", "class")  # as RecBole's copy names them
MORE_MOVIE_FIELDS = ("title", "clean_title")


def detect(path: Path, files: dict[str, File], items: File | None, context: Context) -> str | None:
    """Tell by the names of the files, and of the columns where the name is a common one."""
    for name, kind in (("u.data", "movielens-100k"), ("ratings.dat", "movielens-1m")):
        if name in files:
            return kind
    if "ratings.csv" in files and "userId" in read_header(files["ratings.csv"], ",", "utf-8"):
        return "movielens-latest"
    return None


def movielens(
    path: Path,
    files: dict[str, File],
    items: File | None,
    kind: str,
    context: Context,
    open_catalog: OpenCatalog,
) -> Source:
    """Open one of the three layouts, by its name; a catalog that is given replaces the films."""
    files = beside(path, files)
    names = ["user_id", "item_id", "rating", "timestamp"]
    columns = Columns()
    if kind == "movielens-100k":
        ratings, movies = needed_file(path, files, "u.data"), needed_file(path, files, "u.item")
        table = Table(ratings, names, "\t", quotes=False, has_header=False)
        events = table_events([table], columns, context)
        flags = ["item_id", "title", "date", "video", "url", *GENRES]
        films = Table(movies, flags, "|", quotes=False, has_header=False, encoding="latin-1")
        parts = _film_batches_100k(films, context)
    elif kind == "movielens-1m":
        ratings, movies = (
            needed_file(path, files, "ratings.dat"),
            needed_file(path, files, "movies.dat"),
        )
        events = _double_colon_events(ratings, names, context)
        parts = _film_batches_1m(movies, context)
    else:
        ratings, movies = (
            needed_file(path, files, "ratings.csv"),
            needed_file(path, files, "movies.csv"),
        )
        table = named_table(ratings, context)
        columns = Columns(user="userId", item="movieId")
        events = table_events([table], columns, context)
        films = named_table(movies, context)
        for name in ("movieId", "title", "genres"):
            films.need(name, "items")
        parts = _film_batches_latest(films, context)
    if items is not None:
        return as_source(kind, [ratings, items], events, open_catalog(items, context))
    catalog = CatalogReader(_films(parts), MOVIE_FIELDS, MORE_MOVIE_FIELDS, {"class": " "})
    return as_source(kind, [ratings, movies], events, catalog)


Films = Callable[[], Iterator[tuple[pl.Series, pl.Series, pl.Series, Where]]]  # id, title, genres


def _film_batches_100k(films: Table, context: Context) -> Films:
    def read() -> Iterator[tuple[pl.Series, pl.Series, pl.Series, Where]]:
        for batch in films.batches(["item_id", "title", *GENRES], context.block_bytes):
            frame = cast(pl.DataFrame, pl.from_arrow(batch))
            named = [pl.when(pl.col(g) == "1").then(pl.lit(g)) for g in GENRES]
            genres = frame.select(pl.concat_str(named, separator=" ", ignore_nulls=True))
            yield frame["item_id"], frame["title"], genres.to_series(), films.where

    return read


def _film_batches_latest(films: Table, context: Context) -> Films:
    def read() -> Iterator[tuple[pl.Series, pl.Series, pl.Series, Where]]:
        for batch in films.batches(["movieId", "title", "genres"], context.block_bytes):
            frame = cast(pl.DataFrame, pl.from_arrow(batch))
            genres = frame["genres"].str.replace_all("(no genres listed)", "", literal=True)
            genres = genres.str.replace_all("|", " ", literal=True)
            yield frame["movieId"], frame["title"], genres, films.where

    return read


def _film_batches_1m(file: File, context: Context) -> Films:
    def read() -> Iterator[tuple[pl.Series, pl.Series, pl.Series, Where]]:
        with reading(file, "latin-1"):
            for batch, where in _double_colon(file, ["id", "title", "genres"], context):
                frame = cast(pl.DataFrame, pl.from_arrow(batch))
                genres = frame["genres"].str.replace_all("|", " ", literal=True)
                yield frame["id"], frame["title"], genres, where

    return read


def _films(parts: Films) -> Callable[[Sequence[str]], Iterator[pa.RecordBatch]]:
    """Split "Godfather, The (1972)" into title and year; offer "The Godfather" too."""

    def catalog(fields: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for ids, titles, genres, where in parts():
            frame = pl.DataFrame({"title": titles, "class": genres}).with_columns(
                movie_title=pl.col("title").str.replace(r"\s*\(\d{4}\)\s*$", "").str.strip_chars(),
                release_year=pl.col("title").str.extract(r"\((\d{4})\)\s*$").fill_null(""),
            )
            clean = pl.col("movie_title").str.replace(
                r"^(.*), (The|A|An|Le|La|Les|L'|Il|El|Der|Die|Das)$", "$2 $1"
            )
            frame = frame.with_columns(clean_title=clean.str.replace("^L' ", "L'"))
            yield catalog_batch(ids, {name: frame[name] for name in fields}, where)

    return catalog


def _double_colon(
    file: File, names: list[str], context: Context
) -> Iterator[tuple[pa.RecordBatch, Where]]:
    """Read lines of MovieLens 1M, which separates by two characters where Arrow wants one."""
    for block, first in line_blocks(file, context.block_bytes):
        lines = block.count(b"\n") + (not block.endswith(b"\n"))
        plain = block.replace(b"::", b"\x1f").decode("latin-1").encode()
        try:
            table = pa_csv.read_csv(
                io.BytesIO(plain),
                read_options=pa_csv.ReadOptions(column_names=names, block_size=len(plain) + 1),
                parse_options=pa_csv.ParseOptions(delimiter="\x1f", quote_char=False),
                convert_options=pa_csv.ConvertOptions(
                    column_types={name: pa.string() for name in names}
                ),
            )
        except pa.ArrowInvalid as error:
            reason = str(error).splitlines()[0]
            raise DataError(
                f"{file}, lines {first}-{first + lines - 1}: {reason}; expected {'::'.join(names)}"
            ) from error
        where = line_in_block(file, block, first)
        for batch in table.combine_chunks().to_batches():
            yield batch, where


def _double_colon_events(
    file: File, names: list[str], context: Context
) -> Callable[[], Iterator[pa.RecordBatch]]:
    def events() -> Iterator[pa.RecordBatch]:
        with reading(file):
            for batch, where in _double_colon(file, names, context):
                yield event_batch(
                    batch["user_id"], batch["item_id"], batch["timestamp"], None, where
                )

    return events


READER = Reader(
    {
        "movielens-100k": "u.data and u.item, a folder or the zip (MovieLens)",
        "movielens-1m": "ratings.dat and movies.dat, USER::ITEM::RATING::TIME (MovieLens)",
        "movielens-latest": "ratings.csv with userId, movieId and movies.csv (MovieLens)",
    },
    detect,
    movielens,
)
