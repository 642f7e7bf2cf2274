"""The command line: ``l2rec <verb> ...``. Heavy imports happen inside the verbs."""

from __future__ import annotations

__all__ = ["app", "main"]

import contextlib
import dataclasses
import gc
import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from l2rec._version import __version__
from l2rec.data.formats.columns import Columns
from l2rec.errors import L2RecError

if TYPE_CHECKING:
    from l2rec.data.dataset import Dataset

app = typer.Typer(
    name="l2rec",
    help="Turn a frozen language model into a personalised recommender (L2Rec, SIGIR '26).",
    epilog="Start with: l2rec demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Run = Annotated[
    Path, typer.Argument(help="Run folder written by `l2rec train`.", show_default=False)
]

CACHE = Path("~/.cache/l2rec")
"""Where named sources are downloaded to."""
COLUMN_OPTIONS = tuple(field.name for field in dataclasses.fields(Columns))
"""Options of `prepare` that name columns: a log of newer events has those of the first one."""
SplitKind = Annotated[
    str | None,
    typer.Option(
        "--split", help="leave-one-out, tied-day, time or given; by default as the data came."
    ),
]
ValidFrom = Annotated[
    str | None,
    typer.Option(help="With time: first moment of validation, a date or a share of the events."),
]
TestFrom = Annotated[
    str | None,
    typer.Option(help="With time: first moment of test. By default, the shares are 0.8 and 0.9."),
]


def _split(kind: str | None, valid_from: str | None, test_from: str | None) -> list[str]:
    """Turn the options of the split into overrides of a recipe."""
    options = {"kind": kind, "valid_from": valid_from, "test_from": test_from}
    return [f"split.{name}={value}" for name, value in options.items() if value is not None]


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"l2rec {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", is_eager=True, callback=_say_version),
    ] = False,
) -> None:
    del debug, version  # read in `main` and above


class _Default:
    """Default of an option that another module holds, imported when it is needed."""

    def __init__(self, read: Callable[[], Any]) -> None:
        self._read = read

    def __call__(self) -> Any:
        return self._read()

    def __str__(self) -> str:  # in the help
        return str(self())


def _setting(option: str, help: str) -> Any:
    """Declare an option of `serve` that has its default in `Settings`."""

    def read() -> Any:
        from l2rec.service.settings import default_of

        return default_of(option)

    return typer.Option(default_factory=_Default(read), help=help)


def _preparation(option: str, help: str) -> Any:
    """Declare an option of `prepare` that has its default in `PrepareConfig`."""

    def read() -> Any:
        from l2rec.data.prepare import PrepareConfig

        return PrepareConfig.model_fields[option].default

    return typer.Option(default_factory=_Default(read), help=help)


def _event_types() -> str:
    from l2rec.service.events import POSITIVE

    return ",".join(POSITIVE)


def _next(*words: object) -> str:
    """Return the line that says what to do next, quoted for a shell."""
    return f"next: {shlex.join(str(word) for word in words)}"


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
    return _next("l2rec", "train", recipe, "--data", data, "--out", out, *others)


def _must_be_folder(out: Path) -> None:
    """Raise ConfigError for an ``--out`` that is a file where a folder is written."""
    from l2rec.errors import ConfigError

    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; give a folder")


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


def _print_formats(asked: bool) -> None:
    """Print the formats that `prepare` reads, one in a line, and end the program."""
    if not asked:
        return
    from l2rec.data.formats.open import FORMATS

    for name, looks in FORMATS.items():
        typer.echo(f"{name:<{max(map(len, FORMATS))}}  {looks}")
    raise typer.Exit


@app.command()
def prepare(
    source: Annotated[str, typer.Argument(help="File, folder, or a name such as movielens-100k.")],
    *,
    out: Annotated[Path, typer.Option(help="Data set folder to write.")],
    items: Annotated[Path | None, typer.Option(help="Catalog file, if it lies elsewhere.")] = None,
    format: Annotated[str | None, typer.Option(help="Instead of recognising the format.")] = None,
    text: Annotated[str | None, typer.Option(help='Item text, such as "{title}. {brand}".')] = None,
    k_core: Annotated[int, _preparation("k_core", "Fewest events of every user and item.")],
    min_history: Annotated[int, _preparation("min_history", "Fewest events of a user.")],
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
        _preparation(
            "duplicate_items", "Two items with one id: error, or first to keep the first."
        ),
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
        typer.Option(
            default_factory=_Default(_event_types), help="Types to read from an event log."
        ),
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
        _preparation("splits", "Splits that the log comes with: given (kept), or none."),
    ],
    ties: Annotated[
        str,
        _preparation("ties", "Order of a user's events with equal time: file, hash or item (id)."),
    ],
    ties_seed: Annotated[int, _preparation("ties_seed", "Seed of --ties hash.")],
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
            if keep_all_items is None:
                config = config.model_copy(update={"keep_all_items": True})
        elif after is not None:
            raise ConfigError(
                f"--after {after}: {source} is no event log; l2rec merge joins data sets"
            )
        path, items, template = _log_at(stack, source, items, events, cache, after)
        if template and not text:
            config = config.model_copy(update={"text": template})
        dataset = run_prepare(path, out, config, items=items, format=format)
    typer.echo(
        f"{out}: {dataset.n_users:,} users, {dataset.n_items:,} items, {dataset.n_events:,} "
        f"events, fingerprint {dataset.fingerprint}"
    )
    typer.echo(_next_of(out, dataset))


def _log_at(
    stack: contextlib.ExitStack,
    source: str,
    items: Path | None,
    events: str | None = None,
    cache: Path = CACHE,
    after: Path | None = None,
) -> tuple[Path, Path | None, str | None]:
    """Find a log: a path, a public source by its name, or an event log, which is exported until
    the stack ends, after what a data set has of it. Return it, its catalog, and the template of
    its texts.
    """
    import tempfile

    from l2rec.data.sources import locate
    from l2rec.service.events import is_event_log
    from l2rec.service.export import export_log

    if not is_event_log(source):
        path, template = locate(source, cache.expanduser())
        return path, items, template
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="l2rec-")))
    url = source if "://" in source else f"sqlite:///{source}"
    types = (events or _event_types()).split(",")
    return *export_log(url, folder, types=types, catalog=items, after=after), "{text}"


