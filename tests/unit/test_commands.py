"""Every command that the documents show is one: verbs, options, recipes, files, addresses exist.

Nothing is run here; `tests/examples/test_documents.py` runs those that small data are enough for.
"""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Callable, Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock
from urllib.parse import urlsplit

import pytest
from tests.support import documents
from tests.support.documents import DOCUMENTS, ROOT, Command, placeholder
from typer.main import get_command

from l2rec.cli import app
from l2rec.config import SplitConfig, find_recipe, from_options, load_recipe
from l2rec.data.formats.open import FORMATS
from l2rec.data.prepare import PrepareConfig
from l2rec.service.app import create_app
from l2rec.service.settings import Settings
from l2rec.studies.downstream.options import downstream_config
from l2rec.studies.experiment.definition import load_experiment

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERBS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
STOPS = ("Exit", "MissingParameter")
"""Ends of a reading that are no error: `--help`; and in a sentence, what it leaves out."""


def _named(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


@pytest.fixture(autouse=True)
def _at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where the commands of the documents are typed


@pytest.mark.parametrize("document", DOCUMENTS, ids=_named)
def test_commands_are_what_they_seem(document: Path) -> None:
    _check(documents.commands(document))


def test_commands_in_the_help_are_what_they_seem() -> None:
    examples = [c for name, verb in VERBS.items() for c in documents.spans(verb.help or "", name)]
    assert len(examples) > len(VERBS) / 2
    _check(examples)


def _check(commands: Iterable[Command]) -> None:
    wrong = []
    for command in commands:
        try:
            CHECKS[command.words[0]](command)
        except Exception as error:
            what = error.format_message() if hasattr(error, "format_message") else repr(error)
            wrong.append(f"{command.where}: {' '.join(command.words)}\n    {what}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("document", DOCUMENTS, ids=_named)
def test_blocks_of_commands_say_so_and_python_is_python(document: Path) -> None:
    for block in documents.blocks(document):
        if not block.language:
            assert block.text.split()[0] not in documents.PROGRAMS, f"line {block.line}: ```bash"
        if block.language == "python":
            ast.parse(block.text)


def test_the_commands_are_found() -> None:
    found = [c for document in DOCUMENTS for c in documents.commands(document)]
    assert {c.words[0] for c in found} >= {"l2rec", "make", "pip", "curl", "python", "torchrun"}
    assert {c.words[1] for c in found if c.words[0] == "l2rec" and c.whole} >= VERBS.keys() - {
        *("recipes", "demo", "merge", "evaluate", "rollback"),  # in sentences, or with others
    }


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("l2rec trian l2rec --data D --out R", "trian"),
        ("l2rec train l2rec --data D --out R --sedd 1", "No such option"),
        ("l2rec train l2rec --out R", "Missing option"),
        ("l2rec train l2rce --data D --out R", "no recipe 'l2rce'"),
        ("l2rec train l2rec --data D --out R model.rnak=2", "did you mean 'rank'"),
        ("l2rec floors D --split loo", "loo"),
        ("l2rec experiment l2rec-table9 --data D --out R", "l2rec-table9"),
        ("python benchmarks/nothing.py", "nothing"),
        ("python benchmarks/step.py --quik", "--quik"),
        ("make coffee", "coffee"),
        ("pip install 'l2rec[serving]'", "serving"),
        ("curl -X DELETE localhost:8000/v1/recommend", "delete"),
        ("curl localhost:8000/v1/recommend -d '{history: 3}'", "Expecting property name"),
        ("torchrun --nproc-per-node 8 -m l2rec train l2rce --data D --out R", "l2rce"),
    ],
)
def test_commands_that_are_wrong_are_seen(command: str, error: str) -> None:
    (words,) = documents.of_shell(command)
    with pytest.raises(Exception) as raised:
        CHECKS[words[0]](Command(words, "here", True))
    what = raised.value
    assert error in (what.format_message() if hasattr(what, "format_message") else repr(what))


def test_scripts_are_read_as_a_shell_reads_them() -> None:
    script = """
    for N in a b; do   # each
      l2rec floors data/$N && l2rec describe "data/${N} x"
    done
    R=runs/x; l2rec evaluate $R/y \\
        --json
    curl x -d '{"a": [
      1]}' | cat
    """
    assert list(documents.of_shell(script)) == [
        ("l2rec", "floors", "data/a"),
        ("l2rec", "describe", "data/a x"),
        ("l2rec", "evaluate", "runs/x/y", "--json"),
        ("curl", "x", "-d", '{"a": [\n      1]}'),
        ("cat",),
    ]


# -- one check a program ---------------------------------------------------------------------------


