"""The command line, in a process of its own and in this one."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from l2rec import cli

PROGRAM = [
    *(sys.executable, "-c"),
    "import sys; from l2rec.cli import main; sys.argv[0] = 'l2rec'; main()",
]
"""``l2rec``, to which arguments are added, in a process of its own."""


class Outcome(NamedTuple):
    """Exit code, standard output and standard error of a command."""

    code: int
    out: str
    err: str


Call = Callable[..., Outcome]


def caller(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Return a function that runs ``l2rec`` with its arguments in this process."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["l2rec", *map(str, arguments)])
        capsys.readouterr()
        on_interrupt = signal.getsignal(signal.SIGINT)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        signal.signal(signal.SIGINT, on_interrupt)  # ignored once a command was interrupted
        captured = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), captured.out, captured.err)

    return run