@app.command()
def describe(
    data: Annotated[Path, typer.Argument(help="Data set folder.")], as_json: Json = False
) -> None:
    """Print counts, density, history and text lengths, the order of events, the fingerprint."""
    from l2rec.console import print_table
    from l2rec.data.dataset import open_dataset

    dataset = open_dataset(data)
    facts = dataset.describe()
    if as_json:
        _print_json(facts)
    else:
        del facts["order"]  # below, in words
        print_table(str(data), facts)
        for line in dataset.order.lines():
            typer.echo(line)


@app.command()
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


@app.command()
def cold(
    data: Annotated[Path, typer.Argument(help="Prepared data set.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Data set folder to write.")],
    share: Annotated[float, typer.Option(help="Share of the items that are held out.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Seed of the items that are drawn.")] = 0,
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


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="Shipped recipe, YAML file, or method name.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, such as training.epochs=3")
    ] = None,
    data: Annotated[Path, typer.Option(help="Data set folder.")] = ...,  # type: ignore[assignment]
    out: Annotated[Path, typer.Option(help="Run folder to write.")] = ...,  # type: ignore[assignment]
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint.")
    ] = False,
    init: Annotated[
        Path | None, typer.Option(help="Start from this run (fine-tune after pre-training).")
    ] = None,
    split: SplitKind = None,
    valid_from: ValidFrom = None,
    test_from: TestFrom = None,
) -> None:
    """Train, stop early on validation NDCG@10, score on test, and write a run folder.

    Recipes shipped: see `l2rec recipes`. Any key of a recipe can be overridden.

    Splits: leave-one-out (each user's last event is tested), tied-day (the last events of one time,
    as a set), time (all users at the same two moments), given (as the data came); docs/ties.md says
    what each is.

    Example: `l2rec train l2rec-plus --data data/ml-100k --out runs/ml training.epochs=5`

    Several processes or machines train the same run together (docs/processes.md):
    `torchrun --nproc-per-node 8 -m l2rec train l2rec --data DATA --out RUN`
    """
    from l2rec.config import load_recipe
    from l2rec.console import Console
    from l2rec.runs.launch import joined
    from l2rec.runs.train import train_run

    config = load_recipe(recipe, [*(overrides or ()), *_split(split, valid_from, test_from)])
    with joined() as world, Console(quiet=not world.main) as console:
        report = train_run(
            config,
            data,
            out,
            progress=console,
            resume=resume,
            init=init,
            recipe=recipe,
            command=shlex.join(["l2rec", *sys.argv[1:]]),
        )
        if world.main:
            console.scores(report)
        console.line(f"report: {out}/report.html")
        console.line(_next("l2rec", "recommend", out, "--history", "ID,ID,ID"))


@app.command()
def update(
    run: Run,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value of its recipe: training.epochs=5")
    ] = None,
    *,
    events: Annotated[
        str, typer.Option(help="Log of newer events: any file that `l2rec prepare` reads.")
    ],
    out: Annotated[Path, typer.Option(help="Run folder to write.")],
    items: Annotated[
        Path | None, typer.Option(help="Catalog with the new items, if it lies elsewhere.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Data set folder, if it was moved.")] = None,
    grown: Annotated[
        Path | None, typer.Option(help="Folder for the data set with the newer events: OUT-data.")
    ] = None,
    drop_unknown_items: Annotated[
        bool, typer.Option("--drop-unknown-items", help="Drop events of items no catalog has.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint.")
    ] = False,
) -> None:
    """Bring a run up to date with newer events: items, users and counts, in a few epochs from its
    weights instead of a full training.

    The new run stands on the data set of RUN with the newer events added, which is written beside
    it, and is validated and tested on the newest events like any other. The log has the columns of
    the first one. A blended run is blended again.

    Example: `l2rec update runs/ml --events new.csv --items items.csv --out runs/ml-monday`
    """
    from l2rec.console import Console
    from l2rec.data.formats.open import open_source
    from l2rec.runs.folder import open_run_dataset
    from l2rec.runs.launch import joined
    from l2rec.studies.update import update_run

    options = open_run_dataset(run, data).meta.get("options") or {}
    named = {name: options[name] for name in COLUMN_OPTIONS if name in options}
    with contextlib.ExitStack() as stack:
        path, catalog, _ = _log_at(stack, events, items)
        newer = open_source(path, items=catalog, columns=Columns(**named))
        world = stack.enter_context(joined())
        console = stack.enter_context(Console(quiet=not world.main))
        report = update_run(
            run,
            newer,
            out,
            progress=console,
            data=data,
            grown=grown,
            overrides=overrides or (),
            drop_unknown_items=drop_unknown_items,
            resume=resume,
            command=shlex.join(["l2rec", *sys.argv[1:]]),
        )
        if world.main:
            console.scores(report)
        console.line(_next("l2rec", "deploy", out, "--to", "serving"))


@app.command()
def doctor(
    recipe: Annotated[str, typer.Argument(help="Shipped recipe, YAML file, or method name.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, such as training.batch_tokens=4096")
    ] = None,
    data: Annotated[Path, typer.Option(help="Data set folder.")] = ...,  # type: ignore[assignment]
    backbone: Annotated[
        list[str] | None,
        typer.Option(
            help="Instead of the recipe's: a folder (config.json is enough), a hub id, or one of "
            "Qwen3-0.6B, Qwen3-8B, Llama-2-7B, R1-Distill-Llama-8B, Baichuan2-7B. Repeatable."
        ),
    ] = None,
    gpu_memory: Annotated[float, typer.Option(help="GB of the card that it should fit.")] = 80.0,
    measure: Annotated[
        bool,
        typer.Option(help="Also take a few real steps, where the backbone's weights are here."),
    ] = True,
    as_json: Json = False,
) -> None:
    """Say what a training would take before it is begun: parameters, memory, disk, time, and the
    largest batch that fits.

    From shapes alone, without weights and in seconds: what is trained and what is frozen, the
    memory of the largest batch on a card (weights in bfloat16, in 8 and in 4 bits), the largest
    `training.batch_tokens` that fits, the run folder. And, where the weights are on this machine,
    from a few real steps in a process of their own: the time of an epoch and of a validation, and
    the peak memory, here.

    Example: `l2rec doctor l2rec --data data/ml-100k --backbone Qwen3-0.6B --backbone Llama-2-7B`
    """
    from l2rec.config import load_recipe
    from l2rec.console import Console, print_doctor
    from l2rec.studies.doctor.study import doctor as run_doctor

    config = load_recipe(recipe, overrides or ())
    with Console(quiet=as_json) as console:
        report = run_doctor(
            config,
            data,
            backbones=backbone or (),
            gpu_memory=gpu_memory,
            measure=measure,
            progress=console,
        )
    report = {"recipe": recipe, **report}
    if as_json:
        _print_json(report)
    else:
        print_doctor(report)


