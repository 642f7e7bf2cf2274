"""Verbs of data sets: from a log to what a training reads."""

from __future__ import annotations

__all__ = ["COLUMN_OPTIONS", "cold", "describe", "floors", "log_at", "merge", "prepare"]

import contextlib
import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from l2rec.cli.options import Default, Json, SplitKind, TestFrom, ValidFrom, next_step, print_json
from l2rec.data.formats.columns import Columns

if TYPE_CHECKING:
    from l2rec.data.dataset import Dataset

CACHE = Path("~/.cache/l2rec")
"""Where named sources are downloaded to."""
COLUMN_OPTIONS = tuple(field.name for field in dataclasses.fields(Columns))
"""Options of `prepare` that name columns: a log of newer events has those of the first one."""


def preparation(option: str, help: str) -> Any:
    """Declare an option of `prepare` that has its default in `PrepareConfig`."""

    def read() -> Any:
        from l2rec.data.prepare import PrepareConfig

        return PrepareConfig.model_fields[option].default

    return typer.Option(default_factory=Default(read), help=help)


def event_types() -> str:
    from l2rec.service.events import POSITIVE

    return ",".join(POSITIVE)


def _next_of(data: Path, dataset: Dataset) -> str:
    """Return what to do next with a data set: train a recipe that it has enough for."""
    from l2rec.data.parts import MIN_EVENTS

    others = []
    if not dataset.users_tested:
        if not (dataset.sequences.lengths >= MIN_EVENTS).any():
            return (
                f"next: prepare a log with more events; a training needs users with {MIN_EVENTS} "
                f"or more, and here there are none"
            )
        others = ["--split", "leave-one-out"]  # since the log's own splits leave nobody
    textless = dataset.meta["counters"]["items_without_text"] == dataset.n_items
    recipe = "sasrec" if textless else "l2rec-plus"  # without texts, ids alone are learned from
    out = Path("runs") / data.name
    return next_step("l2rec", "train", recipe, "--data", data, "--out", out, *others)


def _print_formats(asked: bool) -> None:
    """Print the formats that `prepare` reads, one in a line, and end the program."""
    if not asked:
        return
    from l2rec.data.formats.open import FORMATS

    for name, looks in FORMATS.items():
        typer.echo(f"{name:<{max(map(len, FORMATS))}}  {looks}")
    raise typer.Exit


