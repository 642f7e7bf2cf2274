"""Experiments on tiny data: their files, and their cells in this process."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import IO, Any

import pytest
import yaml

from l2rec import cli

FIXED = ["training.epochs=2", "model.max_items=6", "training.batch_users=16", "model.inner=8"]
"""Overrides with which SASRec is trained in a moment."""


def written(path: Path, **changes: Any) -> Path:
    """Write an experiment of two widths of SASRec, with these keys instead."""
    values: dict[str, Any] = {
        "title": "Two widths",
        "seeds": [1, 2],
        "overrides": FIXED,
        "rows": [
            {"name": "narrow", "recipe": "sasrec", "overrides": ["model.dim=8"]},
            {"name": "wide", "recipe": "sasrec", "overrides": ["model.dim=16"]},
        ],
    }
    path.write_text(yaml.safe_dump(values | changes, sort_keys=False))
    return path


def collector() -> Any:
    """Load the script `results/collect.py` as a module."""
    path = Path(__file__).parents[2] / "results" / "collect.py"
    module = module_from_spec(spec := spec_from_file_location("collect", path))  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


class Processes:
    """A stand-in for `subprocess.Popen`: ``l2rec`` in this process, to its end, when it is begun.

    begun: arguments of each. before: called with them first; what it raises, the caller gets.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[list[str]] = []
        self.environments: list[dict[str, str]] = []
        self.before: Callable[[Sequence[str]], None] = lambda arguments: None
        self._monkeypatch = monkeypatch
        self._other = subprocess.Popen
        monkeypatch.setattr(subprocess, "Popen", self._begin)

    @property
    def lines(self) -> list[str]:
        """Return what was begun as command lines, without options that all have."""
        return [shlex.join(arguments) for arguments in self.begun]

    def _begin(self, command: Sequence[str], **options: Any) -> Any:
        if list(command[:3]) != [sys.executable, "-m", "l2rec"]:
            return self._other(command, **options)  # such as git, which is asked for the commit
        arguments = list(command[3:])
        self.before(arguments)
        self.begun.append(arguments)
        self.environments.append(dict(options["env"]))
        out, messages = io.StringIO(), io.StringIO()
        with self._monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["l2rec", *arguments])
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(messages):
                if arguments[0] == "fusion":  # that of a model there is none of
                    scores = {"0.5": {"ndcg@10": 0.25, "ndcg@10_masked": 0.5}}
                    print(json.dumps({"scores": scores}))
                    code = 0
                else:
                    with pytest.raises(SystemExit) as stop:
                        cli.main()
                    code = int(stop.value.code or 0)
        _write(options["stdout"], out.getvalue())
        _write(options["stderr"], messages.getvalue())
        return Ended(code)


def _write(file: IO[bytes], text: str) -> None:
    file.write(text.encode())
    file.flush()


class Ended:
    """A process that has ended."""

    def __init__(self, code: int) -> None:
        self.returncode = code

    def poll(self) -> int:
        return self.returncode

    def send_signal(self, number: int) -> None:
        raise ProcessLookupError

    def wait(self, timeout: float | None = None) -> int:
        return self.returncode