@app.command()
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
        _print_json(report)


@app.command()
def tune(
    recipe: Annotated[str, typer.Argument(help="Shipped recipe, YAML file, or method name.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, the same for all trials")
    ] = None,
    data: Annotated[Path, typer.Option(help="Data set folder.")] = ...,  # type: ignore[assignment]
    out: Annotated[Path, typer.Option(help="Folder of the search.")] = ...,  # type: ignore[assignment]
    trials: Annotated[int, typer.Option(help="Trials in all, earlier calls included.")] = 20,
    search: Annotated[
        list[str] | None,
        typer.Option(help="key=[low, high], [low, high, log] or {choose: [a, b]}; repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the options that are drawn.")] = 0,
    split: SplitKind = None,
    valid_from: ValidFrom = None,
    test_from: TestFrom = None,
    as_json: Json = False,
) -> None:
    """Search for the best options of a recipe on validation; the test split stays unread.

    Without `--search`: the learning rate, and the dropout where there is one. Call it again to
    continue a search that was killed, or to add trials. Needs `pip install 'l2rec[tune]'`.

    Example: `l2rec tune sasrec --data data/ml-100k --out runs/tuned --trials 10
    --search "training.lr=[1e-4, 1e-2, log]" --search "model.dim={choose: [64, 128]}"`
    """
    from dataclasses import asdict

    from l2rec.console import Console, print_trials
    from l2rec.studies.tune import tune as run_tune

    with Console(quiet=as_json) as console:
        result = run_tune(
            recipe,
            data,
            out,
            trials=trials,
            progress=console,
            overrides=[*(overrides or ()), *_split(split, valid_from, test_from)],
            search=search or (),
            seed=seed,
        )
    if as_json:
        _print_json({"trials": [asdict(t) for t in result.trials], "recipe": str(result.recipe)})
    else:
        print_trials(result.trials)
        typer.echo(_next("l2rec", "train", result.recipe, "--data", data, "--out", "RUN"))


@app.command()
def recipes() -> None:
    """List the shipped recipes."""
    from l2rec.config import recipe_names

    for name in recipe_names():
        typer.echo(name)


def _print_experiments(asked: bool) -> None:
    """Print the shipped experiments, one in a line, and end the program."""
    if not asked:
        return
    from l2rec.studies.experiment.definition import experiment_titles

    titles = experiment_titles()
    for name, title in titles.items():
        typer.echo(f"{name:<{max(map(len, titles))}}  {title}")
    raise typer.Exit