def _l2rec(command: Command) -> None:
    """Read the words as the command line would, then what they name: recipes, splits, formats."""
    words = [word for word in command.words[1:] if word not in ("...", "…")]
    if not words or placeholder(words[0]) or words == ["--help"]:
        return
    verb = VERBS[words[0]]
    try:
        given = verb.make_context(words[0], words[1:]).params
    except Exception as error:
        option_alone = "requires an argument" in str(error)  # a sentence about `--split`
        if type(error).__name__ == "Exit":
            return
        if not command.whole and (type(error).__name__ in STOPS or option_alone):
            return
        raise
    if words[0] in ("train", "tune", "doctor"):
        _recipe(given["recipe"], given["overrides"] or ())
    if words[0] == "recipes" and given["recipe"] is not None:
        _recipe(given["recipe"], ())
    if words[0] == "update":
        _recipe("l2rec-plus", given["overrides"] or ())
    if words[0] == "experiment" and not placeholder(given["name"].removesuffix(".yaml")):
        load_experiment(given["name"])
    if words[0] == "downstream":
        downstream_config(given["overrides"] or ())
    if "valid_from" in given:
        options = {"kind": given["split"], "valid_from": None, "test_from": None}
        from_options(SplitConfig, options, kind="split")
    if words[0] == "prepare":
        assert given["format"] in {None, *FORMATS}
        options = {k: given[k] for k in ("k_core", "min_history", "ties", "splits")}
        from_options(PrepareConfig, options)


def _recipe(name: str, overrides: tuple[str, ...] | list[str]) -> None:
    if placeholder(name) or name.startswith("my_"):  # the reader's own file
        return
    if name == "mine.yaml":
        assert "# mine.yaml" in (ROOT / "docs" / "own-method.md").read_text()
        return
    if ":" not in name:
        find_recipe(name)
    load_recipe(name, [override for override in overrides if not placeholder(override)])


def _python(command: Command) -> None:
    """Look for the script and for the options that it declares."""
    words = command.words[1:]
    if words[0] == "-m":
        return _module(command)
    if words[0] == "-c":
        compile(words[1], command.where, "exec")
        return
    if placeholder(words[0].removesuffix(".py")):
        return
    assert (ROOT / words[0]).is_file(), f"no {words[0]}"
    source = (ROOT / words[0]).read_text()
    for shared in re.findall(r"^(?:from|import) (\w+)", source, re.M):
        beside = (ROOT / words[0]).with_name(f"{shared}.py")
        source += beside.read_text() if beside.is_file() else ""
    for word in words[1:]:
        if word.startswith("--"):
            assert f'"{word}"' in source, f"{word} is no option of {words[0]}"


def _module(command: Command) -> None:
    """Check what a launcher starts: `-m l2rec VERB ...`."""
    words = command.words
    if "-m" in words:
        start = words.index("-m") + 1
        assert words[start] == "l2rec", words
        _l2rec(Command(words[start:], command.where, command.whole))


def _make(command: Command) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    settings = [word for word in command.words[1:] if "=" in word]
    for word in command.words[1:]:
        assert word in targets or word in settings, f"{word} is no target"


def _pip(command: Command) -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    for word in command.words[2:]:
        for names in re.findall(r"\[(.+)\]", word):
            unknown = set(names.split(",")) - extras.keys()
            assert not unknown, f"no such extra: {unknown}"


def _pytest(command: Command) -> None:
    markers = [m.partition(":")[0] for m in PROJECT["tool"]["pytest"]["ini_options"]["markers"]]
    words = list(command.words[1:])
    for option, value in pairwise(words):
        assert option != "-m" or value in markers, value
    paths = [word.partition("::")[0] for word in words if word.startswith("tests")]
    texts = [(ROOT / path).read_text() for path in paths if path.endswith(".py")]
    assert all((ROOT / path).exists() for path in paths), paths
    if "-k" in words:
        assert any(words[words.index("-k") + 1] in text for text in texts), words


def _curl(command: Command) -> None:
    """Look the address up among the routes, and read the body."""
    words = command.words
    (address,) = (word for word in words if "localhost" in word)
    path = urlsplit(address if "://" in address else f"http://{address}").path
    body = words[words.index("-d") + 1] if "-d" in words else None
    method = words[words.index("-X") + 1] if "-X" in words else "GET" if body is None else "POST"
    assert method.lower() in _routes()[path], f"{method.lower()} {path}"
    if body is not None and not body.startswith("@"):  # of a file
        json.loads(body)


@cache
def _routes() -> dict[str, Any]:
    """Read the paths of the service's schema, of an app that has nothing to serve."""
    paths: dict[str, Any] = create_app(Settings(), MagicMock(), MagicMock()).openapi()["paths"]
    return paths


def _docker(command: Command) -> None:
    assert (ROOT / "Dockerfile").is_file()


def _any(command: Command) -> None:
    """Leave the programs of others alone."""


CHECKS: dict[str, Callable[[Command], None]] = {
    "l2rec": _l2rec,
    "python": _python,
    "make": _make,
    "pip": _pip,
    "pytest": _pytest,
    "curl": _curl,
    "torchrun": _module,
    "accelerate": _module,
    "docker": _docker,
    "hf": _any,
    ".": _any,
}
