"""Verbs that use a finished run: recommendations, vectors, indexes, the service."""

from __future__ import annotations

__all__ = ["abtest", "deploy", "embed", "index", "onnx", "recommend", "rollback", "serve"]

import gc
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from l2rec.cli.options import Default, Json, Run, must_be_folder, print_json


def setting(option: str, help: str) -> Any:
    """Declare an option of `serve` that has its default in `Settings`."""

    def read() -> Any:
        from l2rec.service.settings import default_of

        return default_of(option)

    return typer.Option(default_factory=Default(read), help=help)


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
    everybody: Annotated[
        bool, typer.Option("--all", help="All users of the data set; needs --out.")
    ] = False,
    users: Annotated[
        Path | None,
        typer.Option(help="Users of the data set: CSV or Parquet with user_id; needs --out."),
    ] = None,
    histories: Annotated[
        Path | None,
        typer.Option(
            help="Parquet (a file or a folder) with user_id and history, a list of item ids, "
            "oldest first; needs --out."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File of the lists of many users: FILE.parquet", show_default=False),
    ] = None,
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
    data: Annotated[
        Path | None, typer.Option(help="Data set folder, for --user, --users and --all.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Rank the next items for a history, for a user of the data set, or for many users.

    Users and items need not be known from training: `--new-item "N1=Cordless drill, 18 V"` enters
    the ranking by its text, and may be part of the history.

    Lists of many users are written as Parquet: user_id, item_id, score, rank (from 1), best first.
    A user for whom fewer items are left has fewer rows.

    Example: `l2rec recommend runs/ml --history 50,172 -k 5`, or
    `l2rec recommend runs/ml --all --out lists.parquet`
    """
    from l2rec.console import print_new_items, print_recommendations
    from l2rec.errors import DataError
    from l2rec.protocols import TakesNewItems
    from l2rec.runs.folder import user_history
    from l2rec.runs.predictor import load

    if out is None:
        gc.disable()  # as in `serve`; a process of one list is short
    asked = {
        "--history and --item": history is not None or bool(item),
        "--user": user is not None,
        "--all": everybody,
        "--users": users is not None,
        "--histories": histories is not None,
    }
    named = [name for name, given in asked.items() if given]
    many = everybody or users is not None or histories is not None
    if len(named) != 1 or many != (out is not None):
        raise DataError(
            "give either --history ID,ID,... or --user ID (an id with a comma is given by "
            "--item ID); or one of --all, --users FILE and --histories PARQUET, with --out FILE"
            f"; this has {' and '.join(named) or 'none of them'}{' with' if out else ' without'} "
            "--out"
        )
    added = {}
    for entry in new_item or ():
        name, sep, text = entry.partition("=")
        if not sep or not name.strip():
            raise DataError(f'--new-item {entry!r}: write "ID=its text"')
        if name.strip() in added:
            raise DataError(f"--new-item names {name.strip()!r} twice")
        added[name.strip()] = text.strip()
    if out is not None:
        facts = _write_lists(
            run, out, k, added, data, users, histories, exclude_seen=not include_seen, quiet=as_json
        )
        if as_json:
            print_json(facts)
        else:
            typer.echo(f"{out}: {facts['rows']:,} rows of {facts['users']:,} users")
        return
    if user is not None:
        ids = user_history(run, user, data)
    else:
        between_commas = (history or "").split(",")
        ids = [*(part.strip() for part in between_commas if part.strip()), *(item or ())]
    predictor = load(run)
    if added:
        predictor.add_items(added)
    if history is not None and not set(ids) <= set(predictor.ids):
        _check_history(history, ids, predictor.ids)
    try:
        predictor.rows([ids])
    except DataError as error:
        if not isinstance(predictor.model, TakesNewItems):
            raise
        raise DataError(f'{error} (--new-item "ID=its text" adds an item by its text)') from None
    if k is None:
        k = min(10, len(predictor.ids))
    result = predictor.recommend(ids, k, exclude_seen=not include_seen)
    if as_json:
        print_json({"items": result.items, "gate": result.gate, "version": predictor.version})
    else:
        texts = [(i, predictor.text_of(i)) for i in ids]
        print_recommendations(texts, result)
        if unseen := set(added) - set(ids) - {listed["id"] for listed in result.items}:
            ranking = predictor.recommend(ids, predictor.n_items, exclude_seen=not include_seen)
            print_new_items([listed["id"] for listed in ranking.items], sorted(unseen))


def _check_history(history: str, ids: Sequence[str], known: Sequence[str]) -> None:
    """Raise DataError for a history that was cut or stripped where an id was meant as it is."""
    from l2rec.errors import DataError

    whole = next((i for i in known if "," in i and i in history), None)
    if whole is not None:
        raise DataError(
            f"--history {history!r} is read as {len(ids)} ids between commas; give ids with a "
            f"comma by --item, one at a time: {shlex.join(['--item', whole])}"
        )
    parts = (part for part in history.split(",") if part.strip() not in known)
    meant = next((part for part in parts if part in known), None)
    if meant is not None:
        raise DataError(
            f"--history {history!r} is read without blanks at the ends of ids; give ids that have "
            f"some by --item, one at a time: {shlex.join(['--item', meant])}"
        )


def _write_lists(
    run: Path,
    out: Path,
    k: int | None,
    added: Mapping[str, str],
    data: Path | None,
    users: Path | None,
    histories: Path | None,
    *,
    exclude_seen: bool,
    quiet: bool,
) -> dict[str, Any]:
    """Write the lists of many users, and return what `recommend --out` says of them."""
    from l2rec.console import Console
    from l2rec.errors import ConfigError
    from l2rec.runs.lists import of_dataset, of_parquet, write_lists
    from l2rec.runs.predictor import load

    if out.suffix != ".parquet" or out.is_dir():
        raise ConfigError(f"--out {out}: give a file that ends in .parquet")
    read = next((path for path in (users, histories) if path is not None), None)
    if read is not None and out.resolve() in (read.resolve(), *read.resolve().glob("*.parquet")):
        raise ConfigError(f"--out {out} is what is read; choose another file")
    asked = of_dataset(run, data, users) if histories is None else of_parquet(run, histories)
    predictor = load(run)
    if added:
        predictor.add_items(added)
    with Console(quiet=quiet) as console:
        many, rows = write_lists(
            predictor,
            asked,
            out,
            min(10, predictor.n_items) if k is None else k,
            exclude_seen=exclude_seen,
            progress=console,
        )
    return {"out": str(out), "users": many, "rows": rows, "version": predictor.version}


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

    must_be_folder(out)
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
    if written.losses and written.dataset is not None:
        print_losses(written.losses, written.dataset)


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
        print_json(facts)
    else:
        print_table(str(out), facts)


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

    must_be_folder(out)
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


def serve(
    target: Annotated[Path, typer.Argument(help="Run folder, or the folder of `l2rec deploy`.")],
    *,
    host: Annotated[str, setting("host", "Address to listen on.")],
    port: Annotated[int, setting("port", "Port to listen on; 0 for any that is free.")],
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
        setting("index", "auto (the one in RUN/index, or by size), exact, flat, ivf or hnsw."),
    ],
    experiment: Annotated[
        str | None, typer.Option(help="Run an A/B experiment of this name.")
    ] = None,
    treatment_share: Annotated[
        float, setting("treatment_share", "Share of users who get the live version.")
    ],
    salt: Annotated[str, setting("salt", "Salt of the hash that assigns users to arms.")],
    control: Annotated[
        str | None,
        typer.Option(
            help="Run that serves the control arm, or popularity; without it both arms are served "
            "alike."
        ),
    ] = None,
    rate: Annotated[float, setting("rate", "Tokens a minute of one key; 0: no limit.")],
    queue: Annotated[float, setting("queue", "Seconds that a history may wait for the model.")],
    inflight: Annotated[int, setting("inflight", "Requests that may be in progress.")],
    timeout: Annotated[float, setting("timeout", "Seconds until a request is given up.")],
    cache: Annotated[int, setting("cache", "User vectors in the cache; 0: no cache.")],
    batch_tokens: Annotated[int, setting("batch_tokens", "Tokens that close a batch.")],
    slice_tokens: Annotated[
        int, setting("slice_tokens", "Tokens that close a slice of embeddings and explanations.")
    ],
    batch_ms: Annotated[float, setting("batch_ms", "Milliseconds that close a batch.")],
    shutdown: Annotated[
        int, setting("shutdown", "Seconds that requests in progress have at the end.")
    ],
    threads: Annotated[
        int, typer.Option(min=0, help="Threads of the model; 0: one for each core.")
    ] = 0,
    access_log: Annotated[bool, setting("access_log", "One log line for each request.")],
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
    seed: Annotated[int, typer.Option(min=0, help="Seed of the simulation.")] = 0,
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
        print_json(result)
    else:
        print_experiment(result)