@app.command()
def experiment(
    name: Annotated[
        str, typer.Argument(help="Shipped experiment, or YAML file.", show_default=False)
    ],
    more: Annotated[
        list[str] | None,
        typer.Argument(help="key=value, the same for all rows; or further data sets."),
    ] = None,
    data: Annotated[list[Path], typer.Option(help="Data set folder; repeatable.")] = ...,  # type: ignore[assignment]
    out: Annotated[Path, typer.Option(help="Folder of the experiment.")] = ...,  # type: ignore[assignment]
    plan: Annotated[
        bool, typer.Option("--plan", help="Print the cells and what they take; run nothing.")
    ] = False,
    render: Annotated[
        bool, typer.Option("--render", help="Write the page of what is finished; run nothing.")
    ] = False,
    jobs: Annotated[int, typer.Option(help="Processes at once, which share the cores.")] = 1,
    hours: Annotated[
        float | None, typer.Option(help="Fit the grid into this time; says what is left out.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="The first so many seeds of each row alone.")
    ] = None,
    source: Annotated[
        Path | None, typer.Option(help="Data set that rows are pre-trained on, where they are.")
    ] = None,
    take: Annotated[
        Path | None, typer.Option(help="Folder of other runs; link those that are cells of this.")
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(help="Price of an hour of the machine, for a column of costs.")
    ] = None,
    as_json: Json = False,
    listed: Annotated[
        bool,
        typer.Option(
            "--list",
            help="List the shipped experiments.",
            is_eager=True,
            callback=_print_experiments,
        ),
    ] = False,
) -> None:
    """Run a table or figure of the papers: a grid of rows, data sets and seeds.

    Every cell is a run folder below OUT/cells, made by `l2rec train`. What is finished never runs
    again, and a grid that was stopped goes on with the same command; a cell that fails is named in
    the page, and tried again by the next call. The page, OUT/report.html and report.md, has
    every number with its command, the comparisons that were named before, and the paper's figures.
    docs/experiments.md says how to read it, and how to write one.

    Example: `l2rec experiment l2rec-table2 --data data/scientific --out runs/table2 --plan`
    """
    del listed  # printed by its callback
    from l2rec.console import Console, print_plan
    from l2rec.errors import ConfigError
    from l2rec.studies.experiment.definition import load_experiment
    from l2rec.studies.experiment.plan import fitted
    from l2rec.studies.experiment.plan import plan as make_plan
    from l2rec.studies.experiment.report import to_json, write_page
    from l2rec.studies.experiment.run import run as run_plan

    _must_be_folder(out)
    if price_per_hour is not None and price_per_hour < 0:
        raise ConfigError(f"--price-per-hour {price_per_hour:g}: a number from 0 on")
    planned = make_plan(
        load_experiment(name),
        [*data, *(Path(word) for word in more or () if "=" not in word)],
        out,
        source=source,
        overrides=[word for word in more or () if "=" in word],
        take=take,
        seeds=seeds,
    )
    if hours is not None and (plan or render):
        planned = fitted(planned, hours * 3600, jobs)
    if plan:
        if as_json:
            _print_json(planned.to_json())
        else:
            print_plan(planned)
        return
    with Console(quiet=as_json) as console:
        if not render:
            planned = run_plan(planned, progress=console, jobs=jobs, hours=hours)
        page, paths = write_page(planned, price_per_hour)
        for cell, why in page.unfinished:
            console.line(f"{cell}: {why}")
        console.line(f"report: {paths[1]}")
    if as_json:
        _print_json(to_json(planned))


@app.command()
def evaluate(
    run: Run,
    split: Annotated[str, typer.Option(help="valid or test.")] = "test",
    tied_day: Annotated[
        bool, typer.Option("--tied-day", help="By the tied-day protocol instead of leave-one-out.")
    ] = False,
    data: Annotated[Path | None, typer.Option(help="Data set folder, if it was moved.")] = None,
    as_json: Json = False,
) -> None:
    """Score a finished run again: full ranking, history masked and not.

    By the split that it was trained with. Where events of a user tie, a run that was trained
    leave-one-out can be scored by `--tied-day` too: all last events of one time, as a set
    (docs/ties.md).
    """
    from l2rec.console import Console, print_table
    from l2rec.runs.train import evaluate_run

    with Console(quiet=as_json) as console:
        scores = evaluate_run(run, split, console, data, tied_day=tied_day)
    if as_json:
        _print_json(scores)
    else:
        print_table(f"{run} on {split}", scores)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Finished run folders.", show_default=False)],
    data: Annotated[Path | None, typer.Option(help="Data set folder, if it was moved.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="Test every run against this one, not against the best.")
    ] = None,
    group: Annotated[bool, typer.Option(help="Seeds of one recipe are one row, mean ± sd.")] = True,
    tied_day: Annotated[
        bool, typer.Option("--tied-day", help="By the tied-day protocol instead of leave-one-out.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Also write the tables: FILE.md or FILE.csv")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare finished runs: test scores, paired tests, segments of users, costs.

    Segments: length of the history (1-5, 6-10, 11 and more events), and how often the target was
    trained on: in the top fifth of the catalog (head), less often (tail), or never (cold).

    Example: `l2rec compare runs/sasrec-0 runs/sasrec-1 runs/l2rec --out table.md`
    """
    from dataclasses import asdict

    from l2rec.console import print_comparison
    from l2rec.studies.compare import compare_runs
    from l2rec.studies.tables import write_comparison

    comparison = compare_runs(runs, data=data, against=against, group=group, tied_day=tied_day)
    if out is not None:
        write_comparison(comparison, out)
    if as_json:
        _print_json(asdict(comparison))
    else:
        print_comparison(comparison)


@app.command()
def diagnose(
    run: Run,
    by: Annotated[
        list[str] | None,
        typer.Option(
            help="Field of the catalog, column of --users, popularity (of items) or history (of "
            "users). Repeatable; popularity and history by default."
        ),
    ] = None,
    users: Annotated[
        Path | None,
        typer.Option(help="Attributes of users: CSV or Parquet with a column user_id."),
    ] = None,
    separator: Annotated[
        str | None,
        typer.Option(help='Text between the values of an item that has several, such as ", ".'),
    ] = None,
    k: Annotated[int, typer.Option("-k", "--k", help="Items of a list.")] = 10,
    data: Annotated[Path | None, typer.Option(help="Data set folder, if it was moved.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the report: FILE.json")] = None,
    as_json: Json = False,
) -> None:
    """Say whom and what a run serves: exposure, scores and calibration by groups.

    What is recommended on test, beside what was trained on and what was chosen next: groups of
    items that get more places than people gave them, groups of users who are served worse, and how
    far popular items crowd out the rest. docs/ethics.md says how to read it.

    Example: `l2rec diagnose runs/ml --by class --separator " " --by gender --users users.csv`
    """
    from l2rec.console import Console, print_exposure
    from l2rec.disk import write_json
    from l2rec.studies.exposure import HISTORY, POPULARITY, exposure_of

    with Console(quiet=as_json) as console:
        report = exposure_of(
            run,
            by or [POPULARITY, HISTORY],
            progress=console,
            users=users,
            separator=separator,
            k=k,
            data=data,
        )
        if out is not None:
            write_json(out, report)
    if as_json:
        _print_json(report)
    else:
        print_exposure(report)


@app.command()
def publish(
    run: Run,
    out: Annotated[Path | None, typer.Option(help="Folder to write.")] = None,
    to: Annotated[
        str | None, typer.Option(help="Repository of the Hugging Face hub: org/name")
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="Licence of what was trained, such as apache-2.0.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public, not private.")
    ] = False,
    dataset: Annotated[str | None, typer.Option(help="Hub id of the data set.")] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Hub id of a backbone that was read from a folder.")
    ] = None,
    limits: Annotated[str, typer.Option(help="What the model is not for: a text.")] = "",
) -> None:
    """Publish a finished run: as a folder, or on the Hugging Face hub, with a model card.

    What was trained, the item texts and the scores; no events, no user ids, no paths, no weights of
    the backbone. `l2rec.load("org/name")` in Python brings it back. docs/hub.md says more.

    Example: `l2rec publish runs/ml --out published --license apache-2.0`
    """
    from l2rec.errors import ConfigError
    from l2rec.runs.hub import push_to_hub, save_pretrained

    if (out is None) == (to is None):
        raise ConfigError("give either --out FOLDER or --to org/name")
    if out is not None:
        save_pretrained(
            run, out, license=license, dataset=dataset, backbone=backbone, limits=limits
        )
        typer.echo(f"{out}: read {out / 'README.md'}")
        return
    if license is None:
        raise ConfigError("--to needs --license: what others may do with it, such as apache-2.0")
    address = push_to_hub(
        run,
        str(to),
        license=license,
        private=not public,
        dataset=dataset,
        backbone=backbone,
        limits=limits,
    )
    typer.echo(address)


@app.command()
def fusion(
    run: Run,
    alpha: Annotated[str, typer.Option(help="Weights of the second side, between commas.")] = (
        "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1"
    ),
    dominant: Annotated[
        str | None, typer.Option(help="text, id or both, instead of the run's option.")
    ] = None,
    split: Annotated[str, typer.Option(help="valid or test.")] = "valid",
    data: Annotated[Path | None, typer.Option(help="Data set folder, if it was moved.")] = None,
    as_json: Json = False,
) -> None:
    """Score a trained HDRec at other fusion weights, reading every history once (its Fig. 6).

    Choose the weight on `valid`. `--dominant` also scores the variants of its Fig. 5.

    Example: `l2rec fusion runs/hdrec --alpha 0,0.5,1`
    """
    from l2rec.console import Console, print_rows
    from l2rec.errors import ConfigError
    from l2rec.studies.fusion_sweep import fusion_sweep

    try:
        alphas = [float(number) for number in alpha.split(",")]
    except ValueError:
        raise ConfigError(f"--alpha {alpha}: numbers between commas, such as 0,0.5,1") from None
    with Console(quiet=as_json) as console:
        scores_of = fusion_sweep(
            run, alphas, dominant=dominant, split_name=split, progress=console, data=data
        )
    if as_json:
        _print_json({str(weight): scores for weight, scores in scores_of.items()})
    else:
        print_rows(f"{run} on {split}", "alpha", scores_of)


@app.command()
def blend(
    run: Run,
    out: Annotated[Path, typer.Option(help="Run folder to write.")],
    data: Annotated[Path | None, typer.Option(help="Data set folder, if it was moved.")] = None,
) -> None:
    """Write a run whose scores have co-occurrence counts and a repeat term beside them.

    The counts say how often an item stood near the newest items of the history (for a method that
    reads texts, also near items with similar texts); the repeat term is for items of the history.
    The weights of both are chosen on validation. Nothing is trained, and any method will do.

    Example: `l2rec blend runs/sasrec --out runs/sasrec-blend`
    """
    from l2rec.console import Console
    from l2rec.studies.blend import blend_run

    with Console() as console:
        report = blend_run(
            run,
            out,
            progress=console,
            data=data,
            command=shlex.join(["l2rec", *sys.argv[1:]]),
        )
        console.scores(report)
        console.line(_next("l2rec", "compare", run, out))


@app.command()
def average(
    runs: Annotated[list[Path], typer.Argument(help="Finished run folders.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    data: Annotated[Path | None, typer.Option(help="Data set folder, if it was moved.")] = None,
) -> None:
    """Score the mean of several runs' scores: what two seeds are worth together.

    The control for whatever joins two models: it has to beat two seeds of one of them, averaged.
    The folder holds `report.json` and `ranks.parquet`, and no model.

    Example: `l2rec average runs/sasrec-1 runs/sasrec-2 --out runs/sasrec-averaged`
    """
    from l2rec.console import Console
    from l2rec.studies.average import average_runs

    with Console() as console:
        report = average_runs(
            runs,
            out,
            progress=console,
            data=data,
            command=shlex.join(["l2rec", *sys.argv[1:]]),
        )
        console.scores(report)


@app.command()
def alignment(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Finished runs of L2Rec: of both views, and pairs of one each."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the report.")],
    users: Annotated[int, typer.Option(help="Test users to measure, 5,000 at most.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the users that are drawn.")] = 0,
    data: Annotated[Path | None, typer.Option(help="Data set folder, if it was moved.")] = None,
    as_json: Json = False,
) -> None:
    """Measure how far apart the outputs of L2Rec's two views are, by layer: the paper's premise.

    In one backbone (runs of both views), in two (a run of the semantic view alone with one of the
    behavioural), and untrained: linear CKA, cosine, MMD, alignment, uniformity and effective rank;
    and what two backbones take in memory and time. `l2rec experiment two-backbones` trains the
    runs, and says which score better.

    Example: `l2rec alignment runs/both runs/semantic runs/behavioural --out runs/alignment`
    """
    from l2rec.console import Console, print_alignment
    from l2rec.studies.alignment.study import measure_alignment

    _must_be_folder(out)
    with Console(quiet=as_json) as console:
        report = measure_alignment(
            runs,
            out,
            users=users,
            seed=seed,
            data=data,
            progress=console,
            command=shlex.join(["l2rec", *sys.argv[1:]]),
        )
    if as_json:
        _print_json(report)
    else:
        print_alignment(report)
        typer.echo(f"report: {out}/report.html")


@app.command()
def recommend(
    run: Run,
    history: Annotated[str | None, typer.Option(help="Item ids, oldest first: A,B,C")] = None,
    item: Annotated[
        list[str] | None,
        typer.Option(
            help="Item id of the history, as it is, even with commas. Repeatable, oldest first; "
            "after those of --history."
        ),
    ] = None,
    user: Annotated[str | None, typer.Option(help="Id of a user of the data set.")] = None,
    k: Annotated[
        int | None,
        typer.Option("-k", "--k", help="How many items; 10, or all of a smaller catalog."),
    ] = None,
    include_seen: Annotated[
        bool, typer.Option(help="Also recommend items of the history.")
    ] = False,
    new_item: Annotated[
        list[str] | None,
        typer.Option(help='Item to add by its text: "ID=its text". Repeatable.'),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Data set folder, for --user.")] = None,
    as_json: Json = False,
) -> None:
    """Rank the next items for a history, or for a user of the data set.

    Users and items need not be known from training: `--new-item "N1=Cordless drill, 18 V"` enters
    the ranking by its text, and may be part of the history.
    """
    from l2rec.console import print_new_items, print_recommendations
    from l2rec.errors import DataError
    from l2rec.runs.folder import user_history
    from l2rec.runs.predictor import load

    gc.disable()  # as in `serve`; this process is short
    if (history is None and not item) == (user is None):
        raise DataError(
            "give either --history ID,ID,... or --user ID; an id with a comma is given by --item ID"
        )
    added = {}
    for entry in new_item or ():
        name, sep, text = entry.partition("=")
        if not sep or not name.strip():
            raise DataError(f'--new-item {entry!r}: write "ID=its text"')
        if name.strip() in added:
            raise DataError(f"--new-item names {name.strip()!r} twice")
        added[name.strip()] = text.strip()
    if user is not None:
        ids = user_history(run, user, data)
    else:
        between_commas = (history or "").split(",")
        ids = [*(part.strip() for part in between_commas if part.strip()), *(item or ())]
    predictor = load(run)
    if added:
        predictor.add_items(added)
    if history is not None and not set(ids) <= set(predictor.ids):
        whole = next((i for i in predictor.ids if "," in i and i in history), None)
        if whole is not None:
            raise DataError(
                f"--history {history!r} is read as {len(ids)} ids between commas; give ids with a "
                f"comma by --item, one at a time: {shlex.join(['--item', whole])}"
            )
    if k is None:
        k = min(10, len(predictor.ids))
    result = predictor.recommend(ids, k, exclude_seen=not include_seen)
    if as_json:
        _print_json({"items": result.items, "gate": result.gate, "version": predictor.version})
    else:
        texts = [(i, predictor.text_of(i)) for i in ids]
        print_recommendations(texts, result)
        if unseen := set(added) - set(ids) - {listed["id"] for listed in result.items}:
            ranking = predictor.recommend(ids, predictor.n_items, exclude_seen=not include_seen)
            print_new_items([listed["id"] for listed in ranking.items], sorted(unseen))


@app.command()
def embed(
    run: Run,
    out: Annotated[Path, typer.Option(help="Folder for items.parquet and users.parquet.")],
    users: Annotated[bool, typer.Option(help="Also write vectors of the data set's users.")] = True,
    data: Annotated[Path | None, typer.Option(help="Data set folder, if it was moved.")] = None,
    precision: Annotated[
        str, typer.Option(help="Of the vectors: float32, int8, or binary (their signs).")
    ] = "float32",
    histories: Annotated[
        Path | None,
        typer.Option(
            help="Instead of the data set's users: Parquet (a file or a folder) with user_id and "
            "history, a list of item ids, oldest first."
        ),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="Instead of the run's items: Parquet with item_id and text."),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(help="Who encodes shards: local (this process), or ray (a cluster's)."),
    ] = "local",
    shard_rows: Annotated[
        int | None,
        typer.Option(
            help="Write shards of so many rows; 16,384 with --engine ray, --histories or --texts.",
            show_default=False,
        ),
    ] = None,
    cpus: Annotated[
        int | None,
        typer.Option(
            help="With ray, on nodes without cards: cores of a process, each with its own model; "
            "by default 1.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write item vectors and user vectors as Parquet: id, vector, version.

    Scores are their inner products. A run of `l2rec blend` adds more to them, which `l2rec
    recommend` and `l2rec serve` do.

    With int8 or binary, prints what vectors of each precision lose on the test users (items of
    float32's best ten, NDCG@10) beside what they save.

    More rows than memory or one machine is good for go into shards: OUT/users/shard-00000.parquet
    and so on, and a manifest. A command that was killed computes the missing ones when it is given
    again. `--engine ray` deals shards out to the cluster that RAY_ADDRESS names or `ray start`
    began (`pip install 'l2rec[ray]'`); run, data set and OUT are on a disk that all its machines
    see. docs/cluster.md has more.

    Example: `l2rec embed runs/ml --out vectors --precision int8`, or
    `l2rec embed runs/ml --out vectors --histories tonight/ --engine ray`
    """
    from l2rec.console import Console, print_losses
    from l2rec.errors import ConfigError
    from l2rec.runs.embed import Sharding, embed_run

    _must_be_folder(out)
    if cpus is not None and engine != "ray":
        raise ConfigError(f"--cpus {cpus} is for --engine ray")
    given = {"rows": shard_rows, "cpus": cpus}
    sharding = Sharding(
        engine, **{name: value for name, value in given.items() if value is not None}
    )
    shards = engine != "local" or shard_rows is not None
    with Console() as console:
        written = embed_run(
            run,
            out,
            console,
            with_users=users,
            data=data,
            precision=precision,
            histories=histories,
            texts=texts,
            sharding=sharding if shards else None,
        )
        for path, count, dim in written.files:
            console.line(f"{path}: {count:,} vectors of {dim} numbers, {precision}")
    if written.losses:
        print_losses(written.losses)


@app.command()
def onnx(
    run: Run,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    data: Annotated[Path | None, typer.Option(help="Data set folder, if it was moved.")] = None,
) -> None:
    """Write the user encoder of a run as an ONNX graph, with the item vectors it is scored with.

    For methods that read ids and stored item vectors; scores are inner products. The graph is
    compared with the model before it is kept. Needs `pip install 'l2rec[onnx]'`; docs/serving.md
    describes the files.

    Example: `l2rec onnx runs/sasrec --out exported`
    """
    from l2rec.console import Console
    from l2rec.runs.onnx import COMPARED, GRAPH, onnx_run

    _must_be_folder(out)
    with Console() as console:
        export = onnx_run(run, out, data)
        facts = export.manifest
        console.line(
            f"{out / GRAPH}: {facts['method']}, {facts['items']:,} items, up to "
            f"{facts['max_items']} of a history, vectors of {facts['dim']} numbers"
        )
        if export.difference is None:
            console.line("not compared with the model: onnxruntime is not installed")
        else:
            apart = f"at most {export.difference:.1g} apart"
            console.line(f"compared with the model on up to {COMPARED} users: {apart}")


@app.command()
def index(
    vectors: Annotated[Path, typer.Argument(help="items.parquet of `l2rec embed`.")],
    out: Annotated[Path, typer.Option(help="Index folder to write.")],
    kind: Annotated[
        str, typer.Option(help="auto (by size), exact, flat, hnsw, ivf, int8, binary, milvus.")
    ] = "auto",
    queries: Annotated[
        Path | None, typer.Option(help="users.parquet of the queries; by default the items.")
    ] = None,
    k: Annotated[
        int, typer.Option("-k", "--k", help="Items of an answer, for the recall that is printed.")
    ] = 10,
    uri: Annotated[
        str | None, typer.Option(help="Address of Milvus: a server, or a file ending in .db.")
    ] = None,
    alias: Annotated[
        str | None,
        typer.Option(help="With milvus: name of the collection for other programs; see below."),
    ] = None,
    partition_by: Annotated[
        str | None,
        typer.Option(help="With milvus: field of the items that searches can be confined to."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Data set folder whose catalog has that field.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Build an index of item vectors, and print its recall against exact search.

    The vectors are checked first: they must be exactly those that `l2rec embed` wrote.

    With milvus, a new version is built as a collection beside the one before. When it is complete
    and finds what it should, `--alias` is moved to it in one step, and the collection before is
    deleted: programs that search by the alias meet the old rows or the new ones. `--partition-by`
    makes a field the partition key: a search for some of its values reads only where they lie.

    Example: `l2rec index vectors/items.parquet --out vectors/index --queries vectors/users.parquet`
    or `l2rec index v/items.parquet --out v/index --kind milvus --uri http://host:19530 --alias shop
    --partition-by brand --data data/shop`
    """
    from l2rec.console import print_table
    from l2rec.index import build_folder

    facts = build_folder(
        vectors,
        out,
        kind=kind,
        queries=queries,
        k=k,
        uri=uri,
        alias=alias,
        partition_by=partition_by,
        data=data,
    )
    if as_json:
        _print_json(facts)
    else:
        print_table(str(out), facts)


@app.command()
def abtest(
    log: Annotated[
        str | None,
        typer.Argument(help="Event log (file or URL), or a Parquet table.", show_default=False),
    ] = None,
    experiment: Annotated[
        str | None, typer.Option(help="Experiment to analyse, if the log has several.")
    ] = None,
    treatment: Annotated[
        float | None,
        typer.Option(
            help="Planned share of the treatment, where the log does not know it.",
            show_default=False,
        ),
    ] = None,
    alpha: Annotated[float, typer.Option(help="Level of tests and intervals.")] = 0.05,
    power: Annotated[float, typer.Option(help="Power of the detectable lift.")] = 0.8,
    pre_days: Annotated[float, typer.Option(help="Days before the experiment, for CUPED.")] = 14.0,
    since: Annotated[
        str | None, typer.Option(help="Leave out earlier events: 2023-11-28, or seconds.")
    ] = None,
    simulate: Annotated[
        int | None, typer.Option(help="Simulate this many users instead of reading a log.")
    ] = None,
    lift: Annotated[float, typer.Option(help="Simulated lift of clicks.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the simulation.")] = 0,
    as_json: Json = False,
) -> None:
    """Compare the click and reply rates of both arms of an experiment.

    Lifts with intervals and p for one look, and others for as many looks as you like; CUPED, the
    ratio of sums, a check of the arms' sizes, and the smallest lift that could be detected. The log
    of `l2rec serve` knows the planned share. docs/abtest.md has every formula.

    Example: `l2rec abtest runs/ml/events.db`, or `l2rec abtest --simulate 100000 --lift 0.05`
    """
    from l2rec.console import print_experiment
    from l2rec.data.moments import moment
    from l2rec.errors import ConfigError, DataError
    from l2rec.studies.abtest.analysis import analyze, conclude

    if (log is None) == (simulate is None):
        raise ConfigError("give a log, or --simulate USERS")
    if simulate is not None:
        from l2rec.studies.abtest.simulate import simulate as simulated
        from l2rec.studies.arms import SHARE

        share = SHARE if treatment is None else treatment
        users = simulated(simulate, lift=lift, seed=seed, treatment=share)
        result = conclude(users, treatment=share, alpha=alpha, power=power)
        result = {"experiment": f"simulated, lift {lift:+.1%}, seed {seed}", **result}
    else:
        from dataclasses import asdict

        from l2rec.service.export import read_log
        from l2rec.studies.abtest.users import experiments

        events, plans = read_log(str(log))
        if experiment is None:
            names = experiments(events)
            if len(names) != 1:
                one = f"name one: {names[:5]}" if names else "serve with --experiment to have one"
                raise DataError(f"{log} has {len(names)} experiments; {one}")
            (experiment,) = names
        plan = plans.get(experiment)
        if plan is not None and treatment not in (None, plan.treatment):
            raise ConfigError(
                f"--treatment {treatment}: the log says that {experiment!r} was served with "
                f"{plan.treatment:g}; leave the option out"
            )
        result = analyze(
            events,
            experiment,
            treatment=treatment if plan is None else plan.treatment,
            alpha=alpha,
            power=power,
            pre_days=pre_days,
            since=None if since is None else moment(since),
        )
        result["served"] = [] if plan is None else [asdict(one) for one in plan.served]
    if as_json:
        _print_json(result)
    else:
        print_experiment(result)


@app.command()
def downstream(
    data: Annotated[Path, typer.Argument(help="Data set of exposures, clicks and replies.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, such as test_days=3 or dlrm.dim=32")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = ...,  # type: ignore[assignment]
    run: Annotated[
        Path | None, typer.Option(help="Run that computes the vectors, users anew each day.")
    ] = None,
    run_data: Annotated[
        Path | None, typer.Option(help="Data set of that run, if it was moved.")
    ] = None,
    vectors: Annotated[
        Path | None, typer.Option(help="Instead of a run: folder written by `l2rec embed`.")
    ] = None,
    until: Annotated[
        str | None, typer.Option(help="With --vectors: first day after their newest event.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Trainings of each arm and stage.")] = 3,
    as_json: Json = False,
) -> None:
    """Train a matching and a ranking stage (DLRM) with and without L2Rec vectors as features.

    Both arms are trained alike on the days after the newest event that the vectors know, and
    tested on the last days: AUC, GAUC and log loss of clicks and replies, Recall of held-out
    clicks. docs/downstream.md has every step from a log to this table.

    Example: `l2rec downstream data/feed --run runs/feed-clicks --out runs/feed-downstream`
    """
    from l2rec.console import Console, print_downstream
    from l2rec.data.moments import moment
    from l2rec.studies.downstream.options import downstream_config
    from l2rec.studies.downstream.study import run_downstream

    config = downstream_config(overrides or ())
    with Console(quiet=as_json) as console:
        report = run_downstream(
            data,
            out,
            progress=console,
            run=run,
            run_data=run_data,
            vectors=vectors,
            until=None if until is None else moment(until),
            seeds=seeds,
            config=config,
            command=shlex.join(["l2rec", *sys.argv[1:]]),
        )
    if as_json:
        _print_json(report)
    else:
        print_downstream(report)
        typer.echo(f"report: {out}/report.json")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the run.")] = Path("runs/demo"),
    data: Annotated[Path, typer.Option(help="Folder for the data set.")] = Path("data/ml-100k"),
    minutes: Annotated[float, typer.Option(help="Training time at most.")] = 4.0,
) -> None:
    """Show every step on MovieLens-100K in minutes: prepare, train, blend, score, recommend."""
    from l2rec.demo import run_demo

    run_demo(out, data, minutes)


@app.command()
def serve(
    target: Annotated[Path, typer.Argument(help="Run folder, or the folder of `l2rec deploy`.")],
    *,
    host: Annotated[str, _setting("host", "Address to listen on.")],
    port: Annotated[int, _setting("port", "Port to listen on; 0 for any that is free.")],
    log: Annotated[
        str | None,
        typer.Option(
            envvar="L2REC_LOG",
            show_envvar=True,
            help="Event log: sqlite:///FILE or postgresql+psycopg://... "
            "By default events.db in the folder.",
        ),
    ] = None,
    index: Annotated[
        str,
        _setting("index", "auto (the one in RUN/index, or by size), exact, flat, ivf or hnsw."),
    ],
    experiment: Annotated[
        str | None, typer.Option(help="Run an A/B experiment of this name.")
    ] = None,
    treatment_share: Annotated[
        float, _setting("treatment_share", "Share of users who get the live version.")
    ],
    salt: Annotated[str, _setting("salt", "Salt of the hash that assigns users to arms.")],
    control: Annotated[
        str | None,
        typer.Option(
            help="Run that serves the control arm, or popularity; without it both arms are served "
            "alike."
        ),
    ] = None,
    rate: Annotated[float, _setting("rate", "Tokens a minute of one key; 0: no limit.")],
    queue: Annotated[float, _setting("queue", "Seconds that a history may wait for the model.")],
    inflight: Annotated[int, _setting("inflight", "Requests that may be in progress.")],
    timeout: Annotated[float, _setting("timeout", "Seconds until a request is given up.")],
    cache: Annotated[int, _setting("cache", "User vectors in the cache; 0: no cache.")],
    batch_tokens: Annotated[int, _setting("batch_tokens", "Tokens that close a batch.")],
    slice_tokens: Annotated[
        int, _setting("slice_tokens", "Tokens that close a slice of embeddings and explanations.")
    ],
    batch_ms: Annotated[float, _setting("batch_ms", "Milliseconds that close a batch.")],
    shutdown: Annotated[
        int, _setting("shutdown", "Seconds that requests in progress have at the end.")
    ],
    threads: Annotated[int, typer.Option(help="Threads of the model; 0: one for each core.")] = 0,
    access_log: Annotated[bool, _setting("access_log", "One log line for each request.")],
    images: Annotated[
        list[str] | None,
        typer.Option(
            help="Host whose pictures the page shows: https://HOST, or https: for all. Can be "
            "given several times."
        ),
    ] = None,
) -> None:
    """Serve recommendations over HTTP until SIGTERM.

    Listens on this machine alone. To serve others, set keys in the environment, between commas:
    `L2REC_READ_KEYS` may recommend, `L2REC_WRITE_KEYS` may also change items and send events.
    A folder written by `l2rec deploy` is followed: a run deployed there is served at once.
    Needs `pip install 'l2rec[serve]'`; docs/serving.md describes the service.

    Example: `l2rec serve runs/ml --port 8000`
    """
    from l2rec.errors import ConfigError
    from l2rec.service.settings import settings_from_options

    settings = settings_from_options(  # before anything heavy is imported
        host=host,
        port=port,
        index=index,
        experiment=experiment,
        treatment_share=treatment_share,
        salt=salt,
        rate=rate,
        queue=queue,
        inflight=inflight,
        timeout=timeout,
        cache=cache,
        batch_tokens=batch_tokens,
        slice_tokens=slice_tokens,
        batch_ms=batch_ms,
        shutdown=shutdown,
        access_log=access_log,
        images=tuple(images or ()),
    )
    gc.disable()  # thousands of modules come: a fifth of the start would go into collections
    try:
        from l2rec.service.server import serve as run_server
    except ModuleNotFoundError as error:
        raise ConfigError(f"`l2rec serve` needs {error.name}: pip install 'l2rec[serve]'") from None
    if threads:
        import torch

        torch.set_num_threads(threads)
    run_server(target, settings, log_url=log, control=control, say=typer.echo)


@app.command()
def deploy(
    run: Run,
    to: Annotated[Path, typer.Option(help="Folder that `l2rec serve` follows.")],
    shadow: Annotated[
        bool, typer.Option("--shadow", help="Compare RUN on live traffic; it serves nobody.")
    ] = False,
    stop_shadow: Annotated[
        bool, typer.Option("--stop-shadow", help="Stop comparing RUN, which must be the shadow.")
    ] = False,
    allow_loss: Annotated[
        bool, typer.Option("--allow-loss", help="Also where RUN lacks items that are served now.")
    ] = False,
) -> None:
    """Check a run as a server would, then make it the one that the folder serves.

    Prints the items, users and events that are gained and lost against the run before it, and
    refuses a run that lacks items of that one.

    A server of the folder loads the run beside the live one, checks it again, and switches to it
    between two requests. `l2rec rollback` brings back the run that was served before.

    Example: `l2rec deploy runs/new --to serving`
    """
    from l2rec.service.live import deploy as run_deploy
    from l2rec.service.live import end_shadow

    if stop_shadow:
        deployment = end_shadow(run, to)
    else:
        deployment = run_deploy(run, to, shadow=shadow, allow_loss=allow_loss, say=typer.echo)
    typer.echo(f"{to}: current {deployment.current}, shadow {deployment.shadow or 'none'}")


@app.command()
def rollback(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder that `l2rec serve` follows.")
    ],
) -> None:
    """Serve again the run that was served before the last `l2rec deploy`.

    Example: `l2rec rollback serving`
    """
    from l2rec.service.live import rollback as run_rollback

    deployment = run_rollback(folder)
    more = len(deployment.previous)
    typer.echo(f"{folder}: current {deployment.current}, before it {more} more")


def main() -> None:
    """Run the command line. A deliberate error is one line on standard error and exit code 2."""
    # Set before torch is imported: threads that spin while they wait lose most of their speed as
    # soon as another process wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # What a scheduler or `kill` sends is an interruption as Ctrl-C is one. (`serve` has its own.)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
    arguments = sys.argv[1:]
    # People write it after the verb as well as before.
    debug = ["--debug"] if "--debug" in arguments else []
    try:
        app(debug + [argument for argument in arguments if argument != "--debug"])
    except (L2RecError, OSError) as error:
        if debug:
            raise
        sys.stderr.write(f"l2rec: {' '.join(str(error).split())}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write(_interrupted(arguments))
        sys.exit(130)
    except SystemExit as stop:
        if stop.code == 130:  # typer has caught the KeyboardInterrupt
            sys.stderr.write(_interrupted(arguments))
        raise


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _interrupted(arguments: list[str]) -> str:
    """Return what to say after Ctrl-C: how the verb goes on, if it does."""
    after = {
        "train": "; go on with the same command and --resume",
        "tune": "; go on with the same command",
        "experiment": "; go on with the same command",
        "prepare": "; what was at --out before is as it was",
        "embed": "; shards that are finished are kept: go on with the same command",
    }
    verb = next((argument for argument in arguments if not argument.startswith("-")), "")
    return f"l2rec: interrupted{after.get(verb, '')}\n"
