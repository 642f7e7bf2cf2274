"""The command line: ``l2rec <verb> ...``. Heavy imports happen inside the verbs.

data         from a log to what a training reads
training     runs
results      what comes of finished runs: scores, tests, tables
production   recommendations, vectors, indexes, the service
options      what several verbs share
"""

from __future__ import annotations

__all__ = ["app", "main"]

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from l2rec._version import __version__
from l2rec.cli import data, production, results, training
from l2rec.errors import L2RecError

app = typer.Typer(
    name="l2rec",
    help="Turn a frozen language model into a personalised recommender (L2Rec, SIGIR '26).",
    epilog="Start with: l2rec demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


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


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the run.")] = Path("runs/demo"),
    data: Annotated[Path, typer.Option(help="Folder for the data set.")] = Path("data/ml-100k"),
    minutes: Annotated[float, typer.Option(help="Training time of each method at most.")] = 4.0,
) -> None:
    """Show every step on MovieLens-100K in minutes: prepare, train, blend, score, recommend."""
    from l2rec.demo import run_demo

    run_demo(out, data, minutes)


PANELS: dict[str, list[Callable[..., None]]] = {
    "To begin with": [demo],
    "Data": [data.prepare, data.describe, data.floors, data.merge, data.cold],
    "Training": [training.doctor, training.train, training.update, training.tune, training.recipes],
    "Results": [
        results.evaluate,
        results.compare,
        results.diagnose,
        results.blend,
        results.average,
        results.fusion,
        results.alignment,
        results.experiment,
        results.downstream,
        results.publish,
    ],
    "In production": [
        production.recommend,
        production.embed,
        production.index,
        production.onnx,
        production.serve,
        production.deploy,
        production.rollback,
        production.abtest,
    ],
}
"""All verbs, in the order of the help."""

for panel, verbs in PANELS.items():
    for verb in verbs:
        app.command(rich_help_panel=panel)(verb)


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
        _end_interrupted(arguments)
    except SystemExit as stop:
        if stop.code == 130:  # typer has caught the KeyboardInterrupt
            _end_interrupted(arguments)
        raise


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _end_interrupted(arguments: list[str]) -> NoReturn:
    """Exit with 130 after Ctrl-C; another one would print tracebacks of what runs at the exit."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.stderr.write(_interrupted(arguments))
    sys.exit(130)


def _interrupted(arguments: list[str]) -> str:
    """Return what to say after Ctrl-C: how the verb goes on, if it does."""
    after = {
        "train": "; go on with the same command and --resume",
        "update": "; go on with the same command and --resume",
        "demo": "; go on with the same command",
        "tune": "; go on with the same command",
        "experiment": "; go on with the same command",
        "prepare": "; what was at --out before is as it was",
        "embed": "; shards that are finished are kept: go on with the same command",
    }
    verb = next((argument for argument in arguments if not argument.startswith("-")), "")
    return f"l2rec: interrupted{after.get(verb, '')}\n"