def prepare(
    source: Annotated[str, typer.Argument(help="File, folder, or a name such as movielens-100k.")],
    *,
    out: Annotated[Path, typer.Option(help="Data set folder to write.")],
    items: Annotated[Path | None, typer.Option(help="Catalog file, if it lies elsewhere.")] = None,
    format: Annotated[str | None, typer.Option(help="Instead of recognising the format.")] = None,
    text: Annotated[str | None, typer.Option(help='Item text, such as "{title}. {brand}".')] = None,
    k_core: Annotated[int, preparation("k_core", "Fewest events of every user and item.")],
    min_history: Annotated[int, preparation("min_history", "Fewest events of a user.")],
    max_history: Annotated[int | None, typer.Option(help="Newest events kept of a user.")] = None,
    drop_unknown_items: Annotated[
        bool | None, typer.Option(help="Drop events of items that the catalog does not have.")
    ] = None,
    drop_textless: Annotated[bool | None, typer.Option(help="Drop items without a text.")] = None,
    keep_all_items: Annotated[
        bool | None,
        typer.Option(help="Keep items without events; those of an event log are kept by default."),
    ] = None,
    duplicate_items: Annotated[
        str,
        preparation("duplicate_items", "Two items with one id: error, or first to keep the first."),
    ],
    user: Annotated[str, typer.Option(help="Column or key of the user.")] = Columns.user,
    item: Annotated[str, typer.Option(help="Column or key of the item.")] = Columns.item,
    timestamp: Annotated[
        str | None, typer.Option(help="Column of the time; none: the order of the file.")
    ] = Columns.timestamp,
    event_type: Annotated[
        str | None, typer.Option(help="Column of the event's type.")
    ] = Columns.event_type,
    events: Annotated[
        str,
        typer.Option(default_factory=Default(event_types), help="Types to read from an event log."),
    ],
    after: Annotated[
        Path | None,
        typer.Option(
            help="With an event log: data set whose events come before those of the log, and whose "
            "catalog is taken unless --items names one."
        ),
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Keep only events of these types: click,reply")
    ] = None,
    before: Annotated[
        str | None, typer.Option(help="Keep only earlier events: 2023-11-28, or a number.")
    ] = None,
    splits: Annotated[
        str,
        preparation("splits", "Splits that the log comes with: given (kept), or none."),
    ],
    ties: Annotated[
        str,
        preparation("ties", "Order of a user's events with equal time: file, hash or item (id)."),
    ],
    ties_seed: Annotated[int, preparation("ties_seed", "Seed of --ties hash.")],
    encoding: Annotated[str, typer.Option(help="Text encoding of the files.")] = Columns.encoding,
    quotes: Annotated[
        str,
        typer.Option(
            help="auto; none: they are text; backslash: those after a backslash are text (CSV)."
        ),
    ] = Columns.quotes,
    cache: Annotated[Path, typer.Option(help="Where named sources are downloaded to.")] = CACHE,
    formats: Annotated[
        bool,
        typer.Option(
            "--formats",
            help="List the formats and what each looks like.",
            is_eager=True,
            callback=_print_formats,
        ),
    ] = False,
) -> None:
    """Read interaction logs and item texts into a data set folder.

    Formats: RecBole atomic files, Amazon reviews (2014, 2018, 2023), MovieLens (100K, 1M, latest),
    MIND, MicroLens, Yambda, Steam, Goodreads, CSV, Parquet, JSON Lines, sequence text (S3-Rec, P5),
    JSON objects (LC-Rec, RecFormer) and splits of samples (UniSRec, MiniOneRec); `--formats` lists
    them; plain or gzip. Files larger than memory are fine. And the event log of `l2rec serve`, by
    file or URL, with the texts of `--items` and of the items put since: all of them, with events or
    without, so that no item is lost to the next model.

    Example: `l2rec prepare movielens-100k --out data/ml-100k`, or, for what was served since,
    `l2rec prepare runs/ml/events.db --after data/ml-100k --out data/served`
    """
    del formats  # printed by its callback
    from l2rec.config import from_options
    from l2rec.data.prepare import PrepareConfig
    from l2rec.data.prepare import prepare as run_prepare
    from l2rec.errors import ConfigError
    from l2rec.service.events import is_event_log

    options = {
        "k_core": k_core,
        "min_history": min_history,
        "max_history": max_history,
        "text": text,
        "drop_unknown_items": drop_unknown_items,
        "drop_textless": drop_textless,
        "keep_all_items": keep_all_items,
        "duplicate_items": duplicate_items,
        "user": user,
        "item": item,
        "timestamp": timestamp,
        "event_type": event_type,
        "only": None if only is None else [name.strip() for name in only.split(",")],
        "before": before,
        "splits": splits,
        "ties": ties,
        "ties_seed": ties_seed,
        "encoding": encoding,
        "quotes": quotes,
    }
    config = from_options(PrepareConfig, options)
    with contextlib.ExitStack() as stack:
        if is_event_log(source):
            if text:
                raise ConfigError(
                    f"--text {text!r}: items of an event log have the texts that they are served "
                    "with; leave it out, and change texts with PUT /v1/items"
                )
            if only and after is not None and not _all_have_types(after):
                raise ConfigError(
                    f"--only {only}: {after} has events without a type, which it would leave out; "
                    f"to choose among those of the event log, --events {only}"
                )
            if keep_all_items is None:
                config = config.model_copy(update={"keep_all_items": True})
        elif after is not None:
            raise ConfigError(
                f"--after {after}: {source} is no event log; l2rec merge joins data sets"
            )
        log = log_at(stack, source, items, events, cache, after)
        if log.template and not text:
            config = config.model_copy(update={"text": log.template})
        dataset = run_prepare(
            log.path, out, config, items=log.items, format=format, origin=log.origin
        )
    typer.echo(
        f"{out}: {dataset.n_users:,} users, {dataset.n_items:,} items, {dataset.n_events:,} "
        f"events, fingerprint {dataset.fingerprint}"
    )
    typer.echo(_next_of(out, dataset))


def _all_have_types(data: Path) -> bool:
    """Tell whether every event of a data set has a type."""
    from l2rec.data.dataset import open_dataset
    from l2rec.data.extend import EARLIER

    dataset = open_dataset(data)
    return dataset.event_types is not None and EARLIER not in dataset.event_type_names


class Log(NamedTuple):
    """A log to read. items: its catalog. template: of its texts. origin: what it is of, where
    ``path`` is only made of that.
    """

    path: Path
    items: Path | None
    template: str | None = None
    origin: str | None = None


