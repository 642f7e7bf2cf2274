"""Verbs that train."""

from __future__ import annotations

__all__ = ["doctor", "recipes", "train", "tune", "update"]

import contextlib
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from l2rec.cli.data import COLUMN_OPTIONS, log_at
from l2rec.cli.options import (
    Json,
    Run,
    SplitKind,
    TestFrom,
    ValidFrom,
    next_step,
    print_json,
    split_words,
)
from l2rec.data.formats.columns import Columns


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
        print_json(report)
    else:
        print_doctor(report)


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
        Path | None,
        typer.Option(
            help="Start from this run (fine-tune after pre-training). Rows of its items are kept "
            "where the catalog is the same, and left out otherwise."
        ),
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

    config = load_recipe(recipe, [*(overrides or ()), *split_words(split, valid_from, test_from)])
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
        console.line(next_step("l2rec", "recommend", out, "--history", "ID,ID,ID"))


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
    from l2rec.service.events import is_event_log
    from l2rec.studies.update import update_run

    dataset = open_run_dataset(run, data)
    options = dataset.meta.get("options") or {}
    named = {name: options[name] for name in COLUMN_OPTIONS if name in options}
    with contextlib.ExitStack() as stack:
        log = log_at(stack, events, items, per_second=dataset.order.per_second or 1.0)
        logged = is_event_log(events)  # then its columns and types are those of the export
        columns = Columns() if logged else Columns(**named)
        newer = open_source(log.path, items=log.items, columns=columns)
        newer = replace(newer, chosen=logged, origin=log.origin)
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
        console.line(next_step("l2rec", "deploy", out, "--to", "serving"))


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
            overrides=[*(overrides or ()), *split_words(split, valid_from, test_from)],
            search=search or (),
            seed=seed,
        )
    if as_json:
        print_json(
            {
                "fingerprint": result.dataset["fingerprint"],
                "trials": [asdict(trial) for trial in result.trials],
                "recipe": str(result.recipe),
            }
        )
    else:
        print_trials(result.trials, result.dataset)
        typer.echo(next_step("l2rec", "train", result.recipe, "--data", data, "--out", "RUN"))


def recipes(
    recipe: Annotated[
        str | None,
        typer.Argument(help="Shipped recipe, YAML file, or method name.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the shipped recipes; or, of one, every option with its value.

    What is printed of one is a whole recipe: each key with what it means, what it may be, and its
    default where the recipe has another. It can be kept as a file and changed.

    Example: `l2rec recipes sasrec`
    """
    from dataclasses import asdict

    from l2rec.config import load_recipe, recipe_names
    from l2rec.options import as_recipe, options_of

    if recipe is None:
        names = recipe_names()
        if as_json:
            print_json({"recipes": names})
        else:
            typer.echo("\n".join(names))
        return
    options = options_of(load_recipe(recipe))
    if as_json:
        print_json({"recipe": recipe, "options": [asdict(one) for one in options]})
    else:
        typer.echo(as_recipe(recipe, options), nl=False)
