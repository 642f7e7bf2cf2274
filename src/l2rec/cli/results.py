"""Verbs that score finished runs, compare them and make something of them."""

from __future__ import annotations

__all__ = [
    "alignment",
    "average",
    "blend",
    "compare",
    "diagnose",
    "downstream",
    "evaluate",
    "experiment",
    "fusion",
    "publish",
]

import math
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from l2rec.cli.options import Json, Run, must_be_folder, next_step, print_json


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
        print_json(scores)
    else:
        print_table(f"{run} on {split}", scores)


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
    trained on: in the top fifth of the catalog (head), or below it (tail); of these, never (cold).
    Of these tables † is a difference at p < 0.05 after Holm's correction for all tests of the table
    (p_holm of --json and CSV). Where the best is the reference, all pairs of rows count, since any
    could have been the best. The p of other tables is not corrected.

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
        print_json(asdict(comparison))
    else:
        print_comparison(comparison)


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
        print_json(report)
    else:
        print_exposure(report)


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
        console.line(next_step("l2rec", "compare", run, out))


def average(
    runs: Annotated[list[Path], typer.Argument(help="Finished run folders.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    data: Annotated[Path | None, typer.Option(help="Data set folder, if it was moved.")] = None,
) -> None:
    """Score the mean of several runs' scores: what two seeds are worth together.

    The control for whatever joins two models: it has to beat two seeds of one of them, averaged.
    Scores of runs that differ in method, or of which one is blended, are standardised for each
    user first.
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
        report = fusion_sweep(
            run, alphas, dominant=dominant, split_name=split, progress=console, data=data
        )
    if as_json:
        print_json(report)
    else:
        title = f"{run} on {split}, fingerprint {report['fingerprint']}"
        print_rows(title, "alpha", report["scores"])


def alignment(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Finished runs of L2Rec: of both views, and pairs of one each."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the report.")],
    users: Annotated[int, typer.Option(help="Test users to measure, 5,000 at most.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the users that are drawn.")] = 0,
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

    must_be_folder(out)
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
        print_json(report)
    else:
        print_alignment(report)
        typer.echo(f"report: {out}/report.html")


def _print_experiments(asked: bool) -> None:
    """Print the shipped experiments, one in a line, and end the program."""
    if not asked:
        return
    from l2rec.studies.experiment.definition import experiment_titles

    titles = experiment_titles()
    for name, title in titles.items():
        typer.echo(f"{name:<{max(map(len, titles))}}  {title}")
    raise typer.Exit


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
    from l2rec.studies.experiment.plan import check_limits, fitted
    from l2rec.studies.experiment.plan import plan as make_plan
    from l2rec.studies.experiment.report import to_json, write_page
    from l2rec.studies.experiment.run import run as run_plan
    from l2rec.studies.experiment.run import take as take_found

    must_be_folder(out)
    check_limits(jobs, hours)
    if price_per_hour is not None and not 0 <= price_per_hour < math.inf:
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
    if render and take is not None:
        with Console(quiet=as_json) as console:
            planned = take_found(planned, progress=console)
    if hours is not None and (plan or render):
        planned = fitted(planned, hours * 3600, jobs)
    if plan:
        if as_json:
            print_json(planned.to_json())
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
        print_json(to_json(planned))


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
        print_json(report)
    else:
        print_downstream(report)
        typer.echo(f"report: {out}/report.json")


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