def log_at(
    stack: contextlib.ExitStack,
    source: str,
    items: Path | None,
    events: str | None = None,
    cache: Path = CACHE,
    after: Path | None = None,
    per_second: float = 1.0,
) -> Log:
    """Find a log: a path, a public source by its name, or an event log, which is exported until
    the stack ends, after what a data set has of it, or in a unit of time of which ``per_second``
    are a second.
    """
    import tempfile

    from l2rec.data.dataset import open_dataset
    from l2rec.data.sources import locate
    from l2rec.service.events import is_event_log, shown
    from l2rec.service.export import export_log

    if not is_event_log(source):
        path, template = locate(source, cache.expanduser())
        return Log(path, items, template)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="l2rec-")))
    url = source if "://" in source else f"sqlite:///{source}"
    types = (events or event_types()).split(",")
    exported = export_log(
        url, folder, types=types, catalog=items, after=after, per_second=per_second
    )
    origin = f"event log {shown(url) if '://' in source else Path(source).name} ({','.join(types)})"
    if after is not None:
        base = open_dataset(after)
        origin += f" after {base.name} {base.fingerprint}"
    return Log(*exported, "{text}", origin)


def describe(
    data: Annotated[Path, typer.Argument(help="Data set folder.")], as_json: Json = False
) -> None:
    """Print counts, density, history and text lengths, the order of events, the fingerprint."""
    from l2rec.console import print_table
    from l2rec.data.dataset import open_dataset

    dataset = open_dataset(data)
    facts = dataset.describe()
    if as_json:
        print_json(facts)
    else:
        del facts["order"]  # below, in words
        print_table(str(data), facts)
        for line in dataset.order.lines():
            typer.echo(line)


def merge(
    parts: Annotated[list[Path], typer.Argument(help="Prepared data sets, two or more.")],
    out: Annotated[Path, typer.Option(help="Data set folder to write.")],
) -> None:
    """Join prepared data sets into one, to pre-train on several domains.

    Then: `l2rec train pretrain/l2rec --data MERGED --out PRE` and
    `l2rec train l2rec --data TARGET --out RUN --init PRE`
    """
    from l2rec.data.merge import merge as run_merge

    dataset = run_merge(parts, out)
    typer.echo(
        f"{out}: {dataset.n_users:,} users, {dataset.n_items:,} items, {dataset.n_events:,} "
        f"events, fingerprint {dataset.fingerprint}"
    )


def cold(
    data: Annotated[Path, typer.Argument(help="Prepared data set.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Data set folder to write.")],
    share: Annotated[float, typer.Option(help="Share of the items that are held out.")] = 0.2,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the items that are drawn.")] = 0,
) -> None:
    """Hold items out of training: a data set of which some items are known by their texts alone.

    Cold items are in no training event, no count and nobody's history. A model that was trained
    without them is given them, by their texts, when it is tested, and ranks all items; reports say
    the scores of cold and of warm targets apart. What takes no new items ranks them below all
    others.

    Example: `l2rec cold data/scientific --out data/scientific-cold` and
    `l2rec train l2rec-plus --data data/scientific-cold --out runs/cold`
    """
    from l2rec.data.cold import hold_out_items

    dataset = hold_out_items(data, out, share, seed)
    typer.echo(
        f"{out}: {dataset.n_users:,} users, {dataset.n_items:,} items, of which {dataset.n_cold:,} "
        f"are cold, {dataset.n_events:,} events, fingerprint {dataset.fingerprint}"
    )
    typer.echo(_next_of(out, dataset))


def floors(
    data: Annotated[Path, typer.Argument(help="Data set folder.", show_default=False)],
    split: SplitKind = None,
    valid_from: ValidFrom = None,
    test_from: TestFrom = None,
    backbone: Annotated[
        str, typer.Option(help="Language model that reads item texts, untrained; none: leave out.")
    ] = "minilm",
    out: Annotated[Path | None, typer.Option(help="Also write the scores: FILE.json")] = None,
    as_json: Json = False,
) -> None:
    """Score what needs no training: popularity, followers of the last item, co-occurrence, and the
    texts next to that of the last item. What a trained model has to beat, in seconds.

    Example: `l2rec floors data/ml-100k --split time`
    """
    from l2rec.config import SplitConfig, from_options
    from l2rec.console import Console
    from l2rec.disk import write_json
    from l2rec.studies.floors import score_floors

    options = {"kind": split, "valid_from": valid_from, "test_from": test_from}
    with Console(quiet=as_json) as console:
        report = score_floors(
            data,
            from_options(SplitConfig, options, kind="split"),
            backbone=backbone,
            progress=console,
            command=shlex.join(["l2rec", *sys.argv[1:]]),
        )
        if out is not None:
            write_json(out, report)
        if not as_json:
            console.line(report["protocol"])
            console.scores(report)
    if as_json:
        print_json(report)
