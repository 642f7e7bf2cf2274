"""What several verbs share: options, their defaults, and how they answer."""

from __future__ import annotations

__all__ = [
    "Default",
    "Json",
    "Run",
    "SplitKind",
    "TestFrom",
    "ValidFrom",
    "must_be_folder",
    "next_step",
    "print_json",
    "split_words",
]

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Run = Annotated[
    Path, typer.Argument(help="Run folder written by `l2rec train`.", show_default=False)
]
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


def split_words(kind: str | None, valid_from: str | None, test_from: str | None) -> list[str]:
    """Turn the options of the split into overrides of a recipe."""
    options = {"kind": kind, "valid_from": valid_from, "test_from": test_from}
    return [f"split.{name}={value}" for name, value in options.items() if value is not None]


class Default:
    """Default of an option that another module holds, imported when it is needed."""

    def __init__(self, read: Callable[[], Any]) -> None:
        self._read = read

    def __call__(self) -> Any:
        return self._read()

    def __str__(self) -> str:  # in the help
        return str(self())


def must_be_folder(out: Path) -> None:
    """Raise ConfigError for an ``--out`` that is a file where a folder is written."""
    from l2rec.errors import ConfigError

    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; give a folder")


def print_json(value: Any) -> None:
    """Print one JSON object in one line."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


def next_step(*words: object) -> str:
    """Return the line that says what to do next, quoted for a shell."""
    return f"next: {shlex.join(str(word) for word in words)}"
